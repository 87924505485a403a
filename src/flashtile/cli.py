"""The command ``flashtile``: doctor, explain, support, bench, report and demo."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence

import torch

import flashtile
from flashtile.bench import command as bench
from flashtile.demo import command as demo
from flashtile.errors import FlashtileError
from flashtile.report import command as report
from flashtile.spec import devices
from flashtile.spec.problem import DIFFERENTIABLE

EXIT_OK, EXIT_ERROR, EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 0, 1, 130, 141

DTYPES = {
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
    "fp32": torch.float32,
    "float32": torch.float32,
    "fp64": torch.float64,
    "float64": torch.float64,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code.

    0: done. 1: an error of ours, told on stderr. 2: wrong usage (argparse exits itself). 130: ended by Ctrl-C.
    141: whoever read our output stopped reading.
    """
    args = build_parser().parse_args(argv)
    try:
        exit_code = args.run(args)
        sys.stdout.flush()  # a closed pipe shows here at the latest
    except FlashtileError as error:
        print(f"flashtile: {error}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print("flashtile: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Python flushes stdout once more when it exits, and would complain about the pipe then.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    return exit_code


def build_parser() -> argparse.ArgumentParser:
    """The parser; each command's namespace has a ``run`` that takes the namespace and returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="flashtile", description="Exact attention that never stores the score matrix, in Python all the way."
    )
    parser.add_argument("--version", action="version", version=f"flashtile {flashtile.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    command = commands.add_parser("doctor", help="what is installed, which backends work here, what is missing")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=_doctor)

    command = commands.add_parser(
        "explain", help="what would run for a problem, why, and what it costs, on any device", epilog=_EXPLAIN_EXAMPLE
    )
    _add_explain_arguments(command)
    command.set_defaults(run=_explain)

    command = commands.add_parser("support", help="the table of what each backend takes on each kind of device")
    command.add_argument(
        "--device", nargs="+", metavar="NAME", default=("cpu", "h200", "mi300x"), help=", ".join(devices.DEVICES)
    )
    form = command.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON, with every backend's reasons")
    form.add_argument("--markdown", action="store_true", help="print a Markdown table")
    command.set_defaults(run=_support)

    command = commands.add_parser("bench", help="time attention beside its peers on this machine")
    bench.add_arguments(command)
    command.set_defaults(run=bench.run)

    command = commands.add_parser("report", help="one HTML page from results files of bench")
    report.add_arguments(command)
    command.set_defaults(run=report.run)

    command = commands.add_parser("demo", help="train a small transformer with the naive formula and with flashtile")
    demo.add_arguments(command)
    command.set_defaults(run=demo.run)
    return parser


_EXPLAIN_EXAMPLE = "example: flashtile explain --seqlen 16384 --heads 16 --head-dim 128 --causal --device h200"


def _add_explain_arguments(parser: argparse.ArgumentParser) -> None:
    problem = parser.add_argument_group("problem")
    problem.add_argument("--batch", type=int, default=1, metavar="N", help="default: 1")
    problem.add_argument("--seqlen", "--seqlen-q", dest="seqlen_q", type=int, required=True, metavar="N")
    problem.add_argument("--seqlen-kv", type=int, metavar="N", help="default: that of the queries")
    problem.add_argument("--heads", "--heads-q", dest="heads_q", type=int, required=True, metavar="N")
    problem.add_argument("--heads-kv", type=int, metavar="N", help="key/value heads; default: as many as query heads")
    problem.add_argument("--head-dim", type=int, required=True, metavar="N")
    problem.add_argument("--head-dim-v", type=int, metavar="N", help="of the values; default: that of the queries")
    problem.add_argument("--dtype", choices=DTYPES, default="bf16", metavar="DTYPE", help="bf16 (default), fp16, ...")

    options = parser.add_argument_group("options of the call")
    options.add_argument("--causal", action="store_true", help="query i sees no key after its own position")
    options.add_argument(
        "--window", nargs=2, type=_reach, metavar=("LEFT", "RIGHT"), help="tokens, or none for unlimited: 4096 0"
    )
    for name, what in (("bias", "an additive bias"), ("mask", "a boolean mask")):
        options.add_argument(
            f"--{name}",
            nargs="*",
            type=int,
            metavar="SIZE",
            help=f"{what} of this shape, for example 1 1 512 512; no sizes: one element for every pair and head",
        )
    options.add_argument("--alibi", dest="has_alibi", action="store_true", help="with ALiBi slopes")
    options.add_argument("--sinks", dest="has_sinks", action="store_true", help="with attention sinks")
    options.add_argument("--softcap", type=float, default=0.0, metavar="CAP")
    options.add_argument("--dropout", dest="dropout_p", type=float, default=0.0, metavar="P")
    options.add_argument("--deterministic", action="store_true", help="with a bitwise repeatable backward")
    options.add_argument("--with-lse", action="store_true", help="attention_with_lse, whose lse may get a gradient")
    gradients = options.add_mutually_exclusive_group()
    gradients.add_argument("--gradients", nargs="+", choices=DIFFERENTIABLE, help="default: q k v")
    gradients.add_argument("--forward-only", action="store_true", help="no gradient: inference")

    parser.add_argument("--backend", default="auto", metavar="NAME", help="default: auto")
    parser.add_argument(
        "--device", metavar="NAME", help=f"{', '.join(devices.DEVICES)} or cuda:N; default: this machine's"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def _reach(text: str) -> int | None:
    """One side of a window."""
    if text.lower() == "none":
        return None
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of tokens nor 'none'") from None


def _explain(args: argparse.Namespace) -> int:
    seqlen_kv = args.seqlen_q if args.seqlen_kv is None else args.seqlen_kv
    scores_shape = [args.batch, args.heads_q, args.seqlen_q, seqlen_kv]
    explanation = flashtile.explain(
        batch=args.batch,
        seqlen_q=args.seqlen_q,
        seqlen_kv=seqlen_kv,
        heads_q=args.heads_q,
        heads_kv=args.heads_kv,
        head_dim=args.head_dim,
        head_dim_v=args.head_dim_v,
        dtype=DTYPES[args.dtype],
        causal=args.causal,
        window=None if args.window is None else tuple(args.window),
        softcap=args.softcap,
        bias_shape=scores_shape if args.bias == [] else args.bias,
        mask_shape=scores_shape if args.mask == [] else args.mask,
        has_alibi=args.has_alibi,
        has_sinks=args.has_sinks,
        dropout_p=args.dropout_p,
        deterministic=args.deterministic,
        with_lse=args.with_lse,
        gradients=() if args.forward_only else args.gradients or ("q", "k", "v"),
        backend=args.backend,
        device=args.device,
    )
    print(json.dumps(explanation.to_dict(), indent=2) if args.json else explanation)
    return EXIT_OK


def _doctor(args: argparse.Namespace) -> int:
    diagnosis = flashtile.doctor()
    print(json.dumps(diagnosis.to_dict(), indent=2) if args.json else diagnosis)
    return EXIT_OK if diagnosis.is_healthy else EXIT_ERROR


def _support(args: argparse.Namespace) -> int:
    matrix = flashtile.support_matrix(args.device)
    if args.json:
        print(json.dumps(matrix.to_dict(), indent=2))
    else:
        print(matrix.to_markdown() if args.markdown else matrix)
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
