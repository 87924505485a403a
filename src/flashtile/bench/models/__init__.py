"""``flashtile bench models``: whole transformers, the attention function as the only difference."""
