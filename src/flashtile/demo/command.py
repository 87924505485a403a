"""``flashtile demo``: the arguments, the progress bar, the table, the report."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashtile.bench import environment
from flashtile.bench.files import check_place, write_whole
from flashtile.bench.transformer import ModelShape
from flashtile.demo import corpus as corpora
from flashtile.demo import machine, summary, training
from flashtile.demo.corpus import Corpus
from flashtile.demo.results import Comparison
from flashtile.demo.training import TrainingSettings
from flashtile.errors import InvalidArgument, require
from flashtile.report import output

if TYPE_CHECKING:
    from rich.console import Console

INTERRUPTED = 130  # what shells report for a command that Ctrl-C ended

_SIZES = ("steps", "seqlen", "batch", "layers", "d_model", "heads")
_DEFAULTS = {
    "cpu": {"steps": 240, "seqlen": 1024, "batch": 2, "layers": 2, "d_model": 128, "heads": 4},
    "cuda": {"steps": 300, "seqlen": 4096, "batch": 2, "layers": 4, "d_model": 512, "heads": 8},
}
_QUICK = {"steps": 6, "seqlen": 128, "batch": 2, "layers": 1, "d_model": 32, "heads": 2}
_SAMPLE_BYTES, _QUICK_SAMPLE_BYTES = 500, 40
_EXTRAS = ("rich", "matplotlib", "jinja2")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of ``flashtile demo``."""
    defaults = _DEFAULTS["cpu"], _DEFAULTS["cuda"]
    parser.description = (
        "Trains a small byte-level language model on real text, once with the naive attention formula and once with "
        "flashtile from the same seed; compares losses, speed and memory; writes an HTML report."
    )
    parser.add_argument(
        "--text",
        type=Path,
        metavar="FILE_OR_DIR",
        help="what to train on; default: the Python standard library's own sources",
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: the GPU if there is one"
    )
    helps = {
        "steps": "training steps of each run",
        "seqlen": "bytes per sequence",
        "batch": "sequences per step",
        "layers": "transformer blocks",
        "d_model": "width of the model",
        "heads": "attention heads",
    }
    for name, text in helps.items():
        on_cpu, on_gpu = (preset[name] for preset in defaults)
        default = f"default: {on_cpu}" if on_cpu == on_gpu else f"default: {on_cpu} on a CPU, {on_gpu} on a GPU"
        parser.add_argument(_flag(name), type=int, metavar="N", help=f"{text}; {default}")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and sampling; default: 0")
    parser.add_argument("--out", type=Path, default=Path("report.html"), metavar="FILE", help="default: report.html")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every number there")
    parser.add_argument(
        "--quick", action="store_true", help="a tiny model for a few steps: seconds, and proves nothing"
    )


def run(args: argparse.Namespace) -> int:
    """Runs the demo.

    Returns:
        0; 1 if the two loss curves do not agree, or no run made a step; 130 if Ctrl-C ended the training early (the
        report then shows what there was).

    Raises:
        InvalidArgument: an option is wrong; its text names it.
        MissingExtra: rich, matplotlib or jinja2 is not installed.
    """
    require(*_EXTRAS, extra="bench")
    from rich.console import Console

    # The profiler that counts memory would log into the progress bar.
    settings = _settings(args)
    output.check("--out", args.out)
    if args.json is not None:
        check_place("--json", args.json)
    corpus = corpora.load(args.text, seqlen=settings.seqlen)
    console = Console(highlight=False)
    _print_beginning(console, settings, corpus)
    comparison = _train(console, corpus, settings)
    if not any(run.steps for run in comparison.runs):
        _print_notes(console, comparison, settings)
        console.print("No run made a step: there is nothing to report.", markup=False)
        return INTERRUPTED if comparison.was_interrupted else 1
    _print_results(console, comparison, settings)
    _write_report(args, comparison, settings, corpus)
    console.print(f"Report: {args.out.resolve()}", markup=False, soft_wrap=True)
    return _exit_status(comparison, settings)


def _exit_status(comparison: Comparison, settings: TrainingSettings) -> int:
    if comparison.was_interrupted:
        return INTERRUPTED
    difference = comparison.loss_difference
    return 0 if difference is None or summary.agrees(difference, settings) else 1


