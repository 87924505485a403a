"""What every backend has in common: the Plan it makes and the two entry points its ``launch.py`` offers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from flashtile.spec.devices import DeviceSpec
from flashtile.spec.operands import Operands
from flashtile.spec.problem import AttentionProblem


@dataclass(frozen=True, slots=True, kw_only=True)
class TileConfig:
    """Rows of Q and of K/V that one step works on."""

    block_q: int
    block_kv: int


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelPlan:
    """One direction (forward or backward) of a plan."""

    kernel: str
    """The kernel's name within its backend."""
    tiles: TileConfig
    grid: tuple[int, ...]
    """Independent programs; on a CPU, the iterations of the outer loops."""
    shared_memory_bytes: int
    """Fast memory one program needs: shared memory on a GPU; on a CPU, the cached tiles."""
    reason: str
    companions: tuple[KernelPlan, ...] = ()
    """Further kernels that the same direction launches, each with its own tiles."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Which backend runs a problem, with which kernels, and why."""

    backend: str
    forward: KernelPlan
    backward: KernelPlan
    reason: str
    rejected: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """(backend, its reasons) for every backend that was asked first and declined."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """What the forward leaves for the backward: linear in the sequence length."""

    out: Tensor
    lse: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Gradients:
    """Gradients of the operands; a field is set exactly if its name is in ``problem.gradients``."""

    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    bias: Tensor | None = None
    sinks: Tensor | None = None


class Planner(Protocol):
    """``backends/<name>/plan.py``: decides and explains, and imports no kernel."""

    def rejects(self, problem: AttentionProblem, device: DeviceSpec) -> tuple[str, ...]:
        """Why this backend does not take the problem on that device; empty if it does."""
        ...

    def plan(self, problem: AttentionProblem, device: DeviceSpec) -> Plan:
        """The plan for a problem that ``rejects`` has nothing against."""
        ...


class Launcher(Protocol):
    """``backends/<name>/launch.py``: the two entry points, the same for every backend."""

    def forward(self, problem: AttentionProblem, operands: Operands, plan: Plan) -> tuple[Tensor, Tensor]:
        """(out, lse), of ``problem.out_shape`` and ``problem.lse_shape``."""
        ...

    def backward(
        self,
        problem: AttentionProblem,
        operands: Operands,
        saved: Saved,
        d_out: Tensor | None,
        d_lse: Tensor | None,
        plan: Plan,
    ) -> Gradients:
        """The gradients that ``problem.gradients`` names; a missing ``d_out`` or ``d_lse`` stands for zeros."""
        ...
