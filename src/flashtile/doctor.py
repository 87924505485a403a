"""doctor(): what is installed, which devices are here, which backends work on them, and what is missing."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import platform
import re
import shutil
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Literal

import torch
from torch import Tensor

from flashtile import dispatch, functional, settings
from flashtile.errors import FlashtileError, UnsupportedProblem
from flashtile.spec import devices, units

SETTINGS: dict[str, Callable[[], object]] = {
    "FLASHTILE_BACKEND": lambda: dispatch.check_backend(settings.default_backend(), argument="FLASHTILE_BACKEND"),
    "FLASHTILE_STRICT": settings.is_strict,
    "FLASHTILE_CHECK_VALUES": settings.checks_values_on_gpu,
}
"""Our environment variables and what reads them; a wrong value makes the reader raise."""

_NAMES = ", ".join(SETTINGS)

OTHER_VARIABLES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "OMP_NUM_THREADS", "TRITON_INTERPRET", "CXX")
"""Variables of others that change what we see or how fast we are."""

TOLERANCE = 1e-4
"""Largest error, relative to the largest reference value, of a float32 probe; a wrong kernel misses it by far."""

_TRITON_PACKAGES = ("triton", "triton-windows", "pytorch-triton", "pytorch-triton-rocm")
"""Under one of these names Triton is installed; all are imported as ``triton``."""

Status = Literal["ok", "wrong", "error", "declines"]
"""What a probe came to; a backend declines what it does not take, and that is no failure."""

_SEQLEN, _HEADS_Q, _HEADS_KV, _HEAD_DIM = 48, 4, 2, 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """One tiny attention call, forward and backward, compared with the naive formula in float64 on the CPU."""

    device: str
    backend: str
    options: str
    status: Status
    detail: str

    @property
    def is_failure(self) -> bool:
        return self.status in ("wrong", "error")


@dataclass(frozen=True, slots=True, kw_only=True)
class Variable:
    """An environment variable that is set."""

    name: str
    value: str
    complaint: str = ""
    """What is wrong with it; empty if nothing is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Missing:
    """Something that is not here, what it is for, and how to get it."""

    what: str
    purpose: str
    remedy: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """What ``flashtile.doctor`` found; ``str()`` is readable text, ``to_dict()`` is JSON."""

    versions: tuple[tuple[str, str], ...]
    devices: tuple[tuple[str, str], ...]
    probes: tuple[Probe, ...]
    environment: tuple[Variable, ...]
    missing: tuple[Missing, ...]

    @property
    def is_healthy(self) -> bool:
        """Whether every backend that accepts a probe computed it right, and no setting is wrong."""
        has_complaints = any(variable.complaint for variable in self.environment)
        return not has_complaints and not any(probe.is_failure for probe in self.probes)

    def to_dict(self) -> dict[str, Any]:
        """Everything as dicts, tuples, strings and booleans, ready for JSON."""
        found = dataclasses.asdict(self)
        for field in ("versions", "devices"):
            found[field] = dict(found[field])
        return {**found, "is_healthy": self.is_healthy}

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def doctor() -> Diagnosis:
    """Examines this installation: versions, devices, backends, environment, and what is missing.

    Runs a tiny attention call, forward and backward, with every backend on every device. Never raises: what goes wrong
    is part of the answer.

    Returns:
        Diagnosis. Print it, or read its fields; ``is_healthy`` says whether every probe came out right.

    Example:
        >>> import flashtile
        >>> flashtile.doctor().is_healthy
        True
    """
    probes = tuple(probe for device in _torch_devices() for probe in _probes(device))
    return Diagnosis(
        versions=tuple(_guarded(_versions)),
        devices=tuple(_guarded(_devices)),
        probes=probes,
        environment=tuple(_environment()),
        missing=(*_missing(), *_missing_backends(probes)),
    )


def _guarded(section: Callable[[], Iterator[tuple[str, str]]]) -> Iterator[tuple[str, str]]:
    """The section's lines, and one more if it breaks off."""
    try:
        yield from section()
    except Exception as error:
        yield "broke off", _one_line(error)


