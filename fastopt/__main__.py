"""The command line: ``fastopt info`` and ``fastopt compare``, also as ``python -m fastopt``."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import fastopt


class _Parser(argparse.ArgumentParser):
    """Reports an error in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see '{self.prog} --help')\n")


def _integer(low: int, high: int) -> Callable[[str], int]:
    """Return an argument type: a whole number from `low` to `high`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(
                f"must be a whole number from {low} to {high}, not {text!r}"
            )
        return value

    return parse


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="fastopt",
        description="First-order optimizers for training on the CPU.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"fastopt {fastopt.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    info = commands.add_parser(
        "info",
        help="how this fastopt was built and what it uses here",
        description="Print how this fastopt was built and what it uses on this machine.",
        allow_abbrev=False,
    )
    info.add_argument("--json", action="store_true", help="print JSON")
    info.set_defaults(command=_info)

    compare = commands.add_parser(
        "compare",
        help="train one network with each of the algorithms",
        description="Train the same network on handwritten digits with SGD, momentum, Adagrad, "
        "RMSprop and Adam, and compare them. Needs: pip install 'fastopt[compare]'",
        allow_abbrev=False,
    )
    count = _integer(1, 10**6)
    compare.add_argument(
        "--epochs", type=count, default=20, metavar="N", help="passes over the data (20)"
    )
    compare.add_argument(
        "--batch-size", type=count, default=64, metavar="N", help="samples a step (64)"
    )
    compare.add_argument(
        "--seed",
        type=_integer(0, 2**32 - 1),
        default=0,
        metavar="N",
        help="of the split, the initial weights and the batches (0)",
    )
    compare.add_argument(
        "--out",
        type=Path,
        default=Path("fastopt-comparison"),
        metavar="DIR",
        help="folder for results.json and comparison.png, made if missing (fastopt-comparison)",
    )
    compare.add_argument(
        "--threads",
        type=_integer(1, 1024),
        metavar="N",
        help="upper bound on the threads of an optimizer step (as many as 'fastopt info' says)",
    )
    compare.set_defaults(command=_compare)
    return parser


def _fail(message: str, status: int) -> int:
    print(f"fastopt: error: {message}", file=sys.stderr)
    return status


def _info(args: argparse.Namespace) -> int:
    info = fastopt.build_info()
    if args.json:
        print(json.dumps(info, indent=2))
        return 0
    rows: dict[str, Any] = {}
    for name, value in info.items():
        if isinstance(value, dict):
            rows |= {f"{name} {key}": entry for key, entry in value.items()}
        else:
            rows[name] = value
    for name, value in rows.items():
        if isinstance(value, bool):
            value = "yes" if value else "no"
        elif isinstance(value, list | tuple):
            value = " ".join(value)
        print(f"{name + ':':<15} {value}")
    return 0


def _compare(args: argparse.Namespace) -> int:
    try:
        from fastopt.compare import data, report, run
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in {"sklearn", "rich", "matplotlib"}:
            raise
        needed = f"{missing} is missing; 'fastopt compare' needs: pip install 'fastopt[compare]'"
        return _fail(needed, 2)

    out: Path = args.out
    try:  # before the training, not after it
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        return _fail(f"cannot write to {str(out)!r}: {error.strerror}", 2)

    settings = run.Settings(args.epochs, args.batch_size, args.seed, args.threads)
    digits = data.load(settings.seed)
    runs: list[run.Run] = []
    interrupted = False
    try:
        for algorithm in run.ALGORITHMS:
            runs.append(run.train(algorithm, digits, settings))
    except KeyboardInterrupt:
        interrupted = True
        total = len(run.ALGORITHMS)
        print(f"\nInterrupted: the results are of {len(runs)} of {total} runs.", file=sys.stderr)

    if runs:
        report.print_table(runs)
        results, figure = out / "results.json", out / "comparison.png"
        try:
            report.write_results(results, settings, runs)
            report.write_figure(figure, runs)
        except OSError as error:
            return _fail(f"cannot write to {str(out)!r}: {error.strerror}", 1)
        print(f"Written: {results} and {figure}")
    return 130 if interrupted else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    argv : sequence of str, optional
        The arguments, without the program's name; those of the process by default.

    Returns
    -------
    int
        The exit status: 0, or 130 after Ctrl-C, or another number after an error, which is one line
        on standard error.

    Raises
    ------
    SystemExit
        By argparse: after ``--help`` and ``--version``, and for arguments that cannot be parsed.
    """
    args = _parser().parse_args(argv)
    try:
        status: int = args.command(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:  # the reader has gone, as in `fastopt compare | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status


if __name__ == "__main__":
    sys.exit(main())
