"""``flashtile bench io``: what attention moves between the processor and its memory, predicted and measured."""
