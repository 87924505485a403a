"""flashtile in torch's registry of flash attention implementations, beside FA3 and FA4."""

from __future__ import annotations

import warnings

import torch
from torch.library import Library
from torch.nn import attention as torch_attention

from flashtile.errors import UnsupportedProblem
from flashtile.integrations.sdpa import aten_ops

NAME = "flashtile"


def register() -> None:
    """Lists flashtile among torch's flash attention implementations; ``activate`` does it too.

    Afterwards ``torch.nn.attention.activate_flash_attention_impl("flashtile")`` is ``activate()``.

    Raises:
        UnsupportedProblem: this torch has no such registry.
    """
    if not hasattr(torch_attention, "register_flash_attention_impl"):
        raise UnsupportedProblem(
            f"torch {torch.__version__} has no registry of flash attention implementations. "
            "Remedy: a newer torch, or flashtile.integrations.sdpa.override()",
            {},
        )
    torch_attention.register_flash_attention_impl(NAME, register_fn=_Activation)


def activate() -> None:
    """Makes flashtile torch's flash attention on CUDA, in the whole process, until ``restore``.

    ``F.scaled_dot_product_attention`` then runs flashtile's kernels wherever torch chooses flash attention: float16 and
    bfloat16, head_dim up to 256, no ``attn_mask``; with ``enable_gqa`` and dropout; and so does
    ``torch.nn.attention.varlen.varlen_attn``. cuDNN, which torch prefers on some GPUs, is switched off meanwhile. Calls
    with a mask, float32 and other devices stay torch's; ``override`` takes those too.

    Raises:
        UnsupportedProblem: torch sees no CUDA GPU, so that nothing would change; or it has no registry.
    """
    if not torch.cuda.is_available():
        raise UnsupportedProblem(
            "torch sees no CUDA GPU here, and its registry of flash attention serves no other device. "
            "Remedy: with flashtile.integrations.sdpa.override():",
            {},
        )
    register()
    torch_attention.activate_flash_attention_impl(NAME)


def restore() -> None:
    """Brings torch's own flash attention back; does nothing unless flashtile is the active implementation."""
    if torch_attention.current_flash_attention_impl() == NAME:
        torch_attention.restore_flash_attention_impl()


class _Activation:
    """What torch keeps while flashtile is active, and removes to bring its own kernels back."""

    def __init__(self) -> None:
        self._library = Library("aten", "IMPL", "CUDA")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*[Oo]verriding a previously registered kernel")
            for name, kernel in aten_ops.KERNELS.items():
                if hasattr(torch.ops.aten, name):
                    self._library.impl(name, kernel, "CUDA")
        self._was_cudnn_enabled = torch.backends.cuda.cudnn_sdp_enabled()
        torch.backends.cuda.enable_cudnn_sdp(False)

    def remove(self) -> None:
        self._library._destroy()
        torch.backends.cuda.enable_cudnn_sdp(self._was_cudnn_enabled)
