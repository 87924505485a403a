"""Times the first call of a process, forward and backward, with an empty kernel cache and with a filled one.

Each figure is of a fresh process on this machine's GPU: from the call until the GPU is done, head_dim 128, causal,
bfloat16. Importing torch and flashtile and making the tensors come before. Python's bytecode is kept, as it is on an
ordinary machine; where it is not, compiling Python files comes on top.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import torch

import flashtile
from flashtile import ops
from flashtile.bench import environment

BACKENDS = ("auto", "triton")
PARTS = {
    "forward": "forward",
    "imports": "of it importing the kernels, Triton included",
    "triton_hash": "Triton's hash of its own library, which is read from the cache if that is filled",
    "backward": "its backward",
}
"""What a process reports, each in seconds."""
NO_GPU = 2
_SHAPE = (1, 2048, 16, 128)

Report = dict[str, float]


def measure(backend: str) -> Report:
    """The seconds of this process's first call."""
    q, k, v = (torch.randn(_SHAPE, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    d_out = torch.ones_like(q)
    found: Report = {}
    import_module = ops.import_module

    def timed_import(name: str, package: str | None = None) -> ModuleType:
        begin = time.perf_counter()
        module = import_module(name, package)
        found["imports"] = time.perf_counter() - begin
        return module

    ops.import_module = timed_import
    torch.cuda.synchronize()
    begin = time.perf_counter()
    out = flashtile.attention(q, k, v, causal=True, backend=backend)
    torch.cuda.synchronize()
    found["forward"] = time.perf_counter() - begin
    # The first backward of any torch program starts threads and imports sympy; that is not flashtile's.
    q.detach().requires_grad_().mul(2).backward(d_out)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    out.backward(d_out)
    torch.cuda.synchronize()
    found["backward"] = time.perf_counter() - begin
    return found | {"triton_hash": _triton_hash_seconds()}


def _triton_hash_seconds() -> float:
    from triton.runtime.cache import triton_key

    triton_key.cache_clear()
    begin = time.perf_counter()
    triton_key()
    return time.perf_counter() - begin


def in_fresh_process(backend: str, kernels: Path, bytecode: Path) -> Report:
    """What a process with these caches reports."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    variables |= {"TRITON_CACHE_DIR": str(kernels), "PYTHONPYCACHEPREFIX": str(bytecode)}
    command = [sys.executable, __file__, "--in-this-process", backend]
    done = subprocess.run(command, env=variables, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure_all(repeats: int) -> dict[str, dict[str, list[Report]]]:
    """Backend -> cache -> what each process reports."""
    found: dict[str, dict[str, list[Report]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        bytecode = Path(folder) / "bytecode"
        for backend in BACKENDS:
            kernels = Path(folder) / backend
            in_fresh_process(backend, kernels / "uncounted", bytecode)  # writes the bytecode
            found[backend] = {
                "empty": [in_fresh_process(backend, kernels / str(run), bytecode) for run in range(repeats)],
                "filled": [in_fresh_process(backend, kernels / "uncounted", bytecode) for _ in range(repeats)],
            }
    return found


def table(found: dict[str, dict[str, list[Report]]]) -> str:
    """Medians with their ranges, in Markdown."""
    lines = ["| backend | kernel cache | | seconds, median (least to most) |", "|---|---|---|---|"]
    for backend, caches in found.items():
        for cache, reports in caches.items():
            for part, label in PARTS.items():
                seconds = [report[part] for report in reports]
                spread = f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})"
                lines.append(f"| {backend} | {cache} | {label} | {spread} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="processes per backend and cache; default 5")
    parser.add_argument("--json", type=Path, help="file to write every process's figures to")
    parser.add_argument("--in-this-process", choices=BACKENDS, help="measure one backend here and print JSON")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("The first call is timed on a CUDA GPU, and torch sees none on this machine.", file=sys.stderr)
        return NO_GPU
    if args.in_this_process:
        print(json.dumps(measure(args.in_this_process)))
        return 0
    found = measure_all(args.repeats)
    print(table(found))
    if args.json:
        described = asdict(environment.describe(torch.device("cuda")))
        args.json.write_text(json.dumps({"environment": described, "seconds": found}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
