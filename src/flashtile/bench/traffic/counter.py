"""Bytes that a GPU's memory really moved, read from its own counters by Nsight Compute (``ncu``).

torch's profiler knows no such counter. ncu runs a child process that calls each peer on each case once, warm and
between markers, and reports the bytes that each kernel read from and wrote to device memory. Often it is not installed,
or the driver keeps the counters to administrators; then the reason is recorded.
"""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from flashtile.bench import kernels, timing
from flashtile.bench.cases import BenchCase
from flashtile.bench.tensors import CaseTensors
from flashtile.bench.traffic.peers import PEERS
from flashtile.errors import FlashtileError

Job = tuple[BenchCase, str]
"""(case, name of the peer)"""

METRICS = ("dram__bytes_read.sum", "dram__bytes_write.sum")
MAX_S = 240.0
"""Longer than this the counters are not waited for."""
_MARKER = "flashtile-io-"


class CounterUnavailable(FlashtileError):
    """Nobody can read the device's counters here; the text says why."""


def count(jobs: Sequence[Job], device: torch.device) -> tuple[str, dict[Job, int]]:
    """(who counted, bytes read plus written of each job that ran).

    Raises:
        CounterUnavailable: no GPU, no ncu, or it may not read the counters.
    """
    if device.type != "cuda":
        raise CounterUnavailable("a CPU's memory counters are not open to ordinary programs")
    ncu = shutil.which("ncu")
    if ncu is None:
        raise CounterUnavailable("ncu (Nsight Compute) is not installed")
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "ncu.csv"
        options = ["--csv", "--page", "raw", "--print-units", "base", "--nvtx", "--log-file", str(log)]
        options += ["--profile-from-start", "off", "--clock-control", "none", "--cache-control", "none"]
        child = [sys.executable, "-m", "flashtile.bench.traffic.counter"]
        try:
            done = subprocess.run(
                [ncu, *options, "--metrics", ",".join(METRICS), *child],
                input=json.dumps([[asdict(case), peer] for case, peer in jobs]),
                capture_output=True,
                text=True,
                timeout=MAX_S,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise CounterUnavailable(f"ncu: {error}") from error
        report = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    return _version(ncu), _counted(jobs, report, told=f"{report}\n{done.stdout}\n{done.stderr}")


def _counted(jobs: Sequence[Job], report: str, told: str) -> dict[Job, int]:
    found = bytes_of_markers(report.splitlines())
    if not found:
        problem = next((line.strip() for line in told.splitlines() if "ERR" in line.upper()), "it counted nothing")
        raise CounterUnavailable(f"ncu: {problem}")
    return {jobs[idx]: num_bytes for idx, num_bytes in found.items()}


def bytes_of_markers(lines: Iterable[str]) -> dict[int, int]:
    """Bytes of each job by its number, summed over its kernels, from ncu's table of raw values.

    ncu prints messages of its own before the table, a row of units under its heading, and the markers that are in
    force in columns whose names change between versions: any that names one will do.
    """
    rows = csv.DictReader(line for line in lines if line.startswith('"'))
    totals: Counter[int] = Counter()
    for row in rows:
        marker = re.search(_MARKER + r"(\d+)", " ".join(str(value) for value in row.values()))
        if marker is not None:
            totals[int(marker[1])] += sum(int(float(row[metric].replace(",", ""))) for metric in METRICS)
    return dict(totals)


def _version(ncu: str) -> str:
    said = subprocess.run([ncu, "--version"], capture_output=True, text=True, check=False).stdout
    version = re.search(r"Version\s+([\d.]+)", said)
    return f"ncu {version[1]}" if version else "ncu"


# --- the child process ------------------------------------------------------------------------------------------------


def _run_marked(jobs: Sequence[Job], device: torch.device) -> None:
    """Runs each job twice, the second time between markers; who fails is left out."""
    peers = {peer.name: peer for peer in PEERS}
    profiler, nvtx = torch.cuda.profiler, torch.cuda.nvtx
    for idx, (case, name) in enumerate(jobs):
        try:
            tensors = CaseTensors.random(case, device)
            run = kernels.runner(peers[name].prepare(tensors), case.direction, tensors)
            run()
            torch.cuda.synchronize(device)
            marker = nvtx.range_start(f"{_MARKER}{idx}")  # of the process: autograd launches from a thread of its own
            profiler.start()
            run()
            torch.cuda.synchronize(device)
            profiler.stop()
            nvtx.range_end(marker)
        except Exception as error:
            if not timing.is_out_of_memory(error):
                raise
        timing.release_memory()


if __name__ == "__main__":
    _run_marked([(BenchCase(**case), peer) for case, peer in json.load(sys.stdin)], torch.device("cuda"))
