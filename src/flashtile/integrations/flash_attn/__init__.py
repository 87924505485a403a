"""The interface of flash_attn 2.8 on flashtile's kernels: change one import, and existing code runs, on CPUs too.

    import flashtile.integrations.flash_attn as flash_attn
    from flashtile.integrations.flash_attn.bert_padding import unpad_input

For code that cannot be edited, ``install()`` puts this package under the name ``flash_attn``. The submodules are those
of flash_attn: ``flash_attn_interface``, ``bert_padding``, ``layers.rotary`` and ``modules.mha``.
"""

from flashtile.integrations.flash_attn.flash_attn_interface import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_unpadded_func,
    flash_attn_unpadded_kvpacked_func,
    flash_attn_unpadded_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
from flashtile.integrations.flash_attn.install import install, uninstall

__version__ = "2.8.3"
"""The flash_attn release whose interface this is, for code that compares versions."""

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_unpadded_func",
    "flash_attn_unpadded_kvpacked_func",
    "flash_attn_unpadded_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "install",
    "uninstall",
]
