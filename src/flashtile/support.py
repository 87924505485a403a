"""support_matrix(): what each backend takes on each device, found by asking, never typed in."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from flashtile import dispatch
from flashtile.spec import devices, sizes
from flashtile.spec.devices import DeviceSpec
from flashtile.spec.problem import AttentionProblem

_PLAIN: dict[str, Any] = {"batch": 2, "seqlen_q": 256, "heads_q": 4, "head_dim": 64, "gradients": ()}
_TRAINING = ("q", "k", "v")


@dataclass(frozen=True, slots=True, kw_only=True)
class SupportCell:
    """What happens to one feature on one device."""

    device: str
    backend: str | None
    """What ``backend="auto"`` picks, strict mode aside; None if nothing takes it."""
    kernel: str | None
    reason: str
    """Why it was picked, in its own words; empty if nothing was."""
    accepts: tuple[str, ...]
    """Every backend that takes it, in the order in which they are asked."""
    rejects: tuple[tuple[str, tuple[str, ...]], ...]
    """(backend, its reasons) for every backend that does not."""

    def __str__(self) -> str:
        return "-" if self.backend is None else f"{self.backend}/{self.kernel}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SupportRow:
    """One feature on every device."""

    feature: str
    cells: tuple[SupportCell, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SupportMatrix:
    """What ``flashtile.support_matrix`` found; ``str()`` is an aligned table."""

    devices: tuple[str, ...]
    rows: tuple[SupportRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything as dicts, tuples, strings and None, ready for JSON."""
        return dataclasses.asdict(self)

    def to_markdown(self) -> str:
        """A GitHub-flavoured table."""
        header, *rows = self._table()
        lines = [header, ["---"] * len(header), *rows]
        return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)

    def __str__(self) -> str:
        table = self._table()
        widths = [max(len(cells[column]) for cells in table) for column in range(len(table[0]))]
        lines = [
            "  ".join(f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True)).rstrip() for cells in table
        ]
        return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:], "", *self.legend()])

    def _table(self) -> list[list[str]]:
        return [["feature", *self.devices], *([row.feature, *map(str, row.cells)] for row in self.rows)]

    def legend(self) -> Iterator[str]:
        """What the entries mean, a sentence each, in the backends' own words."""
        yield "An entry is the backend/kernel that backend='auto' picks; '-' where no backend takes the feature."
        picked: dict[str, dict[str, None]] = {}  # entry -> its reasons, in order and without repetition
        declined: dict[str, dict[str, None]] = {}
        for cell in (cell for row in self.rows for cell in row.cells):
            if cell.backend is not None:
                picked.setdefault(str(cell), {})[cell.reason] = None
            for backend, reasons in cell.rejects:
                declined.setdefault(backend, {}).update(dict.fromkeys(reasons))
        for entry, reasons in picked.items():
            if len(reasons) == 1:  # else the reason depends on the feature, and explain() tells it
                yield f"{entry}: {next(iter(reasons))}."
        for backend, reasons in declined.items():
            yield f"{backend} declines: {'; '.join(reasons)}."


def support_matrix(device_names: Sequence[str] = ("cpu", "h200", "mi300x")) -> SupportMatrix:
    """Asks every backend about one small problem per feature and device.

    Args:
        device_names: entries of the device table; default one of each kind.

    Returns:
        SupportMatrix, whose rows and cells hold each backend's own answers. Print it, or see ``to_markdown()``.

    Raises:
        InvalidArgument: a name that is not in the device table.

    Example:
        >>> import flashtile
        >>> matrix = flashtile.support_matrix()
        >>> [row.feature for row in matrix.rows][:2]
        ['forward', 'backward']
    """
    specs = [devices.by_name(name) for name in device_names]
    rows = [
        SupportRow(feature=feature, cells=tuple(_ask(problem, spec) for spec in specs))
        for feature, problem in feature_problems().items()
    ]
    return SupportMatrix(devices=tuple(spec.name for spec in specs), rows=tuple(rows))


def feature_problems() -> dict[str, AttentionProblem]:
    """One small problem for each feature that the contracts name."""
    shape = (_PLAIN["batch"], _PLAIN["heads_q"], _PLAIN["seqlen_q"], _PLAIN["seqlen_q"])
    features: dict[str, dict[str, Any]] = {
        "forward": {},
        "backward": {"gradients": _TRAINING},
        "causal": {"causal": True},
        "causal, seqlen_q != seqlen_kv": {"causal": True, "seqlen_kv": 512},
        "window": {"window": (16, 0)},
        "bias": {"bias_shape": shape},
        "bias gradient": {"bias_shape": shape, "gradients": (*_TRAINING, "bias")},
        "boolean mask": {"mask_shape": shape},
        "ALiBi": {"has_alibi": True},
        "softcap": {"softcap": 30.0},
        "sinks": {"has_sinks": True},
        "sinks gradient": {"has_sinks": True, "gradients": (*_TRAINING, "sinks")},
        "dropout": {"dropout_p": 0.1, "gradients": _TRAINING},
        "lse gradient": {"with_lse": True, "gradients": _TRAINING},
        "GQA (4 heads over 2)": {"heads_kv": 2},
        "head_dim_v != head_dim": {"head_dim_v": 32},
        "head_dim 100": {"head_dim": 100},
        "head_dim 256": {"head_dim": 256},
        "head_dim 512": {"head_dim": 512},
        "deterministic backward": {"deterministic": True, "gradients": _TRAINING},
        "float16": {"dtype": torch.float16},
        "bfloat16": {"dtype": torch.bfloat16},
        "float32": {"dtype": torch.float32},
        "float64": {"dtype": torch.float64},
    }
    problems = {feature: sizes.pose(**{**_PLAIN, **options}) for feature, options in features.items()}
    plain = problems["forward"]
    problems["varlen"] = dataclasses.replace(plain, layout="varlen")
    everything: dict[str, Any] = {"heads_kv": 2, "head_dim_v": 32, "gradients": (*_TRAINING, "bias", "sinks")}
    for feature in ("window", "bias", "boolean mask", "ALiBi", "softcap", "sinks", "dropout", "lse gradient"):
        everything = {**features[feature], "deterministic": True, **everything}
    problems["all of these at once"] = dataclasses.replace(sizes.pose(**{**_PLAIN, **everything}), layout="varlen")
    return problems


def _ask(problem: AttentionProblem, device: DeviceSpec) -> SupportCell:
    in_order = ((name, dispatch.BACKENDS[name]) for name in dispatch.fastest_first(problem))
    answers = {name: planner.rejects(problem, device) for name, planner in in_order}
    accepts = tuple(name for name, reasons in answers.items() if not reasons)
    plan = dispatch.BACKENDS[accepts[0]].plan(problem, device) if accepts else None
    return SupportCell(
        device=device.name,
        backend=None if plan is None else plan.backend,
        kernel=None if plan is None else (plan.backward if problem.gradients else plan.forward).kernel,
        reason="" if plan is None else plan.reason,
        accepts=accepts,
        rejects=tuple((name, reasons) for name, reasons in answers.items() if reasons),
    )
