"""``flash_attn.modules``."""
