"""A soak of random problems: runs them for some minutes, forward and backward, and compares each with the oracle.

    python scripts/soak.py --backend hopper --minutes 30
    TRITON_INTERPRET=1 python scripts/soak.py --device cpu --backend triton --longest 50

out, lse and every gradient must be within the error budget of ``flashtile.testing``, and the forward must give the same
bits again. Problems come in mixes: those of one mix share what kernels are compiled for (dtype, head sizes, strides,
which options there are), and differ in lengths, heads, scale, windows and numbers; some have few queries and many keys.
Calls that the backend declines are counted.

Each problem has a seed of its own, SEED.MIX.NUMBER, which stands in the log before the problem runs; ``--only`` runs it
alone, given the same ``--device`` and ``--longest``. A problem that hangs ends the process, with every thread's stack.
"""

from __future__ import annotations

import argparse
import faulthandler
import shlex
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from random import Random, randrange
from typing import TextIO

import torch
from torch import Tensor

import flashtile
from flashtile import UnsupportedProblem, dispatch, settings, testing
from flashtile.testing import Call, CallSpec, Results, draw_spec

LOG = Path(__file__).resolve().parent.parent / "out" / "soak.log"
USUAL_HEAD_DIMS = (64, 128, 256)
"""Half of the mixes have one of these, the others any head sizes up to the largest."""
DRAWN_EVERY_TIME = (
    *("lengths_q", "lengths_kv", "unused_rows", "unused_length", "heads_kv", "heads_per_kv"),
    *("spread", "scale", "bias_hides", "mask_shows", "seed"),
)
"""The fields of a ``CallSpec`` that no kernel is compiled for; how far a window reaches comes on top."""
EDGES = sorted({0, 1, 2} | {block + offset for block in range(16, 257, 16) for offset in (-1, 0, 1)})
"""Sequence lengths around tiles of any backend."""
FEW_QUERIES_RATE, MOST_FEW_QUERIES = 0.15, 100
"""So many of the dense problems have few queries and up to four times the longest keys: Hopper takes those in parts."""
REPEATS = 2
"""The second call of a kind takes a shorter way to the kernel than the first, and the third a shorter one still."""
MOST_MISMATCHES = 10
"""After an illegal memory access nothing runs any more."""
STATUS_EVERY_S = 5.0
OK, MISMATCH, NOT_HERE = 0, 1, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A call, and which of its results have a gradient."""

    seed: str
    spec: CallSpec
    has_d_out: bool
    has_d_lse: bool


def draw(seed: str, longest: int) -> Problem:
    """The problem of a seed: the first two of its three numbers decide the mix, all three the rest."""
    mix_rng, rng = Random(seed.rpartition(".")[0]), Random(seed)
    # Triton's interpreter multiplies bfloat16 as if its bits were integers.
    dtypes = [dtype for dtype in testing.DTYPES if not (settings.interprets_triton() and dtype == torch.bfloat16)]
    mix = draw_spec(mix_rng, dtypes=dtypes, max_head_dim=max(USUAL_HEAD_DIMS))
    if mix_rng.random() < 0.5:
        head_dim = mix_rng.choice(USUAL_HEAD_DIMS)
        mix = replace(mix, head_dim=head_dim, head_dim_v=head_dim)
    has_d_out, has_d_lse = mix_rng.choice(((True, True), (True, True), (True, False), (False, True)))

    edges = [length for length in EDGES if length <= longest]
    lengths = [*edges, *(rng.randint(0, longest) for _ in edges)]
    drawn = draw_spec(rng, lengths=lengths, layouts=("packed",) if mix.is_packed else ("dense",))
    spec = replace(mix, **{name: getattr(drawn, name) for name in DRAWN_EVERY_TIME})
    if mix.window is not None:
        left, right = (None if side is None else rng.choice((side, rng.randint(0, longest))) for side in mix.window)
        spec = replace(spec, window=(left, right))
    if not spec.is_packed and rng.random() < FEW_QUERIES_RATE:
        few, many = rng.randint(1, MOST_FEW_QUERIES), rng.randint(longest, 4 * longest)
        batch = len(spec.lengths_q)
        spec = replace(spec, lengths_q=(few,) * batch, lengths_kv=(many,) * batch)
    return Problem(seed=seed, spec=spec, has_d_out=has_d_out, has_d_lse=has_d_lse)


def attend(call: Call, backend: str, *, has_d_lse: bool) -> tuple[Tensor, Tensor]:
    """(out, lse); without a gradient of the lse, out as the function returns it that other kernels may serve."""
    with_lse = flashtile.attention_varlen_with_lse if call.is_packed else flashtile.attention_with_lse
    out, lse = with_lse(call.q, call.k, call.v, backend=backend, **call.options)
    if not has_d_lse:
        without_lse = flashtile.attention_varlen if call.is_packed else flashtile.attention
        out = without_lse(call.q, call.k, call.v, backend=backend, **call.options)
    return out, lse


def check(problem: Problem, backend: str, device: torch.device) -> None:
    """Raises AssertionError if a result is not within its budget, or has other bits when it is computed again."""
    call = problem.spec.build(device)
    d_out, d_lse = problem.spec.build_upstream(device)
    d_out, d_lse = d_out if problem.has_d_out else None, d_lse if problem.has_d_lse else None
    inputs = call.differentiable
    for tensor in inputs.values():
        tensor.requires_grad_()
    with testing.poisoned_allocations():
        runs = [attend(call, backend, has_d_lse=problem.has_d_lse) for _ in range(1 + REPEATS)]
        *_, gradients = (gradients_of(results, (d_out, d_lse), inputs) for results in runs)  # came the shortest way
    (out, lse), *repeats = runs
    found = Results(out=out.detach(), lse=lse.detach(), gradients=gradients)
    # The CPU's products of 16-bit tiles have 16-bit results.
    scores_dtype = problem.spec.dtype if device.type == "cpu" else torch.float32
    testing.assert_results_within_budget(
        found, call, d_out=d_out, d_lse=d_lse, is_small=True, scores_dtype=scores_dtype
    )
    for repeat in repeats:
        for name, first, again in zip(("out", "lse"), (out, lse), repeat, strict=True):
            num_others = int((_bytes(first) != _bytes(again)).sum())
            assert num_others == 0, f"{name}: {num_others} bytes differ when the forward runs again"


def gradients_of(
    results: tuple[Tensor, Tensor], upstreams: tuple[Tensor | None, Tensor | None], inputs: dict[str, Tensor]
) -> dict[str, Tensor]:
    """By name, from the upstream gradients that there are."""
    used = [pair for pair in zip(results, upstreams, strict=True) if pair[1] is not None]
    outputs, given = zip(*used, strict=True)
    return dict(zip(inputs, torch.autograd.grad(outputs, list(inputs.values()), given), strict=True))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().flatten().contiguous().view(torch.uint8)


@dataclass(slots=True, kw_only=True)
class Soak:
    """Where problems run, and what came of them."""

    backend: str
    device: torch.device
    longest: int
    hang_s: float
    log: TextIO
    begin: float = field(default_factory=time.monotonic)
    num_problems: int = 0
    num_mixes: int = 0
    num_declined: int = 0
    mismatches: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{time.monotonic() - self.begin:.0f} s: {self.num_problems} problems in {self.num_mixes} mixes,"
            f" {self.num_declined} declined, {len(self.mismatches)} mismatches"
        )

    def run(self, seed: str) -> bool:
        """Checks one problem and counts it; returns whether the backend took it."""
        problem = draw(seed, self.longest)
        self.log.write(f"{problem}\n")
        faulthandler.dump_traceback_later(self.hang_s, exit=True)
        try:
            check(problem, self.backend, self.device)
        except UnsupportedProblem:
            self.num_declined += 1
            return False
        except Exception as error:
            what = str(error) if isinstance(error, AssertionError) else traceback.format_exc().rstrip()
            place = ["--device", str(self.device), "--backend", self.backend, "--longest", str(self.longest)]
            command = shlex.join(["python", "scripts/soak.py", *place, "--only", seed])
            self.mismatches.append(f"{problem}\n  {what}\n  again: {command}")
            print(f"MISMATCH: {self.mismatches[-1]}", flush=True)
        finally:
            faulthandler.cancel_dump_traceback_later()
        self.num_problems += 1
        return True

    def run_mixes(self, seed: int, *, per_mix: int, seconds: float) -> None:
        """Mix after mix until the time is over or too much is wrong; one whose first problem is declined ends there."""
        last_status = self.begin
        for mix_idx in count():
            for problem_idx in range(per_mix):
                now = time.monotonic()
                if now > self.begin + seconds or len(self.mismatches) >= MOST_MISMATCHES:
                    return
                if now > last_status + STATUS_EVERY_S:
                    print(self, flush=True)
                    last_status = now
                is_taken = self.run(f"{seed}.{mix_idx}.{problem_idx}")
                if problem_idx == 0 and not is_taken:
                    break
                self.num_mixes += problem_idx == 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="default 10")
    parser.add_argument("--backend", choices=("auto", *dispatch.BACKENDS), default="auto", help="default auto")
    usual_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=torch.device, default=usual_device, help="default: the GPU if there is one")
    parser.add_argument("--longest", type=int, help="longest sequence; default 2000 on a GPU, 300 on a CPU")
    parser.add_argument("--per-mix", type=int, default=20, help="problems that share compiled kernels; default 20")
    parser.add_argument("--seed", type=int, default=randrange(10**6), help="default: a random one, which is printed")
    parser.add_argument("--only", metavar="SEED.MIX.NUMBER", help="run the one problem of this seed")
    parser.add_argument("--hang-s", type=float, default=120.0, help="seconds until a problem is a hang; default 120")
    parser.add_argument("--log", type=Path, default=LOG, help="file for each problem's seed; default out/soak.log")
    args = parser.parse_args(argv)
    if args.longest is None:
        args.longest = 300 if args.device.type == "cpu" else 2000
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    plain = flashtile.explain(
        seqlen_q=1, heads_q=1, head_dim=64, dtype=torch.float16, backend=args.backend, device=args.device
    )
    if plain.plan is None:
        reasons = next(verdict.reasons for verdict in plain.verdicts if verdict.backend == args.backend)
        print(f"{args.backend}: {'; '.join(reasons)}", file=sys.stderr)
        return NOT_HERE
    args.log.parent.mkdir(parents=True, exist_ok=True)
    with args.log.open("w", buffering=1) as log:
        soak = Soak(backend=args.backend, device=args.device, longest=args.longest, hang_s=args.hang_s, log=log)
        place = f"on {plain.device.name} with backend {args.backend}"
        print(f"Seed {args.only or args.seed}, {place}; each problem is in {args.log} before it runs.", flush=True)
        try:
            if args.only:
                soak.run(args.only)
            else:
                soak.run_mixes(args.seed, per_mix=args.per_mix, seconds=60 * args.minutes)
        except KeyboardInterrupt:
            print("Interrupted.")
    print("\n".join([str(soak), *soak.mismatches]))
    return MISMATCH if soak.mismatches else OK


if __name__ == "__main__":
    sys.exit(main())
