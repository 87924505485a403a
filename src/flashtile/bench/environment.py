"""On what a benchmark ran: device, versions, commit, date. Only what a reader needs to judge the figures."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

import flashtile
from flashtile.errors import InvalidArgument
from flashtile.spec import units

_PEER_MODULES = ("triton", "flash_attn", "flash_attn_interface", "xformers")


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """The machine and software of one run, as it is written into the results file."""

    device: str
    """``cpu`` or ``cuda``."""
    device_name: str
    num_threads: int
    """Threads that torch uses on the host."""
    platform: str
    versions: dict[str, str]
    """python, torch, flashtile, and of triton, CUDA, cuDNN and the peers those that are there."""
    commit: str | None
    """Of the checkout that flashtile was imported from; outside of one what the caller said, or None."""
    commit_is_dirty: bool
    """Whether the package has changes on top of the commit."""


def find_device(name: str) -> torch.device:
    """The device for ``auto`` (a GPU if there is one), ``cpu`` or ``cuda``.

    Raises:
        InvalidArgument: ``cuda`` where torch sees no GPU.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise InvalidArgument(
            "--device",
            got="cuda, but torch sees no GPU",
            wanted="a device of this machine",
            remedy="use --device cpu; 'flashtile doctor' says what is missing for a GPU",
        )
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def describe(device: torch.device, *, commit: str | None = None) -> Environment:
    """The environment of this process and a device; ``commit`` is believed where git knows none."""
    found, is_dirty = _commit()
    return Environment(
        device=device.type,
        device_name=torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_model(),
        num_threads=torch.get_num_threads(),
        platform=f"{platform.system()} {platform.machine()}",
        versions=_versions(),
        commit=found or commit,
        commit_is_dirty=is_dirty,
    )


def available_bytes(device: torch.device) -> int | None:
    """Memory that can still be taken on a device, what torch keeps for reuse included; None if unknown."""
    if device.type != "cuda":
        return available_host_bytes()
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def lack_of_memory(needed: int, device: torch.device) -> str | None:
    """Why something that takes ``needed`` bytes at least need not be tried; None if it may fit.

    On a CPU, trying would not raise an error but could end the whole process.
    """
    available = available_bytes(device)
    if available is None or needed <= available:
        return None
    return f"needs at least {units.in_bytes(needed)}, {units.in_bytes(available)} are free: not tried"


def available_host_bytes() -> int | None:
    """Memory that can still be taken on the host, by the kernel's and the control group's account; None if unknown."""
    limits = [_meminfo_available_bytes(), _cgroup_available_bytes()]
    return min((limit for limit in limits if limit is not None), default=None)


def _meminfo_available_bytes() -> int | None:
    for line in _text_of("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _cgroup_available_bytes() -> int | None:
    limit, used = (_text_of(f"/sys/fs/cgroup/memory.{name}").strip() for name in ("max", "current"))
    return int(limit) - int(used) if limit.isdigit() and used.isdigit() else None


def _cpu_model() -> str:
    for line in _text_of("/proc/cpuinfo").splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            return f"{model}, {os.cpu_count()} CPUs"
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs"


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "torch": torch.__version__, "flashtile": flashtile.__version__}
    distributions = metadata.packages_distributions()
    for module in _PEER_MODULES:
        for distribution in distributions.get(module, ())[:1]:
            versions[module] = metadata.version(distribution)
    if torch.version.cuda is not None:
        versions["cuda"] = torch.version.cuda
    if torch.backends.cudnn.is_available():
        versions["cudnn"] = str(torch.backends.cudnn.version())
    return versions


def _commit() -> tuple[str | None, bool]:
    """The commit of the checkout that holds this very file; a package installed inside some other checkout has none."""
    here = Path(__file__)
    if not _git(here.parent, "ls-files", here.name):
        return None, False
    return _git(here.parent, "rev-parse", "HEAD"), bool(_git(here.parents[1], "status", "--porcelain", "--", "."))


def _git(folder: Path, *arguments: str) -> str | None:
    """What git prints, None if it says nothing, fails or is not there."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def _text_of(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