def _settings(args: argparse.Namespace) -> TrainingSettings:
    device = environment.find_device(args.device)
    defaults = _QUICK if args.quick else _DEFAULTS[device.type]
    sizes: dict[str, int] = {}
    for name in _SIZES:
        given = getattr(args, name)
        sizes[name] = defaults[name] if given is None else given
        if sizes[name] < 1:
            raise InvalidArgument(
                _flag(name), got=str(given), wanted="at least 1", remedy="leave it away to take the default"
            )
    if not 0 <= args.seed < 2**63:
        raise InvalidArgument("--seed", got=str(args.seed), wanted="0 to 2**63 - 1", remedy="leave it away to take 0")
    shape = ModelShape(layers=sizes["layers"], d_model=sizes["d_model"], heads=sizes["heads"])
    if shape.d_model % (2 * shape.heads):
        raise InvalidArgument(
            "--d-model",
            got=f"{shape.d_model} with {shape.heads} heads",
            wanted="a multiple of twice the number of heads (rotary positions turn pairs of channels)",
            remedy=f"for example --d-model {2 * shape.heads * max(1, round(shape.d_model / (2 * shape.heads)))}",
        )
    return TrainingSettings(
        device=device,
        steps=sizes["steps"],
        batch=sizes["batch"],
        seqlen=sizes["seqlen"],
        shape=shape,
        seed=args.seed,
        sample_bytes=_QUICK_SAMPLE_BYTES if args.quick else _SAMPLE_BYTES,
    )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _print_beginning(console: Console, settings: TrainingSettings, corpus: Corpus) -> None:
    shape = settings.shape
    lines = (
        f"Text: {corpus.description}",
        f"Model: {shape.layers} layers, width {shape.d_model}, {shape.heads} heads; {settings.steps} steps of "
        f"{settings.batch} x {settings.seqlen} bytes on {machine.device_name(settings.device)}",
        summary.how_flashtile_ran(training.plan_of(settings)),
    )
    for line in lines:
        console.print(line, markup=False)


def _train(console: Console, corpus: Corpus, settings: TrainingSettings) -> Comparison:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[losses]}"),
    )
    with Progress(*columns, console=console, expand=True, refresh_per_second=4) as progress:
        task = progress.add_task("setting up", total=settings.steps, losses="")

        def on_step(losses: Mapping[str, float]) -> None:
            progress.update(task, advance=1, losses="loss " + " ".join(f"{k} {v:.4f}" for k, v in losses.items()))

        def on_stage(stage: str) -> None:
            progress.update(task, description=stage)

        return training.compare(corpus, settings, on_stage=on_stage, on_step=on_step)


def _print_results(console: Console, comparison: Comparison, settings: TrainingSettings) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table()
    table.add_column("")
    for heading in ("naive", "flashtile", "flashtile is"):
        table.add_column(heading, justify="right")
    for row in summary.table(comparison):
        table.add_row(row.label, row.naive, row.flashtile, row.verdict)
    console.print(table)
    difference = comparison.loss_difference
    if difference is not None:
        furthest = f"Largest difference of the losses: {difference.largest:.2g} nats per byte, at step "
        console.print(f"{furthest}{difference.at_step}.", markup=False)
        if summary.agrees(difference, settings):
            console.print(summary.why_not_zero(difference, settings), markup=False)
    _print_notes(console, comparison, settings)
    if comparison.sample is not None:
        console.print("\nThe flashtile-trained model continues held-out text (grey):", markup=False)
        console.print(Text(comparison.sample.prompt, style="dim").append(Text(comparison.sample.continuation)), "\n")


def _print_notes(console: Console, comparison: Comparison, settings: TrainingSettings) -> None:
    for note in summary.notes(comparison, settings):
        console.print(note, style="yellow", markup=False)


def _write_report(args: argparse.Namespace, comparison: Comparison, settings: TrainingSettings, corpus: Corpus) -> None:
    from flashtile.demo import page

    write_whole(args.out, page.render(comparison, settings, corpus, training.plan_of(settings)))
    if args.json is not None:
        write_whole(args.json, json.dumps(_as_json(comparison, settings, corpus), indent=1) + "\n")


def _as_json(comparison: Comparison, settings: TrainingSettings, corpus: Corpus) -> dict[str, Any]:
    difference = comparison.loss_difference
    return {
        "settings": {
            **asdict(settings),
            "device": machine.device_name(settings.device),
            "attention_dtype": str(settings.attention_dtype).removeprefix("torch."),
        },
        "corpus": corpus.description,
        "versions": machine.versions(),
        "loss_difference": None if difference is None else asdict(difference),
        **asdict(comparison),
    }
