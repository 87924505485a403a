"""The peers: attention as other libraries offer it, each on the same [batch, seqlen, heads, head_dim] tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import flashtile
from flashtile.bench.cases import DTYPES, BenchCase

AttentionFn = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(q, k, v) -> out, all [batch, seqlen, heads, head_dim], differentiable."""

FLASHTILE = "flashtile"
NAIVE = "naive"
SDPA = "sdpa"

_HALF = ("float16", "bfloat16")


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """One way to compute attention, and what it is known not to take."""

    name: str
    prepare: Callable[[BenchCase, torch.device], AttentionFn]
    """Makes the function to measure; masks and imports happen here, outside the timed part."""
    requires: tuple[str, str] | None = None
    """(module, attribute) that must be importable."""
    needs_gpu: bool = False
    dtypes: tuple[str, ...] = tuple(DTYPES)
    takes_grouped_heads: bool = True
    scope: Callable[[], AbstractContextManager[Any]] = nullcontext
    """What has to be in force while the function runs; entering it is not timed."""
    scratch_bytes: Callable[[BenchCase], int] = lambda _: 0
    """A lower bound of its temporary memory: on a CPU, asking for more than there is can end the whole process."""

    def unavailable_reason(self, case: BenchCase, device: torch.device) -> str | None:
        """Why this peer cannot run the case on the device, as far as is known without trying; None if it may."""
        if self.needs_gpu and device.type != "cuda":
            return "needs a GPU"
        if self.requires and (problem := import_problem(*self.requires)):
            return problem
        if case.dtype not in self.dtypes:
            return f"takes {' and '.join(self.dtypes)} only"
        if case.heads_q != case.heads_kv and not self.takes_grouped_heads:
            return "takes no grouped heads"
        return None


@lru_cache(maxsize=64)
def import_problem(module: str, attribute: str) -> str | None:
    """Why ``from module import attribute`` would fail; None if it works."""
    package = module.partition(".")[0]
    try:
        import_module(package)
    except ModuleNotFoundError as error:
        return f"{package} is not installed" if error.name == package else f"import of {package} fails: {error}"
    except Exception as error:  # a binary built for another torch raises anything
        return f"import of {package} fails: {error}"
    try:
        getattr(import_module(module), attribute)
    except Exception as error:
        return f"import of {module}.{attribute} fails: {error}"
    return None


# --- in every installation --------------------------------------------------------------------------------------------


def _flashtile(case: BenchCase, _device: torch.device) -> AttentionFn:
    return partial(flashtile.attention, causal=case.is_causal)


def _naive(case: BenchCase, device: torch.device) -> AttentionFn:
    """The formula as people write it, with the causal mask made once beforehand, as a module's buffer would be."""
    hidden = None
    if case.is_causal:
        hidden = torch.ones(case.seqlen, case.seqlen, dtype=torch.bool, device=device).triu(1)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if k.shape[1] != q.shape[1]:
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        if hidden is not None:
            scores = scores.masked_fill(hidden, -math.inf)
        return (torch.softmax(scores, dim=-1) @ v).transpose(1, 2)

    return attend


def _naive_scratch_bytes(case: BenchCase) -> int:
    """Score matrices that live at one time: two in the forward; in the backward p, d_p, d_s and one step between."""
    num_copies = 2 if case.direction == "forward" else 4
    return num_copies * case.batch * case.heads_q * case.seqlen**2 * case.torch_dtype.itemsize


def _sdpa(case: BenchCase, _device: torch.device) -> AttentionFn:
    """PyTorch's function as its users call it: transposes as views, heads second."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            is_causal=case.is_causal,
            enable_gqa=case.heads_q != case.heads_kv,
        ).transpose(1, 2)

    return attend


# --- on CUDA GPUs -----------------------------------------------------------------------------------------------------


def _flex(case: BenchCase, device: torch.device) -> AttentionFn:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch.compiler.reset()  # a case has one shape; without this, dynamo gives up specialising after a few cases
    compiled: Any = torch.compile(flex_attention, dynamic=False)
    block_mask = None
    if case.is_causal:
        block_mask = create_block_mask(_sees, None, None, case.seqlen, case.seqlen, device=device.type)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return compiled(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            block_mask=block_mask,
            enable_gqa=case.heads_q != case.heads_kv,
        ).transpose(1, 2)

    return attend


def _sees(_batch: Tensor, _head: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return q_idx >= kv_idx


def _reusable_graph() -> AbstractContextManager[Any]:
    """Lets a compiled backward run more than once; by default it overwrites what the forward saved."""
    settings: Any = import_module("torch._functorch.config")
    return settings.patch(donated_buffer=False)


def _flash_attn(module: str) -> Callable[[BenchCase, torch.device], AttentionFn]:
    """The interface that generations 2, 3 and 4 of flash-attn share; some return (out, lse)."""

    def prepare(case: BenchCase, _device: torch.device) -> AttentionFn:
        function: Callable[..., Any] = import_module(module).flash_attn_func

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            result = function(q, k, v, causal=case.is_causal)
            return result[0] if isinstance(result, tuple) else result

        return attend

    return prepare


def _xformers(case: BenchCase, _device: torch.device) -> AttentionFn:
    ops = import_module("xformers.ops")
    attn_bias = ops.LowerTriangularMask() if case.is_causal else None
    return partial(ops.memory_efficient_attention, attn_bias=attn_bias)


def _restricted_sdpa(name: str, backend: SDPBackend) -> Peer:
    return Peer(name=f"{SDPA}-{name}", prepare=_sdpa, needs_gpu=True, scope=partial(sdpa_kernel, backends=backend))


def _flash_attn_peer(name: str, module: str) -> Peer:
    return Peer(
        name=name,
        prepare=_flash_attn(module),
        requires=(module, "flash_attn_func"),
        needs_gpu=True,
        dtypes=_HALF,
    )


PEERS: tuple[Peer, ...] = (
    Peer(name=FLASHTILE, prepare=_flashtile),
    Peer(name=NAIVE, prepare=_naive, scratch_bytes=_naive_scratch_bytes),
    Peer(name=SDPA, prepare=_sdpa),
    _restricted_sdpa("flash", SDPBackend.FLASH_ATTENTION),
    _restricted_sdpa("cudnn", SDPBackend.CUDNN_ATTENTION),
    _restricted_sdpa("efficient", SDPBackend.EFFICIENT_ATTENTION),
    _restricted_sdpa("math", SDPBackend.MATH),
    Peer(name="flex", prepare=_flex, needs_gpu=True, scope=_reusable_graph),
    _flash_attn_peer("flash-attn-2", "flash_attn"),
    _flash_attn_peer("flash-attn-3", "flash_attn_interface"),
    _flash_attn_peer("flash-attn-4", "flash_attn.cute"),
    Peer(
        name="xformers",
        prepare=_xformers,
        requires=("xformers.ops", "memory_efficient_attention"),
        needs_gpu=True,
        dtypes=(*_HALF, "float32"),
        takes_grouped_heads=False,
    ),
)
"""Every peer, in the order of the tables."""
