"""What the three benchmarks record: ``KernelResults``, ``ModelResults`` and ``IoResults``, and how any is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, TypeVar, overload

from flashtile.bench import documents
from flashtile.bench.cases import BenchCase
from flashtile.bench.documents import Document
from flashtile.bench.models.cases import LimitCase, ModelCase
from flashtile.bench.timing import Timing

Status = Literal["ok", "unavailable", "refused", "out_of_memory", "wrong_result"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One peer on one case. Whatever is measured is None unless the status is ok."""

    peer: str
    status: Status
    reason: str | None = None
    """Why there is no timing; None exactly if the status is ok."""
    timing: Timing | None = None

    def __post_init__(self) -> None:
        if (self.status == "ok") == (self.timing is None):
            raise ValueError(f"has status {self.status} and timing {self.timing}, but has a timing exactly if ok")


# --- bench kernels ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings:
    """What the device reached in the same run: large square matrix products, and a large copy."""

    matmul_tflops: dict[str, float]
    """By dtype, in 10**12 FLOP/s."""
    copy_gb_per_s: float
    """10**9 bytes/s, read plus written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelRow(Row):
    """One peer on one attention call."""

    case: BenchCase
    tflops: float | None = None
    """Useful operations of the case (``BenchCase.flops``) over the median."""
    percent_of_ceiling: float | None = None
    """``tflops`` against the measured matrix product in the case's dtype."""
    peak_extra_bytes: int | None = None
    """Most memory held at one time beyond inputs. Of the direction's own call; for ``backward``, of forward and
    backward together, because what the forward leaves for the backward is its cost too."""
    difference: float | None = None
    """Largest difference from flashtile's result, or if it failed from the first peer's that is there, over that
    result's largest magnitude. Files of before the option axis have it from the naive formula's."""
    speedup_over_naive: float | None = None
    """Median of the naive formula over this median: above 1 is faster. None if naive has no timing."""
    speedup_over_sdpa: float | None = None
    kernel: str | None = None
    """Of flashtile rows: backend and kernel, for example ``cpu/tiled``."""
    kernel_reason: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelResults(Document):
    """One run of ``flashtile bench kernels``."""

    benchmark: ClassVar[str] = "kernels"
    version: ClassVar[int] = 1

    ceilings: Ceilings
    missing_peers: dict[str, str]
    """Peers that take none of the cases on this machine, with the reason; they have no rows."""
    rows: tuple[KernelRow, ...]

    @property
    def backends(self) -> list[str]:
        """Those that ran flashtile's rows."""
        return sorted({row.kernel.split("/")[0] for row in self.rows if row.kernel is not None})


# --- bench models -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRow(Row):
    """One attention function in one whole model: a training step, a prefill, or one more token."""

    case: ModelCase
    peak_bytes: int | None = None
    """Most memory held at one time, ``state_bytes`` included."""
    state_bytes: int | None = None
    """What is held between two steps: weights, the optimizer's sums, the cache of keys and values, the inputs."""
    attention_share: float | None = None
    """Of the time, 0 to 1: from the begin to the end of each attention call, forward and backward, summed over the
    layers, in runs of their own. What lies between the calls (projections, rotary positions) does not count."""
    attention_ms: float | None = None
    """That share of the median."""
    difference: float | None = None
    """As in ``KernelRow``, of what the whole model computes."""
    speedup_over_naive: float | None = None
    """Median of the naive formula over this median: above 1 is faster. None if naive has no timing."""
    speedup_over_sdpa: float | None = None
    memory_ratio_to_naive: float | None = None
    """Peak of the naive formula over this peak: above 1 is less memory."""

    @property
    def amdahl_limit(self) -> float | None:
        """How many times as fast the model could be if its attention took no time at all."""
        return None if self.attention_share is None else 1 / max(1 - self.attention_share, 1e-9)


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitRow:
    """The largest batch, or the longest sequence, whose training step fits into memory with one attention function."""

    case: LimitCase
    peer: str
    status: Literal["tried", "extrapolated", "failed"]
    """``tried``: steps of ``largest`` ran and steps of ``too_large``, if the search came so far, ran out of memory.
    ``extrapolated``: from the peaks of small steps to ``memory_bytes``; nothing so large was tried."""
    reason: str | None = None
    """Why it failed."""
    largest: int | None = None
    """0 if not even the smallest fits."""
    too_large: int | None = None
    """The smallest that was tried in vain, None if the time was up before. The truth is between it and ``largest``."""
    memory_bytes: int | None = None
    """What there was for the whole step, ``state_bytes`` included; None if unknown."""

    def __post_init__(self) -> None:
        if (self.status == "failed") == (self.largest is not None):
            raise ValueError(f"has status {self.status} and largest {self.largest}, but has none exactly if failed")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelResults(Document):
    """One run of ``flashtile bench models``."""

    benchmark: ClassVar[str] = "models"
    version: ClassVar[int] = 1

    rows: tuple[ModelRow, ...]
    limits: tuple[LimitRow, ...]


# --- bench io ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class IoRow(Row):
    """What one attention call moves between the processor and its memory."""

    case: BenchCase
    predicted: dict[str, int]
    """Bytes by what they are for, in the order of the computation, from ``flashtile.spec.accounting``. There also
    where nothing could be measured."""
    counted_bytes: int | None = None
    """Read plus written, from the device's own counters. None where no profiler can read them."""
    bound_bytes: int | None = None
    """The median time at the rate of a large copy: the call moved no more than this. An upper bound, and a loose one
    where arithmetic sets the time."""

    @property
    def predicted_bytes(self) -> int:
        return sum(self.predicted.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class IoResults(Document):
    """One run of ``flashtile bench io``."""

    benchmark: ClassVar[str] = "io"
    version: ClassVar[int] = 1

    copy_gb_per_s: float
    """10**9 bytes/s, read plus written, of a large copy in the same run."""
    counter: str | None
    """Who read the device's counters, for example ``ncu 2025.3``; None if nobody could."""
    no_counter_reason: str | None
    """Why nobody could."""
    rows: tuple[IoRow, ...]


# --- reading any of them ----------------------------------------------------------------------------------------------

AnyRow = KernelRow | ModelRow | IoRow
Results = KernelResults | ModelResults | IoResults
KINDS = (KernelResults, ModelResults, IoResults)
D = TypeVar("D", bound=Document)


@overload
def load(path: Path) -> Results: ...
@overload
def load(path: Path, kind: type[D]) -> D: ...
def load(path: Path, kind: type[Document] | None = None) -> Document:
    """Reads and checks a results file: of ``kind``, or of whichever kind its schema names.

    Raises:
        InvalidResults: as ``documents.load``.
    """
    return documents.load(path, KINDS if kind is None else (kind,))
