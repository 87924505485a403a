"""The drawings in the explanation: what lies in device memory, what one forward moves, and how long that takes."""

from __future__ import annotations

import math
from typing import Any

from flashtile.bench import plots
from flashtile.bench.plots import Bars
from flashtile.spec.accounting import Comparison

METHODS = ("naive formula", "flashtile")


def figures(facts: dict[str, Any]) -> str:
    """HTML of the three figures.

    Args:
        facts: of ``explanation_numbers``.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    forward, problem = facts["forward"], facts["problem"]
    rows = {"q": facts["operand_numbers"], "k": facts["operand_numbers"], "v": facts["operand_numbers"]}
    out, scores = {"out": facts["operand_numbers"]}, {"s": facts["score_numbers"], "p": facts["score_numbers"]}
    drawn = {
        "What lies in device memory (one head; area = how many numbers)": _memory(
            {METHODS[0]: rows | scores | out, METHODS[1]: rows | out | {"lse": problem.seqlen_q}}
        ),
        "What one forward moves": _bytes_moved(forward, facts["score_traffic"]),
        "How long that takes at least": _least_times(forward),
    }
    each = (f"<figure><figcaption>{caption}</figcaption>{figure}</figure>" for caption, figure in drawn.items())
    return f'<div class="figures">{"".join(each)}</div>\n'


def _memory(tensors: dict[str, dict[str, int]]) -> str:
    """A row of squares for each method; a square's area is the number of elements, the style sheet has the scale."""
    largest = max(max(sizes.values()) for sizes in tensors.values())
    rows = []
    for method, sizes in tensors.items():
        squares = "".join(
            f"<li{' class=scores' if size == largest else ''}>"
            f'<i style="--side:{math.sqrt(size / largest):.4f}"></i>{name}</li>'
            for name, size in sizes.items()
        )
        rows.append(f"<div><p>{method}</p><ul>{squares}</ul></div>")
    return f'<div class="memory">{"".join(rows)}</div>'


def _bytes_moved(forward: Comparison, score_traffic: int) -> str:
    totals, of_scores = (forward.naive.traffic_bytes, forward.tiled.traffic_bytes), (score_traffic, 0)
    rest = [total - found for total, found in zip(totals, of_scores, strict=True)]
    return plots.bar_chart(
        [
            Bars(label=label, values=[num_bytes / 2**20 for num_bytes in values])
            for label, values in (("scores", of_scores), ("q, k, v, out", rest))
        ],
        METHODS,
        title="Bytes moved by one forward: naive formula and flashtile",
        x_label="MiB to and from device memory",
        is_stacked=True,
        format_value="{:,.0f}".format,
    )


def _least_times(forward: Comparison) -> str:
    bounds = (forward.naive_time, forward.tiled_time)
    return plots.bar_chart(
        [
            Bars(label="to move the bytes", values=[bound.memory_s * 1e6 for bound in bounds]),
            Bars(label="to multiply", values=[bound.compute_s * 1e6 for bound in bounds]),
        ],
        METHODS,
        title="Least time to move the bytes and to multiply: naive formula and flashtile",
        x_label="µs at peak rates; the longer bar counts",
        format_value="{:,.0f}".format,
    )
