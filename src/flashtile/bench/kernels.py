"""``bench kernels``: one attention call, every peer, case by case."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import partial

import torch
from torch import Tensor

from flashtile import dispatch
from flashtile.backends.base import Plan
from flashtile.bench import environment, timing
from flashtile.bench.baselines import FLASHTILE, NAIVE, SDPA, Peer
from flashtile.bench.cases import BenchCase, Direction
from flashtile.bench.checking import TOLERATED_DIFFERENCE, Checker
from flashtile.bench.formula import AttentionFn
from flashtile.bench.results import Ceilings, KernelResults, KernelRow
from flashtile.bench.tensors import CaseTensors
from flashtile.bench.timing import Candidate, Clock, Failure, Timing
from flashtile.spec import devices
from flashtile.testing.memory import peak_extra_bytes

_MAX_REASON = 500


def start(
    cases: Sequence[BenchCase],
    peers: Sequence[Peer],
    device: torch.device,
    clock: Clock,
    *,
    budget_s: float,
    commit: str | None = None,
) -> KernelResults:
    """The results before the first case: environment, ceilings, and who is missing altogether.

    ``commit`` is what to record where the package lies outside of its checkout.
    """
    missing: dict[str, str] = {}
    for peer in peers:
        reasons = {peer.unavailable_reason(case, device) for case in cases}
        if len(reasons) == 1 and (reason := reasons.pop()) is not None:
            missing[peer.name] = reason
    return KernelResults(
        environment=environment.describe(device, commit=commit),
        created_utc=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        budget_s=budget_s,
        ceilings=Ceilings(
            matmul_tflops={
                case.dtype: timing.matmul_ceiling_tflops(case.torch_dtype, device, clock)
                for case in {case.dtype: case for case in cases}.values()
            },
            copy_gb_per_s=timing.copy_ceiling_gb_per_s(device, clock),
        ),
        missing_peers=missing,
        is_complete=False,
        rows=(),
    )


def run(
    results: KernelResults,
    cases: Sequence[BenchCase],
    peers: Sequence[Peer],
    device: torch.device,
    clock: Clock,
    *,
    min_rounds: int,
    on_progress: Callable[[BenchCase, float], None] = lambda _case, _share: None,
) -> Iterator[KernelResults]:
    """Measures case after case and yields the results with each finished case's rows added.

    Args:
        results: from ``start``.
        cases, peers, device, clock: as given to ``start``.
        min_rounds: for each case, even if that takes longer than ``results.budget_s``.
        on_progress: called now and then with the running case and the share of it that is done.
    """
    present = [peer for peer in peers if peer.name not in results.missing_peers]
    for case_idx, case in enumerate(cases):
        on_progress(case, 0.0)
        rows = _rows_of_case(
            case,
            present,
            device,
            clock,
            results,
            min_rounds=min_rounds,
            on_round=partial(on_progress, case),
        )
        results = replace(results, rows=results.rows + rows, is_complete=case_idx == len(cases) - 1)
        yield results


# --- one case ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _FirstCall:
    """What a peer's first, untimed calls showed."""

    peak_bytes: int
    difference: float | None


def _rows_of_case(
    case: BenchCase,
    peers: Sequence[Peer],
    device: torch.device,
    clock: Clock,
    results: KernelResults,
    *,
    min_rounds: int,
    on_round: Callable[[float], None],
) -> tuple[KernelRow, ...]:
    rows, candidates, first_calls = _try_all(case, peers, device)
    timings = timing.measure(candidates, clock, budget_s=results.budget_s, min_rounds=min_rounds, on_round=on_round)
    for name, timed in timings.items():
        if isinstance(timed, Failure):
            rows[name] = KernelRow(case=case, peer=name, status=timed.status, reason=timed.reason)
        else:
            rows[name] = _measured_row(case, name, timings, first_calls[name], results.ceilings, device)
    return tuple(rows[peer.name] for peer in peers)


def _try_all(
    case: BenchCase, peers: Sequence[Peer], device: torch.device
) -> tuple[dict[str, KernelRow], dict[str, Candidate], dict[str, _FirstCall]]:
    """Rows of the peers that cannot be timed; candidates and first calls of those that can."""
    rows: dict[str, KernelRow] = {}
    candidates: dict[str, Candidate] = {}
    first_calls: dict[str, _FirstCall] = {}
    try:
        tensors = CaseTensors.random(case, device)
    except Exception as error:
        if not timing.is_out_of_memory(error):
            raise
        reason = "the inputs alone do not fit"
        rows = {
            peer.name: KernelRow(case=case, peer=peer.name, status="out_of_memory", reason=reason) for peer in peers
        }
        return rows, candidates, first_calls
    checker = Checker()
    # flashtile first, because the others are checked against it; then those that leave most memory to the next
    for peer in sorted(peers, key=lambda peer: (peer.name != FLASHTILE, peer.scratch_bytes(case))):
        outcome = _try(peer, tensors, checker)
        if isinstance(outcome, KernelRow):
            rows[peer.name] = outcome
            timing.release_memory()
        else:
            candidates[peer.name], first_calls[peer.name] = outcome
    return rows, candidates, first_calls


