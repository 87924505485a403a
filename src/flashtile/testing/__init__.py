"""Tools for testing attention kernels: a float64 oracle, error budgets, input makers, a memory meter."""

from flashtile.testing.inputs import DTYPES, CallSpec, cu_seqlens_of, draw_spec, make_tensor
from flashtile.testing.memory import peak_extra_bytes, poisoned_allocations
from flashtile.testing.oracle import Call, Results, oracle, reference
from flashtile.testing.rounding import rounding_errors
from flashtile.testing.tolerances import assert_results_within_budget, assert_within_budget

__all__ = [
    "DTYPES",
    "Call",
    "CallSpec",
    "Results",
    "assert_results_within_budget",
    "assert_within_budget",
    "cu_seqlens_of",
    "draw_spec",
    "make_tensor",
    "oracle",
    "peak_extra_bytes",
    "poisoned_allocations",
    "reference",
    "rounding_errors",
]
