"""Chooses the backend: problem and device in, Plan with its reason out. Imports plans, never kernels."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from flashtile import settings
from flashtile.backends.base import Plan, Planner
from flashtile.backends.cpu import plan as cpu
from flashtile.backends.hopper import plan as hopper
from flashtile.backends.naive import plan as naive
from flashtile.backends.triton import plan as triton
from flashtile.errors import FallbackRefused, UnsupportedProblem, invalid
from flashtile.spec.devices import DeviceSpec
from flashtile.spec.problem import AttentionProblem

BACKENDS: dict[str, Planner] = {"cpu": cpu, "hopper": hopper, "triton": triton, "naive": naive}
"""Every backend, as a rule fastest first; ``auto`` takes the first that does not reject the problem."""


def check_backend(backend: str, *, argument: str = "backend") -> None:
    """Raises InvalidArgument unless ``backend`` is ``auto`` or the name of a backend."""
    if not isinstance(backend, str) or (backend != "auto" and backend not in BACKENDS):
        raise invalid(
            argument,
            got=repr(backend),
            wanted=" or ".join(repr(name) for name in ("auto", *BACKENDS)),
            remedy=f"leave {argument} at 'auto'; flashtile.support_matrix() lists what each backend takes",
        )


def choose(problem: AttentionProblem, device: DeviceSpec, backend: str = "auto") -> Plan:
    """The plan for ``problem`` on ``device``.

    Raises:
        UnsupportedProblem: no backend takes it, or the one that was asked for by name does not.
        FallbackRefused: strict mode is on and only the naive formula takes it.
    """
    backend = resolved(backend)
    plan = _choose(problem, device, backend)
    check_fallback(plan, backend)
    return plan


def resolved(backend: str) -> str:
    """What ``backend`` stands for in this process: the environment may say what ``auto`` means."""
    if backend != "auto":
        return backend
    backend = settings.default_backend()
    check_backend(backend, argument="FLASHTILE_BACKEND")
    return backend


def check_fallback(plan: Plan, backend: str) -> None:
    """Raises FallbackRefused if strict mode is on and ``auto`` has fallen back to the naive formula."""
    if plan.backend == "naive" and resolved(backend) == "auto" and settings.is_strict():
        raise FallbackRefused(
            "FLASHTILE_STRICT=1 refuses the fallback to the naive formula. The other backends decline because:",
            dict(plan.rejected),
        )


def fastest_first(problem: AttentionProblem) -> list[str]:
    """The names of all backends in the order in which ``auto`` asks them."""
    names = list(BACKENDS)
    if {"hopper", "triton"} <= BACKENDS.keys() and hopper.is_slower_than_triton(problem):
        names.remove("hopper")
        names.insert(names.index("triton") + 1, "hopper")
    return names


@lru_cache(maxsize=4096)
def _choose(problem: AttentionProblem, device: DeviceSpec, backend: str) -> Plan:
    rejected: dict[str, tuple[str, ...]] = {}
    for name in fastest_first(problem) if backend == "auto" else [backend]:
        planner = BACKENDS[name]
        reasons = planner.rejects(problem, device)
        if not reasons:
            return replace(planner.plan(problem, device), rejected=tuple(rejected.items()))
        rejected[name] = reasons
    raise UnsupportedProblem(f"No allowed backend takes this problem on {device.name}:", rejected)
