"""The peers: attention as other libraries offer it, each on the same [batch, seqlen, heads, head_dim] tensors."""

from __future__ import annotations

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
from flashtile.bench.cases import DTYPES, OPTIONS, BenchCase, Option
from flashtile.bench.formula import AttentionFn, naive_attention
from flashtile.bench.tensors import CaseTensors

FLASHTILE = "flashtile"
NAIVE = "naive"
SDPA = "sdpa"
SDPA_FLASH = f"{SDPA}-flash"
SDPA_CUDNN = f"{SDPA}-cudnn"
FLEX = "flex"

_HALF = ("float16", "bfloat16")


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """One way to compute attention, and what it is known not to take."""

    name: str
    prepare: Callable[[CaseTensors], AttentionFn]
    """Makes the function to measure; masks and imports happen here, outside the timed part."""
    requires: tuple[str, str] | None = None
    """(module, attribute) that must be importable."""
    needs_gpu: bool = False
    dtypes: tuple[str, ...] = tuple(DTYPES)
    takes_grouped_heads: bool = True
    options: tuple[Option, ...] = tuple(OPTIONS)
    compiles: bool = False
    """Whether the first call for a shape waits for a compiler."""
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
        if case.option not in self.options:
            return f"takes no {case.option} as it is called here"
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


def _flashtile(tensors: CaseTensors) -> AttentionFn:
    return partial(flashtile.attention, **tensors.call_options)


def _naive(tensors: CaseTensors) -> AttentionFn:
    """The formula as people write it, with its mask or bias made once beforehand, as a module's buffer would be."""
    hidden = added = None
    if (mask := tensors.dense_mask) is not None:
        hidden, added = (~mask, None) if mask.dtype == torch.bool else (None, mask)
    return partial(naive_attention, hidden=hidden, added=added)


def _naive_scratch_bytes(case: BenchCase) -> int:
    """Score matrices that live at one time: two in the forward; in the backward p, d_p, d_s and one step between."""
    num_copies = 2 if case.direction == "forward" else 4
    return num_copies * case.batch * case.heads_q * case.seqlen**2 * case.torch_dtype.itemsize


def _sdpa(tensors: CaseTensors) -> AttentionFn:
    """PyTorch's function as its users call it: transposes as views, heads second.

    It takes causality as a flag and everything else as one dense mask, but not both.
    """
    case = tensors.case
    is_plain = case.option == "plain"
    attn_mask = None if is_plain else tensors.dense_mask

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=attn_mask,
            is_causal=is_plain and case.is_causal,
            enable_gqa=case.heads_q != case.heads_kv,
        ).transpose(1, 2)

    return attend


# --- on CUDA GPUs -----------------------------------------------------------------------------------------------------


def _flex(tensors: CaseTensors) -> AttentionFn:
    """FlexAttention compiled for the case's very shape: with dynamic lengths it would check every tile's bounds."""
    from torch.nn.attention.flex_attention import flex_attention

    torch.compiler.reset()  # a case has one shape; without this, dynamo gives up specialising after a few cases
    compiled: Any = torch.compile(flex_attention, dynamic=False)
    options = flex_options(tensors)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return compiled(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), **options).transpose(1, 2)

    return attend


def flex_options(tensors: CaseTensors) -> dict[str, Any]:
    """How ``flex_attention`` is told the case: what is added as a score_mod, what is hidden as a block mask."""
    from torch.nn.attention.flex_attention import and_masks, create_block_mask

    case = tensors.case
    conditions = _flex_conditions(tensors)
    block_mask = None
    if conditions:
        sees = conditions[0] if len(conditions) == 1 else and_masks(*conditions)
        block_mask = create_block_mask(sees, None, None, case.seqlen, case.seqlen, device=str(tensors.device))
    return {
        "score_mod": _flex_score_mod(tensors),
        "block_mask": block_mask,
        "enable_gqa": case.heads_q != case.heads_kv,
    }


