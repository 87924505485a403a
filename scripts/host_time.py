"""Times what an eager call costs the host, beside torch's SDPA: one short sequence, for which the device needs less.

    python scripts/host_time.py
    python scripts/host_time.py --device cpu --seqlen 1 --rounds 5

Each figure is from before the first of some calls until the last one has returned, without waiting for the device,
which is idle before the first; all candidates have a turn in every round. On a CPU the work itself is in it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import flashtile
from flashtile import UnsupportedProblem, dispatch
from flashtile.bench import environment

MODES = ("forward", "forward that records gradients", "forward and backward")
Candidates = dict[str, Callable[[], object]]


def candidates(mode: str, device: torch.device, *, seqlen: int, heads: int, head_dim: int, causal: bool) -> Candidates:
    """Calls of flashtile by each backend that takes them, and of torch's SDPA."""
    shape = (1, seqlen, heads, head_dim)
    q, k, v, d_out = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(4))
    records = mode != MODES[0]
    ours = [tensor.requires_grad_(records) for tensor in (q, k, v)]
    theirs = [tensor.detach().transpose(1, 2).requires_grad_(records) for tensor in (q, k, v)]

    def call(attend: Callable[[], Tensor], inputs: list[Tensor], upstream: Tensor) -> object:
        out = attend()
        return torch.autograd.grad(out, inputs, upstream) if mode == MODES[2] else out

    found: Candidates = {}
    for backend in ("auto", *dispatch.BACKENDS):
        attend = partial(flashtile.attention, *ours, causal=causal, backend=backend)
        try:
            attend()
        except UnsupportedProblem:
            continue
        found[backend] = partial(call, attend, ours, d_out)
    sdpa = partial(scaled_dot_product_attention, *theirs, is_causal=causal)
    return found | {"sdpa": partial(call, sdpa, theirs, d_out.transpose(1, 2))}


def measure(calls: Candidates, device: torch.device, *, num_rounds: int, num_calls: int) -> dict[str, list[float]]:
    """Candidate -> microseconds of a call, in each round."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for round_idx in range(-2, num_rounds):  # two to warm up, in which short ways are found
        for name in calls if round_idx % 2 else reversed(calls):
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            begin = time.perf_counter()
            for _ in range(num_calls):
                calls[name]()
            if round_idx >= 0:
                found[name].append((time.perf_counter() - begin) / num_calls * 1e6)
    return found


def table(found: dict[str, dict[str, list[float]]]) -> str:
    """Medians with the least, in Markdown."""
    names = list(found[MODES[0]])
    lines = [f"| microseconds, median (least) | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for mode, times in found.items():
        cells = [f"{statistics.median(times[name]):.1f} ({min(times[name]):.1f})" for name in names]
        lines.append(f"| {mode} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    usual_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=torch.device, default=usual_device, help="default: the GPU if there is one")
    parser.add_argument("--seqlen", type=int, default=128, help="tokens; default 128")
    parser.add_argument("--heads", type=int, default=16, help="default 16")
    parser.add_argument("--head-dim", type=int, default=128, help="default 128")
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--rounds", type=int, default=25, help="default 25")
    parser.add_argument("--calls", type=int, default=50, help="in each round; default 50")
    parser.add_argument("--json", type=Path, help="file to write every round's figures to")
    args = parser.parse_args(argv)
    sizes = {"seqlen": args.seqlen, "heads": args.heads, "head_dim": args.head_dim, "causal": args.causal}
    found = {
        mode: measure(candidates(mode, args.device, **sizes), args.device, num_rounds=args.rounds, num_calls=args.calls)
        for mode in MODES
    }
    print(table(found))
    if args.json:
        described = asdict(environment.describe(args.device))
        args.json.write_text(json.dumps({"environment": described, "call": sizes, "us": found}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
