"""The choice of a backend: the first that does not decline, with reasons, never silently."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import flashtile
from flashtile import FallbackRefused, InvalidArgument, UnsupportedProblem, dispatch, ops, repeats
from flashtile.backends.base import KernelPlan, Plan, TileConfig
from flashtile.spec import devices
from flashtile.spec.devices import DeviceSpec
from flashtile.spec.problem import AttentionProblem

PROBLEM = AttentionProblem(
    batch=1,
    seqlen_q=16,
    seqlen_kv=16,
    tokens_q=16,
    tokens_kv=16,
    heads_q=2,
    heads_kv=2,
    head_dim=8,
    head_dim_v=8,
    dtype=torch.float32,
    scale=0.25,
)
CPU = devices.DEVICES["cpu"]
UNKNOWN = devices.detect(torch.device("meta"))
"""A device that no backend but the naive formula knows."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StubPlanner:
    """A planner with fixed reasons."""

    name: str
    reasons: tuple[str, ...] = ()

    def rejects(self, problem: AttentionProblem, device: DeviceSpec) -> tuple[str, ...]:
        assert isinstance(problem, AttentionProblem) and isinstance(device, DeviceSpec)
        return self.reasons

    def plan(self, problem: AttentionProblem, device: DeviceSpec) -> Plan:
        assert not self.rejects(problem, device), "only a backend that accepts is asked for a plan"
        kernel = KernelPlan(
            kernel="stub", tiles=TileConfig(block_q=1, block_kv=1), grid=(1,), shared_memory_bytes=0, reason="stub"
        )
        return Plan(backend=self.name, forward=kernel, backward=kernel, reason="stub")


@pytest.fixture(autouse=True)
def neutral_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FLASHTILE_BACKEND", "FLASHTILE_STRICT", "FLASHTILE_CHECK_VALUES"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def stub_backends(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    planners = (
        StubPlanner(name="fastest", reasons=("too wide", "too deep")),
        StubPlanner(name="fast", reasons=("no dropout",)),
        StubPlanner(name="slow"),
        StubPlanner(name="slowest"),
        StubPlanner(name="naive"),
    )
    dispatch._choose.cache_clear()
    monkeypatch.setattr(dispatch, "BACKENDS", {planner.name: planner for planner in planners})
    yield
    dispatch._choose.cache_clear()


