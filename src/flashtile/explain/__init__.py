"""explain(): what would run, why, what it costs, what was rejected and why, and where it will not be faster."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, overload

import torch
from torch import Tensor

from flashtile import dispatch
from flashtile.backends.base import Plan
from flashtile.errors import InvalidArgument, UnsupportedProblem
from flashtile.explain import remarks, text, tilings
from flashtile.spec import accounting, devices, sizes, units, validation
from flashtile.spec.accounting import Comparison, Direction, Lengths
from flashtile.spec.devices import DeviceSpec
from flashtile.spec.operands import Operands
from flashtile.spec.problem import AttentionProblem


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendVerdict:
    """What one backend says to the problem."""

    backend: str
    is_chosen: bool
    reasons: tuple[str, ...]
    """Why it declines; empty if it takes the problem."""
    is_slower: bool = False
    """Whether ``auto`` asks it later than as a rule: a backend behind it is the faster one for so short a problem."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """What ``flashtile.explain`` found; ``str()`` is readable text, ``to_dict()`` is JSON."""

    problem: AttentionProblem
    device: DeviceSpec
    plan: Plan | None
    """What would run; None if nothing that is allowed takes the problem, and ``refusal`` says why."""
    refusal: str | None
    verdicts: tuple[BackendVerdict, ...]
    costs: tuple[Comparison, ...]
    """Forward, and backward if a gradient is wanted."""
    copies: tuple[str, ...]
    """Whole operands that the chosen backend copies before it computes."""
    not_faster: tuple[str, ...]
    """Why tiles gain little or nothing here, as far as the numbers show."""
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything as dicts, lists, strings, numbers and None, with the derived totals."""
        return text.as_json(self)

    def __str__(self) -> str:
        return "\n".join(text.lines(self))


@overload
def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = ...,
    window: tuple[int | None, int | None] | None = ...,
    scale: float | None = ...,
    softcap: float = ...,
    bias: Tensor | None = ...,
    mask: Tensor | None = ...,
    alibi_slopes: Tensor | None = ...,
    sinks: Tensor | None = ...,
    dropout_p: float = ...,
    dropout_seed: int | Tensor | None = ...,
    deterministic: bool = ...,
    backend: str = ...,
    with_lse: bool = ...,
    cu_seqlens_q: Tensor | None = ...,
    cu_seqlens_kv: Tensor | None = ...,
    max_seqlen_q: int | None = ...,
    max_seqlen_kv: int | None = ...,
    device: str | torch.device | DeviceSpec | None = ...,
) -> Explanation: ...


@overload
def explain(
    *,
    batch: int = ...,
    seqlen_q: int,
    seqlen_kv: int | None = ...,
    heads_q: int,
    heads_kv: int | None = ...,
    head_dim: int,
    head_dim_v: int | None = ...,
    dtype: torch.dtype = ...,
    causal: bool = ...,
    window: tuple[int | None, int | None] | None = ...,
    scale: float | None = ...,
    softcap: float = ...,
    bias_shape: Sequence[int] | None = ...,
    mask_shape: Sequence[int] | None = ...,
    has_alibi: bool = ...,
    has_sinks: bool = ...,
    dropout_p: float = ...,
    deterministic: bool = ...,
    gradients: Iterable[str] = ...,
    backend: str = ...,
    with_lse: bool = ...,
    device: str | torch.device | DeviceSpec | None = ...,
) -> Explanation: ...


def explain(
    q: Tensor | None = None,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    backend: str = "auto",
    with_lse: bool = False,
    device: str | torch.device | DeviceSpec | None = None,
    **call: Any,
) -> Explanation:
    """Says what a call would run, why, what it costs and what declined it, without running it.

    Two forms. With tensors it takes what ``attention`` takes, or ``attention_varlen`` if ``cu_seqlens_q`` is given.
    With sizes alone it allocates nothing and needs none of the hardware.

    Args:
        q, k, v and every option of ``attention`` or ``attention_varlen``: the tensor form.
        batch: default 1. The rest down to ``gradients`` is the form with sizes alone.
        seqlen_q, seqlen_kv: tokens of queries and of keys; seqlen_kv defaults to seqlen_q.
        heads_q, heads_kv: heads_kv defaults to heads_q.
        head_dim, head_dim_v: head_dim_v defaults to head_dim.
        dtype: default torch.bfloat16.
        causal, window, scale, softcap, dropout_p, deterministic: as for ``attention``.
        bias_shape, mask_shape: shapes of an additive bias and of a boolean mask; default none.
        has_alibi, has_sinks: whether there are ALiBi slopes and sinks; default False.
        gradients: names out of "q", "k", "v", "bias", "sinks"; default q, k, v; () for inference.
        with_lse: explain ``attention_with_lse``, whose lse may receive a gradient; default False.
        backend: as for ``attention``.
        device: a name of the table such as "h200", a torch device of this machine, or a DeviceSpec; default: where the
            tensors are, and with sizes alone this machine's GPU, or its CPU if it has none.

    Returns:
        Explanation. Print it, or read its fields. If nothing takes the problem, its plan is None.

    Raises:
        InvalidArgument: a wrong argument, as ``attention`` would raise it.

    Reads the values of ``cu_seqlens``, so on a GPU it synchronises.

    Example:
        >>> import flashtile
        >>> flashtile.explain(seqlen_q=16384, heads_q=16, head_dim=128, causal=True, device="cpu").plan.backend
        'cpu'
    """
    dispatch.check_backend(backend)
    if q is None and k is None and v is None:
        problem, operands = sizes.pose(with_lse=with_lse, **call), None
        spec = _device_spec(device, default="cuda" if torch.cuda.is_available() else "cpu")
    else:
        problem, operands = _pose_tensors(q, k, v, with_lse=with_lse, **call)
        spec = _device_spec(device, default=operands.q.device)
    return _explain(problem, operands, spec, backend)


