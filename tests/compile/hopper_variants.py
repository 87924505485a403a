"""Compiles the Hopper kernels for a GPU that is not there, and tells what they need and what ptxas made of them.

    python hopper_variants.py SET...     prints one JSON object per kernel of each variant in the sets

It goes through the launcher, with a driver that only knows the target: what is compiled is what would be launched.
"""

from __future__ import annotations

import io
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from absent_gpu import cuobjdump, needs, pretend
from triton import knobs
from triton.runtime.jit import JITFunction

from flashtile.backends import relaunch
from flashtile.backends.base import Plan, Saved
from flashtile.backends.hopper import launch, plan
from flashtile.backends.launcher import KernelLauncher
from flashtile.spec import devices, validation
from flashtile.spec.operands import Operands
from flashtile.spec.problem import AttentionProblem
from flashtile.testing import CallSpec

H200 = devices.by_name("h200")
PLAIN = CallSpec(
    lengths_q=(256, 256), lengths_kv=(256, 256), heads_kv=4, head_dim=128, head_dim_v=128, dtype=torch.bfloat16
)
NARROW = replace(PLAIN, head_dim=64, head_dim_v=64)
EVERYTHING: dict[str, Any] = {
    "window": (100, 0),
    "softcap": 30.0,
    "alibi": "per sequence",
    "has_sinks": True,
    "heads_per_kv": 2,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "window": {"window": (100, 20)},
    "softcap": {"softcap": 30.0},
    "ALiBi": {"alibi": "per head", "causal": True},
    "sinks, grouped heads": {"has_sinks": True, "heads_per_kv": 2},
    "float16": {"dtype": torch.float16},
    "head_dim 192 with 128": {"head_dim": 192, "causal": True},
    "head_dim 40 with 100": {"head_dim": 40, "head_dim_v": 100},
}
"""Each compiled dense, with heads of 128 where it does not say otherwise."""


ENOUGH = 16
"""So many sequences that the backward has no reason to split its tiles."""


def tables() -> dict[str, CallSpec]:
    """A plain call for each row of the two tile tables."""
    found: dict[str, CallSpec] = {}
    for (width, is_causal), forward in sorted(plan._FORWARD.items()):
        spec = replace(PLAIN, head_dim=width, head_dim_v=width, causal=is_causal)
        backward = plan._BACKWARD[plan.backward_kernel(validated(spec)[0]), is_causal]
        shortest = 2  # to a single query, causal is full
        for longest in sorted({longest for longest, _ in (*forward, *backward)}):
            name = f"{width}, {'causal' if is_causal else 'full'}, from {shortest}"
            found[name] = replace(spec, lengths_q=(shortest,) * ENOUGH, lengths_kv=(shortest,) * ENOUGH)
            shortest = longest + 1
    return found


def packed(**options: Any) -> dict[str, CallSpec]:
    """Packed sequences at each width, with the options as far as the backend takes them."""
    found: dict[str, CallSpec] = {}
    for width in sorted({width for width, _ in plan._FORWARD}):
        spec = replace(PLAIN, head_dim=width, head_dim_v=width, lengths_q=(100, 156), is_packed=True, **options)
        found[f"{width}, packed"] = taken(spec)
    return found


def taken(spec: CallSpec) -> CallSpec:
    """The call without a softcap, if the backend has no backward with it."""
    return replace(spec, softcap=0.0) if plan.rejects(validated(spec)[0], H200) else spec


def split(**options: Any) -> dict[str, CallSpec]:
    """Few queries and many keys at each width: heads as rows, and rows that see fewer keys than others."""
    found: dict[str, CallSpec] = {}
    for width in sorted({width for width, _ in plan._FORWARD}):
        spec = replace(PLAIN, head_dim=width, head_dim_v=width, lengths_q=(1,), lengths_kv=(2100,))
        if options:
            found[f"{width}, split"] = taken(replace(spec, lengths_q=(9,), **options))
        else:
            found[f"{width}, split, one query"] = replace(spec, heads_per_kv=4)
            found[f"{width}, split, causal"] = replace(spec, lengths_q=(9,), causal=True)
    return found


def split_queries() -> dict[str, CallSpec]:
    """So few keys and heads that the backward splits its tiles, which each of its kernels does."""
    found: dict[str, CallSpec] = {}
    for width in sorted({width for width, _ in plan._FORWARD}):
        spec = replace(PLAIN, head_dim=width, head_dim_v=width, lengths_q=(1100,), lengths_kv=(200,))
        found[f"{width}, full, split queries"] = spec
        found[f"{width}, causal, split queries"] = replace(spec, lengths_kv=(1100,), causal=True)
        options = EVERYTHING | {"window": (900, 0)}
        found[f"{width}, options, split queries"] = taken(replace(spec, lengths_kv=(1100,), **options))
    return found