@pytest.mark.usefixtures("stub_backends")
class TestOrder:
    def test_auto_takes_the_first_that_accepts_and_keeps_the_reasons_of_the_others(self) -> None:
        plan = dispatch.choose(PROBLEM, CPU)
        assert plan.backend == "slow"
        assert plan.rejected == (("fastest", ("too wide", "too deep")), ("fast", ("no dropout",)))

    def test_a_backend_named_by_the_caller_is_the_only_one_asked(self) -> None:
        plan = dispatch.choose(PROBLEM, CPU, "slowest")
        assert (plan.backend, plan.rejected) == ("slowest", ())

    def test_a_named_backend_that_declines_is_not_replaced(self) -> None:
        with pytest.raises(UnsupportedProblem) as caught:
            dispatch.choose(PROBLEM, CPU, "fastest")
        assert caught.value.reasons == {"fastest": ("too wide", "too deep")}
        assert "fastest: too wide; too deep" in str(caught.value)
        assert CPU.name in caught.value.headline

    def test_the_environment_says_what_auto_means(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FLASHTILE_BACKEND", "slowest")
        assert dispatch.choose(PROBLEM, CPU).backend == "slowest"
        assert dispatch.choose(PROBLEM, CPU, "slow").backend == "slow"
        monkeypatch.setenv("FLASHTILE_BACKEND", "fast")
        with pytest.raises(UnsupportedProblem, match="fast: no dropout"):
            dispatch.choose(PROBLEM, CPU)

    def test_every_backend_declining_lists_all_reasons(self, monkeypatch: pytest.MonkeyPatch) -> None:
        planners = {name: StubPlanner(name=name, reasons=(f"{name} is shut",)) for name in ("one", "two")}
        monkeypatch.setattr(dispatch, "BACKENDS", planners)
        with pytest.raises(UnsupportedProblem) as caught:
            dispatch.choose(PROBLEM, CPU)
        assert caught.value.reasons == {"one": ("one is shut",), "two": ("two is shut",)}


def test_the_naive_formula_is_the_last_resort_and_declines_nothing() -> None:
    assert list(dispatch.BACKENDS)[-1] == "naive"
    for device in (*devices.DEVICES.values(), UNKNOWN):
        assert dispatch.BACKENDS["naive"].rejects(PROBLEM, device) == ()


def test_each_backend_is_planned_under_its_own_name() -> None:
    plainest = dataclasses.replace(PROBLEM, dtype=torch.bfloat16)
    for name, planner in dispatch.BACKENDS.items():
        accepted = [device for device in devices.DEVICES.values() if not planner.rejects(plainest, device)]
        assert accepted, f"{name} accepts the plainest problem on no device of the table"
        assert dispatch.choose(plainest, accepted[0], name).backend == name


def test_a_cpu_problem_goes_to_the_cpu_backend_with_a_reason() -> None:
    plan = dispatch.choose(PROBLEM, CPU)
    assert plan.backend == "cpu"
    assert plan.reason and plan.forward.reason and plan.backward.reason


def test_the_cpu_backend_declines_gpus_and_says_so() -> None:
    with pytest.raises(UnsupportedProblem, match=r"cpu: .*CPU tensors") as caught:
        dispatch.choose(PROBLEM, devices.DEVICES["h200"], "cpu")
    assert set(caught.value.reasons) == {"cpu"}
    assert "h200" in str(caught.value)


def test_a_fallback_to_naive_is_on_record() -> None:
    plan = dispatch.choose(PROBLEM, UNKNOWN)
    assert plan.backend == "naive"
    rejected = dict(plan.rejected)
    assert set(rejected) == set(dispatch.BACKENDS) - {"naive"}
    assert all(reasons for reasons in rejected.values())


def test_strict_mode_refuses_the_fallback_with_the_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    fallback = dispatch.choose(PROBLEM, UNKNOWN)
    monkeypatch.setenv("FLASHTILE_STRICT", "1")
    with pytest.raises(FallbackRefused) as caught:  # a plan that is already cached is refused too
        dispatch.choose(PROBLEM, UNKNOWN)
    assert caught.value.reasons == dict(fallback.rejected)
    assert "FLASHTILE_STRICT" in str(caught.value)
    monkeypatch.setenv("FLASHTILE_STRICT", "0")
    assert dispatch.choose(PROBLEM, UNKNOWN) == fallback


def test_strict_mode_lets_pass_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHTILE_STRICT", "1")
    assert dispatch.choose(PROBLEM, UNKNOWN, "naive").backend == "naive"
    assert dispatch.choose(PROBLEM, CPU).backend == "cpu"
    monkeypatch.setenv("FLASHTILE_BACKEND", "naive")
    assert dispatch.choose(PROBLEM, UNKNOWN).backend == "naive"


def test_a_broken_strict_flag_is_an_error_and_not_a_guess(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHTILE_STRICT", "maybe")
    with pytest.raises(InvalidArgument, match="FLASHTILE_STRICT"):
        dispatch.choose(PROBLEM, UNKNOWN)


def test_an_unknown_backend_in_the_environment_is_blamed_on_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHTILE_BACKEND", "nonsense")
    with pytest.raises(InvalidArgument, match="nonsense") as caught:
        flashtile.attention(*torch.zeros(3, 1, 4, 1, 8).unbind())
    assert caught.value.argument == "FLASHTILE_BACKEND"
    assert "FLASHTILE_BACKEND" in caught.value.remedy


def test_the_environment_reaches_the_public_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHTILE_BACKEND", "naive")
    monkeypatch.setattr(dispatch.BACKENDS["cpu"], "rejects", refuse_to_be_asked)
    q, k, v = torch.randn(3, 1, 5, 1, 8).unbind()
    assert flashtile.attention(q, k, v).shape == q.shape


def refuse_to_be_asked(problem: AttentionProblem, device: DeviceSpec) -> tuple[str, ...]:
    raise AssertionError(f"asked about {problem} on {device}")


@pytest.mark.parametrize("backend", ["nonsense", "", "CPU", "hopper2", " cpu", None, 3, b"cpu", ["cpu"], ("cpu",), {}])
def test_an_unknown_backend_is_a_wrong_argument_that_lists_the_known(backend: object) -> None:
    with pytest.raises(InvalidArgument) as caught:
        dispatch.check_backend(backend)  # pyright: ignore[reportArgumentType] -- the point of the test
    assert caught.value.argument == "backend"
    assert all(repr(name) in caught.value.wanted for name in ("auto", *dispatch.BACKENDS))


@pytest.mark.parametrize("backend", ["auto", *dispatch.BACKENDS])
def test_known_backends_pass(backend: str) -> None:
    dispatch.check_backend(backend)


class TestPreparedCalls:
    """Calls of shapes and options that came before are looked up; what the lookup must not forget."""

    def test_the_environment_still_decides_between_two_equal_calls(self, monkeypatch: pytest.MonkeyPatch) -> None:
        ran: list[str] = []
        for name in ("cpu", "naive"):
            launcher = importlib.import_module(f"flashtile.backends.{name}.launch")
            monkeypatch.setattr(launcher, "forward", recording(launcher.forward, name, ran))
        q, k, v = torch.randn(3, 1, 5, 1, 8).unbind()
        for backend in ("auto", "naive", "cpu", ""):
            monkeypatch.setenv("FLASHTILE_BACKEND", backend)
            flashtile.attention(q, k, v)
        assert ran == ["cpu", "naive", "cpu", "cpu"]

    def test_strict_mode_still_refuses_a_call_that_came_before(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ops, "_prepared", {})
        monkeypatch.setattr(repeats, "_known", {})
        monkeypatch.setattr(dispatch.BACKENDS["cpu"], "rejects", lambda *_: ("not today",))
        q, k, v = torch.randn(3, 1, 6, 1, 8).unbind()
        dispatch._choose.cache_clear()
        try:
            assert flashtile.attention(q, k, v).shape == q.shape
            monkeypatch.setenv("FLASHTILE_STRICT", "1")
            with pytest.raises(FallbackRefused):
                flashtile.attention(q, k, v)
        finally:
            dispatch._choose.cache_clear()

    def test_equal_calls_share_one_entry_and_the_number_of_entries_is_bounded(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        prepared: dict[Any, Any] = {}
        monkeypatch.setattr(ops, "_prepared", prepared)
        monkeypatch.setattr(repeats, "_known", {})
        monkeypatch.setattr(ops, "_MAX_PREPARED", 3)
        for seqlen in (4, 4, 5, 4):
            flashtile.attention(*torch.randn(3, 1, seqlen, 1, 8).unbind())
        assert len(prepared) == 2
        for seqlen in range(1, 20):
            flashtile.attention(*torch.randn(3, 1, seqlen, 1, 8).unbind())
        assert 1 <= len(prepared) <= 3


def recording(function: Callable[..., Any], name: str, ran: list[str]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        ran.append(name)
        return function(*args)

    return run
