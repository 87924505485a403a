"""One folder per way to compute attention; a folder never imports another one."""