def _try(peer: Peer, tensors: CaseTensors, checker: Checker) -> KernelRow | tuple[Candidate, _FirstCall]:
    """What the peer refuses, what memory it takes, and whether its result is right."""
    case, device = tensors.case, tensors.device
    row = partial(KernelRow, case=case, peer=peer.name)
    if (reason := peer.unavailable_reason(case, device)) is not None:
        return row(status="unavailable", reason=reason)
    if (reason := environment.lack_of_memory(peer.scratch_bytes(case), device)) is not None:
        return row(status="out_of_memory", reason=reason)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            with peer.scope():
                attend = peer.prepare(tensors)
                candidate = Candidate(run=runner(attend, case.direction, tensors), scope=peer.scope)
                difference = checker.difference(peer.name, candidate.run())
                # A backward's cost includes what the forward leaves for it.
                whole = "forward" if case.direction == "forward" else "forward+backward"
                peak_bytes = peak_extra_bytes(runner(attend, whole, tensors), device)
        except Exception as error:
            failure = Failure.of(error)
            explained = failure.reason
            if failure.status == "refused":  # torch says in warnings why it has no kernel
                explained = "; ".join([failure.reason, *_reasons_in(said)])
            return row(status=failure.status, reason=explained[:_MAX_REASON])
    if (fault := checker.fault(difference, TOLERATED_DIFFERENCE[case.dtype])) is not None:
        return row(status="wrong_result", reason=fault, difference=difference)
    return candidate, _FirstCall(peak_bytes=peak_bytes, difference=difference)


def _reasons_in(said: Sequence[warnings.WarningMessage]) -> list[str]:
    """What torch warned about, without source positions, headings, and the kernels that a peer's scope disabled."""
    texts = [" ".join(str(warning.message).partition("(Triggered internally")[0].split()) for warning in said]
    return [text for text in texts if not text.endswith(("because:", "runtime disabled."))]


def runner(attend: AttentionFn, direction: Direction, tensors: CaseTensors) -> Callable[[], tuple[Tensor, ...]]:
    """The call to measure. For ``backward`` the forward runs here, once, and its graph is kept."""
    q, k, v, d_out = tensors.q, tensors.k, tensors.v, tensors.d_out
    if direction == "forward":
        return lambda: (attend(q, k, v),)
    if direction == "forward+backward":
        return lambda: torch.autograd.grad(attend(q, k, v), (q, k, v), d_out)
    out = attend(q, k, v)
    return lambda: torch.autograd.grad(out, (q, k, v), d_out, retain_graph=True)


def _measured_row(
    case: BenchCase,
    name: str,
    timings: Mapping[str, Timing | Failure],
    first_call: _FirstCall,
    ceilings: Ceilings,
    device: torch.device,
) -> KernelRow:
    timed = timings[name]
    assert isinstance(timed, Timing), "the caller sorted the failures out"
    tflops = case.flops / (timed.median_ms * 1e-3) / 1e12
    plan = dispatch.choose(case.problem, devices.detect(device)) if name == FLASHTILE else None
    return KernelRow(
        case=case,
        peer=name,
        status="ok",
        timing=timed,
        tflops=tflops,
        percent_of_ceiling=100 * tflops / ceilings.matmul_tflops[case.dtype],
        peak_extra_bytes=first_call.peak_bytes,
        difference=first_call.difference,
        speedup_over_naive=timing.speedup(timed, timings.get(NAIVE)),
        speedup_over_sdpa=timing.speedup(timed, timings.get(SDPA)),
        kernel=None if plan is None else _kernel_name(plan, case.direction),
        kernel_reason=None if plan is None else plan.reason,
    )


def _kernel_name(plan: Plan, direction: Direction) -> str:
    """For example ``cpu/tiled``, and ``cpu/torch_fused+tiled`` where forward and backward differ."""
    kernels = {
        "forward": [plan.forward.kernel],
        "backward": [plan.backward.kernel],
        "forward+backward": [plan.forward.kernel, plan.backward.kernel],
    }[direction]
    return f"{plan.backend}/{'+'.join(dict.fromkeys(kernels))}"
