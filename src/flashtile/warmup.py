"""``flashtile.warmup``: the compilation that a first call would wait for, at a time of the caller's choice."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashtile import functional


def warmup(q: Tensor, k: Tensor, v: Tensor, *, with_lse: bool = False, **options: Any) -> None:
    """Compiles the kernels of a call, and those of its backward, by running it once on the tensors given.

    A GPU kernel is compiled when the first problem of its kind arrives: one dtype, head_dim, set of options and memory
    layout. It serves every length and batch, so short tensors like those to come are enough; but few queries of many
    keys have kernels of their own on Hopper GPUs. What was compiled stays in Triton's disk cache for other processes.

    Args:
        q, k, v: as for ``attention``. The backward is compiled for those tensors that require a gradient.
        with_lse: the results' lse is used too, as from ``attention_with_lse``; default False.
        **options: every option of ``attention``, or of ``attention_varlen`` if ``cu_seqlens_q`` is among them.

    Returns:
        None, when the kernels are ready. No gradient is accumulated and no random number drawn.

    Raises:
        InvalidArgument, UnsupportedProblem, TypeError: as the call itself would.

    Cost: that of the call and its backward, once, and the compilation where no disk cache has it.

    Example:
        >>> import torch, flashtile
        >>> q, k, v = torch.randn(3, 1, 32, 2, 16, requires_grad=True).unbind()
        >>> flashtile.warmup(q, k, v, causal=True)
    """
    is_packed = "cu_seqlens_q" in options
    if options.get("dropout_p") and options.get("dropout_seed") is None:
        options["dropout_seed"] = 0
    functions = {
        (False, False): functional.attention,
        (False, True): functional.attention_with_lse,
        (True, False): functional.attention_varlen,
        (True, True): functional.attention_varlen_with_lse,
    }
    leaves = {name: _leaf(value) for name, value in {"q": q, "k": k, "v": v, **options}.items()}
    with torch.enable_grad():
        found = functions[is_packed, with_lse](**leaves)
    results = found if isinstance(found, tuple) else (found,)
    wanted = [leaf for leaf in leaves.values() if isinstance(leaf, Tensor) and leaf.requires_grad]
    if wanted:
        torch.autograd.grad(results, wanted, [torch.ones_like(result) for result in results])
    if results[0].is_cuda:
        torch.cuda.synchronize(results[0].device)


def _leaf(value: Any) -> Any:
    """A tensor of the same memory that autograd knows nothing about yet; anything else as it is."""
    return value.detach().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value