def _flex_score_mod(tensors: CaseTensors) -> Callable[..., Tensor] | None:
    if tensors.bias is not None:
        bias = tensors.bias[0]  # [heads_q, seqlen, seqlen]

        def with_bias(score: Tensor, _batch: Tensor, head: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return score + bias[head, q_idx, kv_idx]

        return with_bias
    if tensors.alibi_slopes is not None:
        slopes = tensors.alibi_slopes

        def with_alibi(score: Tensor, _batch: Tensor, head: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return score - slopes[head] * (q_idx - kv_idx).abs()

        return with_alibi
    return None


def _flex_conditions(tensors: CaseTensors) -> list[Callable[..., Tensor]]:
    """The mask_mods that a pair must all satisfy to be seen."""
    conditions: list[Callable[..., Tensor]] = []
    if tensors.case.is_causal:
        conditions.append(lambda _batch, _head, q_idx, kv_idx: q_idx >= kv_idx)
    if tensors.case.window is not None:
        left, right = tensors.case.window
        conditions.append(lambda _batch, _head, q_idx, kv_idx: q_idx - kv_idx <= left)
        if not tensors.case.is_causal:
            conditions.append(lambda _batch, _head, q_idx, kv_idx: kv_idx - q_idx <= right)
    if tensors.mask is not None:
        mask = tensors.mask[0, 0]  # [seqlen, seqlen]
        conditions.append(lambda _batch, _head, q_idx, kv_idx: mask[q_idx, kv_idx])
    return conditions


def _reusable_graph() -> AbstractContextManager[Any]:
    """Lets a compiled backward run more than once; by default it overwrites what the forward saved."""
    settings: Any = import_module("torch._functorch.config")
    return settings.patch(donated_buffer=False)


def _flash_attn(module: str) -> Callable[[CaseTensors], AttentionFn]:
    """The interface that generations 2, 3 and 4 of flash-attn share; some return (out, lse)."""

    def prepare(tensors: CaseTensors) -> AttentionFn:
        function: Callable[..., Any] = import_module(module).flash_attn_func
        options: dict[str, Any] = {"causal": tensors.case.is_causal}
        if tensors.case.window is not None:
            options["window_size"] = tensors.case.window
        if tensors.alibi_slopes is not None:
            options["alibi_slopes"] = tensors.alibi_slopes

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            result = function(q, k, v, **options)
            return result[0] if isinstance(result, tuple) else result

        return attend

    return prepare


def _xformers(tensors: CaseTensors) -> AttentionFn:
    ops = import_module("xformers.ops")
    attn_bias = ops.LowerTriangularMask() if tensors.case.is_causal else None
    return partial(ops.memory_efficient_attention, attn_bias=attn_bias)


def _restricted_sdpa(name: str, backend: SDPBackend, options: tuple[Option, ...] = tuple(OPTIONS)) -> Peer:
    scope = partial(sdpa_kernel, backends=backend)
    return Peer(name=name, prepare=_sdpa, needs_gpu=True, options=options, scope=scope)


def _flash_attn_peer(name: str, module: str, options: tuple[Option, ...]) -> Peer:
    return Peer(
        name=name,
        prepare=_flash_attn(module),
        requires=(module, "flash_attn_func"),
        needs_gpu=True,
        dtypes=_HALF,
        options=options,
    )


PEERS: tuple[Peer, ...] = (
    Peer(name=FLASHTILE, prepare=_flashtile, compiles=True),
    Peer(name=NAIVE, prepare=_naive, scratch_bytes=_naive_scratch_bytes),
    Peer(name=SDPA, prepare=_sdpa),
    _restricted_sdpa(SDPA_FLASH, SDPBackend.FLASH_ATTENTION, options=("plain",)),
    _restricted_sdpa(SDPA_CUDNN, SDPBackend.CUDNN_ATTENTION),
    _restricted_sdpa(f"{SDPA}-efficient", SDPBackend.EFFICIENT_ATTENTION),
    _restricted_sdpa(f"{SDPA}-math", SDPBackend.MATH),
    Peer(name=FLEX, prepare=_flex, needs_gpu=True, compiles=True, scope=_reusable_graph),
    _flash_attn_peer("flash-attn-2", "flash_attn", options=("plain", "alibi", "window")),
    _flash_attn_peer("flash-attn-3", "flash_attn_interface", options=("plain", "window")),
    _flash_attn_peer("flash-attn-4", "flash_attn.cute", options=("plain", "window")),
    Peer(
        name="xformers",
        prepare=_xformers,
        requires=("xformers.ops", "memory_efficient_attention"),
        needs_gpu=True,
        dtypes=(*_HALF, "float32"),
        takes_grouped_heads=False,
        options=("plain",),
    ),
)
"""Every peer, in the order of the tables."""