def long() -> dict[str, CallSpec]:
    """A packed call that has the two loops of the backward for narrow heads."""
    spec = replace(NARROW, lengths_q=(2000,), lengths_kv=(2000,), is_packed=True)
    return {"64, long, left window": replace(spec, window=(100, None))}


def lengths() -> dict[str, CallSpec]:
    """Calls that differ in sequence lengths and in how many there are; not of one query, to which causal is full."""
    spec = replace(PLAIN, causal=True)
    found = {
        f"{name}-{'short' if length <= 1024 else 'long'} {batch} of {length}": replace(
            kind, lengths_q=(length,) * batch, lengths_kv=(length,) * batch
        )
        for name, kind in (("causal", spec), ("narrow", NARROW))
        for length, batch in ((2, 1), (63, 1), (64, 3), (1000, 2), (1024, 16), (1025, 3), (2048, 16))
    }
    for seqlen_q, seqlen_kv, batch in (
        (2, 2049, 1),
        (15, 8192, 3),
        (16, 2049, 2),
        (128, 12345, 1),
    ):  # 4, 16, 4, 6 parts
        name = f"split-{'few' if seqlen_q < plan.MANY_ROWS else 'many'} {batch} of {seqlen_q}, {seqlen_kv}"
        found[name] = replace(spec, lengths_q=(seqlen_q,) * batch, lengths_kv=(seqlen_kv,) * batch)
    spec = replace(spec, is_packed=True)
    for each in ((2,), (64, 0), (100, 17, 64), (1024,) * 3, (1025, 3), (5000,) * 2):
        found[f"packed {each}"] = replace(spec, lengths_q=each, lengths_kv=each)
    return found


SETS: dict[str, Callable[[], dict[str, CallSpec]]] = {
    "tables": tables,
    "options": lambda: {name: replace(PLAIN, **options) for name, options in OPTIONS.items()},
    "packed": packed,
    "mixes": partial(packed, **EVERYTHING),
    "long": long,
    "split queries": split_queries,
    "split": split,
    "split mixes": partial(split, **(EVERYTHING | {"window": (1500, 0)})),
    "lengths": lengths,
}


