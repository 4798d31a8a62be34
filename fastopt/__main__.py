"""The command line: ``fastopt info``, ``compare`` and ``bench``, also as ``python -m fastopt``."""

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

    bench = commands.add_parser(
        "bench",
        help="time a step beside other optimizers and the limit of memory",
        description="Time optimizer steps, in about two minutes, beside those of the frameworks "
        "that are installed and beside a loop that moves the same bytes and computes nothing. "
        "Needs: pip install 'fastopt[bench]'",
        allow_abbrev=False,
    )
    bench.add_argument(
        "--rule",
        choices=("sgd", "momentum", "adagrad", "rmsprop", "adam", "adamw", "tail"),
        default="adam",
        help="what to time (adam); tail: clip to a global norm, Adam, zero the gradients",
    )
    bench.add_argument(
        "--dtype", choices=("float32", "float64"), default="float32", help="(float32)"
    )
    bench.add_argument(
        "--threads",
        type=_integer(1, 1024),
        metavar="N",
        help="the most that a step may use (as many as 'fastopt info' says)",
    )
    bench.add_argument(
        "--out",
        type=Path,
        default=Path("fastopt-bench"),
        metavar="DIR",
        help="folder for results.json and performance.png, made if missing (fastopt-bench)",
    )
    bench.set_defaults(command=_bench)
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
    try:
        _make_writable(out)
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


def _bench(args: argparse.Namespace) -> int:
    try:
        from fastopt.bench import check, peers, report, run, workloads
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in {"rich", "matplotlib"}:
            raise
        needed = f"{missing} is missing; 'fastopt bench' needs: pip install 'fastopt[bench]'"
        return _fail(needed, 2)

    out: Path = args.out
    try:
        _make_writable(out)
    except OSError as error:
        return _fail(f"cannot write to {str(out)!r}: {error.strerror}", 2)

    threads = args.threads or fastopt.get_num_threads()
    results: list[run.Result] = []
    interrupted = False
    try:
        for name in run.SHORT:
            case = run.Case(
                workloads.WORKLOADS[name], workloads.RULES[args.rule], args.dtype, threads
            )
            result = run.time_case(case, peers.NAMES[1:], sorted({1, threads}), run.SHORT_S)
            results.append(result)
            own = result.rows[0]
            print(
                f"{case.workload.title}: {own.us:.3g} us a step, "
                f"{own.to_limit:.3g} times the limit",
                flush=True,
            )
    except (check.WrongResultError, MemoryError) as error:
        return _fail(str(error), 1)
    except KeyboardInterrupt:
        interrupted = True
        total = len(run.SHORT)
        print(
            f"\nInterrupted: the results are of {len(results)} of {total} workloads.",
            file=sys.stderr,
        )

    if results:
        report.print_tables(results)
        written, figure = out / "results.json", out / "performance.png"
        try:
            report.write_results(written, results)
            report.write_figure(figure, results)
        except OSError as error:
            return _fail(f"cannot write to {str(out)!r}: {error.strerror}", 1)
        print(f"Written: {written} and {figure}")
    return 130 if interrupted else 0


def _make_writable(folder: Path) -> None:
    """Make a folder, and find out before the work, not after it, that it cannot be written to."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


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