# --- the two forms of the call ----------------------------------------------------------------------------------------


def _pose_tensors(
    q: Any,
    k: Any,
    v: Any,
    *,
    with_lse: bool,
    causal: bool = False,
    window: Sequence[int | None] | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    deterministic: bool = False,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_kv: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_kv: int | None = None,
) -> tuple[AttentionProblem, Operands]:
    """Poses the tensors of a call; packed ones are known by their boundaries."""
    validation.check_flag("with_lse", with_lse)
    packing = (cu_seqlens_q, cu_seqlens_kv, max_seqlen_q, max_seqlen_kv)
    return validation.check_call(
        q,
        k,
        v,
        causal=causal,
        window=window,
        scale=scale,
        softcap=softcap,
        bias=bias,
        mask=mask,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        dropout_p=dropout_p,
        dropout_seed=0 if dropout_seed is None else dropout_seed,  # explaining draws nothing from torch's generator
        deterministic=deterministic,
        wants_lse=with_lse,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_kv=cu_seqlens_kv,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_kv=max_seqlen_kv,
        is_packed=any(argument is not None for argument in packing),
    )


def _device_spec(device: Any, *, default: str | torch.device) -> DeviceSpec:
    device = default if device is None else device
    if isinstance(device, DeviceSpec):
        return device
    if isinstance(device, str) and device.split(":")[0] != "cuda":
        return devices.by_name(device)
    if not isinstance(device, (str, torch.device)):
        raise InvalidArgument(
            "device",
            got=repr(device),
            wanted="a name, a torch.device or a DeviceSpec",
            remedy="pass for example device='h200'",
        )
    try:
        return devices.detect(torch.device(device))
    except (RuntimeError, AssertionError, ValueError) as error:  # torch's words for a GPU that is not there
        raise InvalidArgument(
            "device",
            got=repr(str(device)),
            wanted=f"a device of this machine ({str(error).splitlines()[0]})",
            remedy="name an entry of the device table instead: " + ", ".join(devices.DEVICES),
        ) from None


def _lengths(problem: AttentionProblem, operands: Operands) -> Lengths | None:
    if operands.cu_seqlens_q is None or operands.cu_seqlens_kv is None or operands.q.device.type == "meta":
        return None
    validation.check_values(problem, operands)
    lengths_q, lengths_kv = (
        [end - begin for begin, end in pairwise(cu_seqlens.tolist())]
        for cu_seqlens in (operands.cu_seqlens_q, operands.cu_seqlens_kv)
    )
    return tuple(zip(lengths_q, lengths_kv, strict=True))


# --- the answer -------------------------------------------------------------------------------------------------------


def _explain(problem: AttentionProblem, operands: Operands | None, device: DeviceSpec, backend: str) -> Explanation:
    lengths = None if operands is None else _lengths(problem, operands)
    plan, refusal = None, None
    try:
        plan = dispatch.choose(problem, device, backend)
    except UnsupportedProblem as error:
        refusal = error.headline
    directions: tuple[Direction, ...] = ("forward", "backward") if problem.gradients else ("forward",)
    costs = tuple(
        accounting.compare(problem, direction, tilings.tiling(problem, device, plan, direction), device, lengths)
        for direction in directions
    )
    return Explanation(
        problem=problem,
        device=device,
        plan=plan,
        refusal=refusal,
        verdicts=tuple(
            BackendVerdict(
                backend=name,
                is_chosen=plan is not None and plan.backend == name,
                reasons=dispatch.BACKENDS[name].rejects(problem, device),
                is_slower=place > list(dispatch.BACKENDS).index(name),
            )
            for place, name in enumerate(dispatch.fastest_first(problem))
        ),
        costs=costs,
        copies=_copies(problem, plan, operands),
        not_faster=tuple(remarks.not_faster(problem, device, plan, costs[0])),
        notes=tuple(remarks.notes(problem, device, plan, costs, are_lengths_known=lengths is not None)),
    )


def _copies(problem: AttentionProblem, plan: Plan | None, operands: Operands | None) -> tuple[str, ...]:
    """Our kernels read any strides in place; torch's fused op needs a last stride of 1; naive copies in any case."""
    if plan is None:
        return ()
    if plan.forward.kernel == "torch_fused" and operands is not None:
        strides = {name: getattr(operands, name).stride(-1) for name in ("q", "k", "v")}
        return tuple(f"{name}, as its last stride is {stride}" for name, stride in strides.items() if stride != 1)
    if plan.backend == "naive":
        dtype = units.dtype_name(problem.accumulation_dtype)
        repeated = f"k and v in {dtype}, once for each query head"
        return (repeated,) if problem.dtype == problem.accumulation_dtype else (f"q in {dtype}", repeated)
    return ()