def validated(spec: CallSpec) -> tuple[AttentionProblem, Operands]:
    """The call, with every gradient wanted."""
    call = spec.build()
    for tensor in call.differentiable.values():
        tensor.requires_grad_()
    absent = dict.fromkeys(("bias", "mask", "alibi_slopes", "sinks", "dropout_seed"))
    options: dict[str, Any] = absent | call.options
    return validation.check_call(
        call.q, call.k, call.v, **options, deterministic=False, wants_lse=True, is_packed=spec.is_packed
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    name: str
    kernel: Any
    log: str
    """What ptxas said."""
    seconds: float
    can_be_relaunched: bool
    """Whether the launch through the driver knows all its parameters, and the tensors that they are of."""


def compile_instead_of_launching(compiled: list[Compiled]) -> None:
    """From here on ``kernel[grid](...)`` compiles what would be launched, and adds it to the list if it is new."""

    launched_with: list[Any] = []
    launch_by = KernelLauncher.__call__

    def noted(self: KernelLauncher, key: Any, grid: Any, tensors: Any, arguments: Any, **constants: Any) -> Any:
        launched_with[:] = tensors
        return launch_by(self, key, grid, tensors, arguments, **constants)

    def is_known(parameter: Any) -> bool:
        descriptor = getattr(parameter, "descriptor", None)
        tensor = getattr(parameter, "tensor", None) if descriptor is None else descriptor.base
        return tensor is None or any(tensor is each for each in launched_with)

    def compile_only(function: JITFunction[Any], grid: tuple[int, ...]) -> Callable[..., None]:
        def run(*args: Any, **constants: Any) -> None:
            begin = time.perf_counter()
            with redirect_stdout(io.StringIO()) as log:
                kernel = function.warmup(*args, grid=grid, **constants)
            seconds = round(time.perf_counter() - begin, 1)
            if log.getvalue():  # else this process has compiled the same before
                values = (*args, *(constants[name] for name in kernel.src.signature if name in constants))
                parameters = relaunch.parameters_of(kernel, values)
                compiled.append(
                    Compiled(
                        name=function.fn.__name__,
                        kernel=kernel,
                        log=log.getvalue(),
                        seconds=seconds,
                        can_be_relaunched=parameters is not None and all(map(is_known, parameters)),
                    )
                )

        return run

    cast(Any, JITFunction).__getitem__ = compile_only
    cast(Any, KernelLauncher).__call__ = noted


def launch_all(spec: CallSpec) -> Plan:
    """Launches forward and backward, which splits no keys, and returns their plan."""
    problem, operands = validated(spec)
    assert not plan.rejects(problem, H200), plan.rejects(problem, H200)
    made = plan.plan(problem, H200)
    with torch.no_grad():
        out, lse = launch.forward(problem, operands, made)
        if made.forward.companions:
            return made
        saved = Saved(out=out, lse=lse)
        launch.backward(problem, operands, saved, torch.zeros_like(out), torch.zeros_like(lse), made)
    return made


def ptxas_report(log: str) -> dict[str, Any]:
    """Bytes that ptxas says it spills, and its warnings (C75..) of asynchronous products that it had to serialise."""
    spilled = [int(count) for count in re.findall(r"(\d+) bytes spill (?:stores|loads)", log)]
    assert spilled, f"no report of ptxas: {log}"
    return {"spills": max(spilled), "warnings": sorted(set(re.findall(r"C75\d\d", log)))}


def unused_barriers(ttgir: str) -> list[str]:
    """Barriers that no partition knows, whose memory the compiler has given away; see ``channel.make_barriers``."""
    made = re.findall(r"(%\w+) = ttg\.local_alloc : \(\) -> !ttg\.memdesc<\d+x1xi64", ttgir)
    called = re.search(r"ttg\.warp_specialize\(([^)]*)\)", ttgir)
    known = called[1].split(", ") if called else made
    return [barriers for barriers in made if barriers not in known]


def products(sass: str) -> dict[str, int]:
    """Instructions of asynchronous products (HGMMA.64x128x16), and the multiplications that each does once, in all."""
    sizes = re.findall(r"HGMMA\.(\d+)x(\d+)x(\d+)", sass)
    return {"hgmma": len(sizes), "multiplications": sum(int(m) * int(n) * int(k) for m, n, k in sizes)}


def read_in_a_loop(sass: str) -> int:
    """The most words of spilled registers that one step of an innermost loop with products reads or writes."""
    code = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", sass)]
    places = {at: index for index, (at, _text) in enumerate(code)}
    loops = []
    for index, (at, text) in enumerate(code):
        jump = re.search(r"\bBRA\b.* 0x([0-9a-f]+)", text)
        target = int(jump[1], 16) if jump else at + 1
        if target <= at and target in places:
            loops.append(range(places[target], index + 1))
    most = 0
    for loop in loops:
        inner = [other for other in loops if other != loop and other.start >= loop.start and other.stop <= loop.stop]
        texts = [code[index][1] for index in loop]
        if not inner and any("HGMMA" in text for text in texts):
            most = max(most, sum("LDL" in text or "STL" in text for text in texts))
    return most


def reports(label: str, spec: CallSpec, compiled: list[Compiled]) -> Iterator[dict[str, Any]]:
    """One for each kernel that no variant before has compiled, with the tiles and widths that its call has."""
    compiled.clear()
    made = launch_all(spec)
    width, width_v = plan.widths(validated(spec)[0])
    for found in compiled:
        sass = cuobjdump(found.kernel, "-sass")
        planned = made.backward if "backward" in found.name else made.forward
        yield {
            "variant": label,
            "kernel": found.name,
            "block_q": planned.tiles.block_q,
            "block_kv": planned.tiles.block_kv,
            "width": width,
            "width_v": width_v,
            "two_loops": getattr(planned.tiles, "has_two_loops", False),
            "is_split": getattr(made.backward.tiles, "num_splits", 1) > 1,
            "stores_first_rows": getattr(made.backward.tiles, "stores_first_rows", False),
            "planned_shared": planned.shared_memory_bytes,
            "seconds": found.seconds,
            "relaunch": found.can_be_relaunched,
            **needs(found.kernel),
            "unused_barriers": unused_barriers(found.kernel.asm["ttgir"]),
            **ptxas_report(found.log),
            "read_in_a_loop": read_in_a_loop(sass),
            **products(sass),
        }


if __name__ == "__main__":
    pretend("sm_90")
    knobs.nvidia.dump_ptxas_log = True
    devices.detect = lambda _device: H200
    kernels: list[Compiled] = []
    compile_instead_of_launching(kernels)
    for name in sys.argv[1:]:
        for variant, call_spec in SETS[name]().items():
            for report in reports(variant, call_spec, kernels):
                print(json.dumps(report), flush=True)
