"""What results of ``bench models`` say, in sentences."""

from __future__ import annotations

from flashtile.bench.baselines import FLASHTILE, SDPA
from flashtile.bench.models.cases import MODES
from flashtile.bench.models.claims import pairs
from flashtile.bench.results import ModelResults
from flashtile.bench.summary import machine

WHAT_A_GPU_ADDS = (
    "With a GPU: small, medium and large models in bfloat16 up to 16,384 tokens, among them the training steps that "
    "people quote, and limits of memory that are tried instead of extrapolated."
)


def conditions(results: ModelResults) -> list[str]:
    """Where and how it was measured, and what the figures count."""
    modes = [f"{mode} is {what}." for mode, what in MODES.items() if any(row.case.mode == mode for row in results.rows)]
    return [
        machine(results.environment),
        f"Plain PyTorch without torch.compile or CUDA graphs; about {results.budget_s:g} s for each case.",
        *modes,
        "MB are 10**6 bytes, the most held at one time: weights, optimizer, cache, inputs, and all that a step makes. "
        "The share is that of the attention calls in the time; the limit is Amdahl's, were they free.",
    ]


def findings(results: ModelResults) -> list[str]:
    """Where flashtile makes a model slower, and what this run leaves open."""
    lines = []
    compared = pairs(results)
    for mode in MODES:
        of_mode = [pair for pair in compared if pair.case.mode == mode]
        slower = [pair for pair in of_mode if pair.speedup < 1]
        if slower:
            worst = min(slower, key=lambda pair: pair.speedup)
            lines.append(
                f"{mode}: slower than the naive formula in {len(slower)} of {len(of_mode)} cases; at worst "
                f"{worst.speedup:.2f}x its speed ({worst.case.label})."
            )
    behind = [
        row
        for row in results.rows
        if row.peer == FLASHTILE and row.speedup_over_sdpa is not None and row.speedup_over_sdpa < 1
    ]
    if behind:
        worst = min(behind, key=lambda row: row.speedup_over_sdpa or 0.0)
        num_compared = sum(row.peer == FLASHTILE and row.speedup_over_sdpa is not None for row in results.rows)
        lines.append(
            f"Behind {SDPA} in {len(behind)} of {num_compared} cases; at worst {worst.speedup_over_sdpa:.2f}x its "
            f"speed ({worst.case.label})."
        )
    if results.environment.device == "cpu":
        lines.append(WHAT_A_GPU_ADDS)
    if not results.is_complete:
        lines.append("The run was interrupted: only the finished cases are here.")
    return lines