def _one_line(error: Exception) -> str:
    """The error in one line; ours speak for themselves, others need their type."""
    text = next(iter(str(error).splitlines()), "")
    if isinstance(error, FlashtileError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


# --- what is here -----------------------------------------------------------------------------------------------------


def _versions() -> Iterator[tuple[str, str]]:
    yield "flashtile", _version("flashtile") or "not installed as a package (running from source)"
    yield "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    yield "torch", str(torch.__version__) + (f", CUDA {torch.version.cuda}" if torch.version.cuda else "")
    yield "triton", next(filter(None, map(_version, _TRITON_PACKAGES)), "not installed")


def _version(package: str) -> str | None:
    """The installed version, without importing the package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _torch_devices() -> list[torch.device]:
    found = [torch.device("cpu")]
    try:
        if torch.cuda.is_available():
            found += [torch.device("cuda", idx) for idx in range(torch.cuda.device_count())]
    except Exception:  # a broken driver must not hide what the CPU can do
        return found
    return found


def _devices() -> Iterator[tuple[str, str]]:
    for device in _torch_devices():
        spec = devices.detect(device)
        if device.type == "cpu":
            yield "cpu", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {_cpu_capability()}"
            continue
        version = f"sm_{''.join(map(str, spec.compute_capability))}" if spec.compute_capability else spec.kind
        entry = "not in the device table, rates are a guess" if spec.is_guess else f"table entry {spec.name}"
        yield (
            str(device),
            f"{torch.cuda.get_device_name(device)}, {version}, {spec.num_sms} SMs, "
            f"{units.in_bytes(spec.memory_bytes)}, {entry}",
        )


def _cpu_capability() -> str:
    return torch.backends.cpu.get_cpu_capability()


def _environment() -> Iterator[Variable]:
    for name in sorted(os.environ):
        if name.startswith("FLASHTILE_") and name not in SETTINGS:
            yield Variable(name=name, value=os.environ[name], complaint=f"no such setting; there are {_NAMES}")
    for name in (*SETTINGS, *OTHER_VARIABLES):
        if name in os.environ:
            yield Variable(name=name, value=os.environ[name], complaint=_complaint(name))


def _complaint(name: str) -> str:
    try:
        SETTINGS.get(name, str)()
    except Exception as error:
        return _one_line(error)
    return ""


# --- which backends work ----------------------------------------------------------------------------------------------


def _probes(device: torch.device) -> Iterator[Probe]:
    for backend in dispatch.BACKENDS:
        for options in ("causal", "every option"):
            status, detail = _probe(device, backend, has_every_option=options != "causal")
            yield Probe(device=str(device), backend=backend, options=options, status=status, detail=detail)


def _probe(device: torch.device, backend: str, *, has_every_option: bool) -> tuple[Status, str]:
    """How one call came out, and in which words."""
    try:
        return _compare(device, backend, has_every_option=has_every_option)
    except UnsupportedProblem as refusal:
        return "declines", "; ".join(reason for reasons in refusal.reasons.values() for reason in reasons)
    except Exception as error:
        return "error", _one_line(error)


def _compare(device: torch.device, backend: str, *, has_every_option: bool) -> tuple[Status, str]:
    """One call against the naive formula in float64 on the CPU."""
    expected = _run(torch.device("cpu"), torch.float64, "naive", has_every_option=has_every_option)
    actual = _run(device, torch.float32, backend, has_every_option=has_every_option)
    worst = 0.0
    for name, reference in expected.items():
        error = (actual[name].to("cpu", torch.float64) - reference).abs().max() / reference.abs().max()
        if not error <= TOLERANCE:  # NaN is wrong too
            return "wrong", f"{name} is off by {float(error):.1e} relative to the naive formula in float64"
        worst = max(worst, float(error))
    return "ok", f"forward and backward, largest relative error {worst:.0e}"


def _run(device: torch.device, dtype: torch.dtype, backend: str, *, has_every_option: bool) -> dict[str, Tensor]:
    """The results and every gradient of the probe; the same numbers whatever the device and dtype."""
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()

    inputs = {
        "q": leaf(1, _SEQLEN, _HEADS_Q, _HEAD_DIM),
        "k": leaf(1, _SEQLEN, _HEADS_KV, _HEAD_DIM),
        "v": leaf(1, _SEQLEN, _HEADS_KV, _HEAD_DIM),
    }
    options: dict[str, Any] = {"causal": True}
    if has_every_option:
        inputs |= {"bias": leaf(1, _HEADS_Q, _SEQLEN, _SEQLEN), "sinks": leaf(_HEADS_Q)}
        mask = torch.rand(_SEQLEN, _SEQLEN, generator=generator) > 0.1
        slopes = torch.rand(_HEADS_Q, generator=generator)
        options |= {"window": (32, 0), "softcap": 10.0, "dropout_p": 0.1, "dropout_seed": 0}
        options |= {"mask": mask.to(device), "alibi_slopes": slopes.to(device, dtype), "deterministic": True}
    with torch.enable_grad():
        if has_every_option:
            out, lse = functional.attention_with_lse(**inputs, **options, backend=backend)
            results = {"out": out, "lse": lse}
        else:  # without a gradient through the lse, which not every kernel has
            results = {"out": functional.attention(**inputs, **options, backend=backend)}
        total = torch.stack([result.square().sum() for result in results.values()]).sum()
        grads = torch.autograd.grad(total, list(inputs.values()))
    results |= {f"the gradient of {name}": grad for name, grad in zip(inputs, grads, strict=True)}
    return {name: result.detach() for name, result in results.items()}


# --- what is missing --------------------------------------------------------------------------------------------------


def _missing() -> Iterator[Missing]:
    for check in (_missing_extras, _missing_compiler, _missing_gpu, _missing_triton):
        yield from _examined(check)


def _examined(check: Callable[[], Iterator[Missing]]) -> Iterator[Missing]:
    """What the check finds missing, and one more entry if it breaks off."""
    try:
        yield from check()
    except Exception as error:
        what = check.__name__.removeprefix("_missing_")
        yield Missing(what=what, purpose="could not be examined", remedy=_one_line(error))


def _missing_extras() -> Iterator[Missing]:
    purposes = {"bench": "flashtile bench and demo", "transformers": "the Hugging Face integration"}
    for extra, purpose in purposes.items():
        absent = [package for package in _packages_of(extra) if _version(package) is None]
        if absent:
            yield Missing(what=", ".join(absent), purpose=purpose, remedy=f"pip install 'flashtile[{extra}]'")


def _packages_of(extra: str) -> list[str]:
    """The packages that an extra of flashtile names, as its metadata has them; none if it runs from source."""
    try:
        requirements = metadata.requires("flashtile") or []
    except metadata.PackageNotFoundError:
        return []
    named = [requirement for requirement in requirements if re.search(rf"extra\s*==\s*['\"]{extra}['\"]", requirement)]
    return [re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0] for requirement in named]


def _missing_compiler() -> Iterator[Missing]:
    candidates = [os.environ.get("CXX", ""), "g++", "clang++", "c++", "cl"]
    if not any(name and shutil.which(name) for name in candidates):
        yield Missing(
            what="a C++ compiler",
            purpose="torch.compile on the CPU",
            remedy="apt install g++, xcode-select --install, or Visual Studio's build tools; flashtile needs none",
        )


def _missing_gpu() -> Iterator[Missing]:
    if torch.cuda.is_available():
        return
    if shutil.which("nvidia-smi") and torch.version.cuda is None:
        yield Missing(
            what="a torch build with CUDA",
            purpose="using this machine's NVIDIA GPU",
            remedy="reinstall torch as https://pytorch.org/get-started/locally shows for CUDA",
        )
        return
    yield Missing(
        what="a GPU that torch can use",
        purpose="speed; everything works on the CPU without one",
        remedy="run on a machine with one; flashtile.explain(..., device='h200') answers from here",
    )


def _missing_triton() -> Iterator[Missing]:
    """Needed where there is a GPU; on a CPU it is of use to debug its kernels only, so it is not missing there."""
    if torch.cuda.is_available() and importlib.util.find_spec("triton") is None:
        yield Missing(
            what="triton",
            purpose="our kernels and torch.compile on GPUs",
            remedy="pip install triton (on Windows: triton-windows); torch's GPU wheels for Linux bring it along",
        )


def _missing_backends(probes: tuple[Probe, ...]) -> Iterator[Missing]:
    """Devices on which the naive formula alone works."""
    for device in dict.fromkeys(probe.device for probe in probes):
        working = {probe.backend for probe in probes if probe.device == device and probe.status == "ok"}
        if working == {"naive"}:
            yield Missing(
                what=f"a tiled backend for {device}",
                purpose="speed and memory; the naive formula serves it meanwhile",
                remedy="see above why no other works; where torch's scaled_dot_product_attention does, prefer it",
            )


# --- as text ----------------------------------------------------------------------------------------------------------


def _lines(found: Diagnosis) -> Iterator[str]:
    environment = [(variable.name, variable.complaint or variable.value) for variable in found.environment]
    for title, pairs in (("Versions", found.versions), ("Devices", found.devices), ("Environment", environment)):
        yield title
        width = max((len(name) for name, _ in pairs), default=0)
        for name, text in pairs or [("none of the variables that matter here is set", "")]:
            yield from _labelled(f"  {name:<{width}}  ", text)
        yield ""
    yield "Backends"
    for probe in found.probes:
        label = f"  {probe.device:<7} {probe.backend:<7} {probe.options:<13} {probe.status:<9} "
        yield from _labelled(label, probe.detail)
    yield ""
    yield "Missing"
    for missing in found.missing:
        yield f"  {missing.what} (for {missing.purpose})"
        yield f"    {missing.remedy}"
    if not found.missing:
        yield "  nothing"
    yield ""
    applied = [probe for probe in found.probes if probe.status != "declines"]
    yield f"{sum(not probe.is_failure for probe in applied)} of {len(applied)} probes passed."
    if any(variable.complaint for variable in found.environment):
        yield "An environment variable is wrong: see Environment."


def _labelled(label: str, text: str) -> list[str]:
    return textwrap.wrap(text, 110, initial_indent=label, subsequent_indent=" " * len(label)) or [label.rstrip()]
