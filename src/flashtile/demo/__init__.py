"""``flashtile demo``: trains one small language model twice, with naive attention and with flashtile, and compares."""
