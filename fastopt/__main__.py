"""The command line: ``fastopt info``, ``compare`` and ``bench``, also as ``python -m fastopt``."""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import fastopt
from fastopt.compare.algorithms import ALGORITHMS, DEFAULT, SCHEDULES

if TYPE_CHECKING:
    from fastopt.compare.data import Data


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

    _add_compare(commands)

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
        choices=("sgd", "momentum", "adagrad", "rmsprop", "adam", "adamw", "clip-adam"),
        default="adam",
        help="what to time (adam); clip-adam: clip to a global norm, Adam, zero the gradients",
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


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, not {text!r}")
    return value


def _sizes(text: str) -> tuple[int, ...]:
    size = _integer(1, 10**6)
    return tuple(size(part.strip()) for part in text.split(",")) if text.strip() else ()


def _names(text: str) -> tuple[str, ...]:
    """Parse names of algorithms."""
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in ALGORITHMS:
            known = ", ".join(ALGORITHMS)
            raise argparse.ArgumentTypeError(f"no algorithm {name!r}; there are {known}")
    if len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"each name once, not {text!r}")
    return names


def _rates(text: str) -> dict[str | None, float]:
    """Parse ``RATE``, which is for all algorithms (None), or ``NAME=RATE,NAME=RATE``."""
    rates: dict[str | None, float] = {}
    for part in text.split(","):
        name, equals, rate = part.rpartition("=")
        if not equals and "," in text:
            raise argparse.ArgumentTypeError(f"must be RATE, or NAME=RATE,..., not {text!r}")
        rates[_names(name)[0] if equals else None] = _positive(rate)
    return rates


def _add_compare(commands: argparse._SubParsersAction[_Parser]) -> None:
    compare = commands.add_parser(
        "compare",
        help="find out which algorithm serves your data best",
        description="Train the same network with each algorithm, on handwritten digits or on your "
        "own table, with a learning rate chosen for each; show a table, a plot and a page. In "
        "parentheses is what is done without an option. "
        "Needs: pip install 'fastopt[compare]'",
        allow_abbrev=False,
    )
    count = _integer(1, 10**6)
    data = compare.add_argument_group("data")
    data.add_argument(
        "--data",
        type=Path,
        metavar="FILE.csv",
        help="a table with a line of column names (handwritten digits)",
    )
    data.add_argument("--target", metavar="COLUMN", help="what to predict")
    data.add_argument(
        "--task",
        choices=("classification", "regression"),
        help="what the target is for (texts and a few whole numbers are classes, other numbers are "
        "not)",
    )
    data.add_argument(
        "--impute", action="store_true", help="fill missing values, which are refused otherwise"
    )
    data.add_argument(
        "--categorical",
        action="append",
        default=[],
        metavar="COLUMN",
        help="its numbers are names; may be repeated",
    )
    data.add_argument(
        "--ignore",
        action="append",
        default=[],
        metavar="COLUMN",
        help="leave it out; may be repeated",
    )
    training = compare.add_argument_group("training")
    training.add_argument(
        "--optimizers",
        type=_names,
        default=DEFAULT,
        metavar="NAME,...",
        help=f"of {', '.join(ALGORITHMS)} ({','.join(DEFAULT)})",
    )
    training.add_argument(
        "--hidden",
        type=_sizes,
        default=(64, 32),
        metavar="N,...",
        help="units of the hidden layers; '' is a linear model (64,32)",
    )
    training.add_argument(
        "--epochs", type=count, default=20, metavar="N", help="passes over the data (20)"
    )
    training.add_argument(
        "--batch-size", type=count, default=64, metavar="N", help="samples a step (64)"
    )
    training.add_argument(
        "--lr",
        type=_rates,
        default={},
        metavar="RATE",
        help="for all, or NAME=RATE,... (chosen on the validation split)",
    )
    training.add_argument(
        "--schedule",
        choices=SCHEDULES,
        default="constant",
        metavar="NAME",
        help=f"of the learning rate: {', '.join(SCHEDULES)} (constant)",
    )
    training.add_argument(
        "--seed",
        type=_integer(0, 2**32 - 1),
        default=0,
        metavar="N",
        help="of the split, the initial weights and the batches (0)",
    )
    training.add_argument(
        "--seeds",
        type=_integer(1, 1000),
        default=3,
        metavar="N",
        help="how often to train with each, with one seed after the other (3)",
    )
    training.add_argument(
        "--dtype",
        choices=("float32", "float64"),
        default="float32",
        help="of weights and samples (float32)",
    )
    training.add_argument(
        "--threads",
        type=_integer(1, 1024),
        metavar="N",
        help="upper bound on the threads of an optimizer step (as many as 'fastopt info' says)",
    )
    compare.add_argument(
        "--out",
        type=Path,
        default=Path("fastopt-comparison"),
        metavar="DIR",
        help="folder for report.html, comparison.png and results.json, made if missing "
        "(fastopt-comparison)",
    )
    compare.set_defaults(command=_compare)


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
        print(f"{name + ':':<20} {value}".rstrip())
    return 0


def _compare(args: argparse.Namespace) -> int:
    try:
        from rich.console import Console

        from fastopt.compare import data, progress, report, run, summary
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in {"sklearn", "threadpoolctl", "rich", "matplotlib"}:
            raise
        needed = f"{missing} is missing; 'fastopt compare' needs: pip install 'fastopt[compare]'"
        return _fail(needed, 2)

    rates = dict.fromkeys(args.optimizers, args.lr[None]) if None in args.lr else args.lr
    chosen = ("optimizers", "hidden", "epochs", "batch_size", "schedule", "seed", "seeds", "dtype")
    settings = run.Settings(
        lr=rates, threads=args.threads, **{name: getattr(args, name) for name in chosen}
    )
    out: Path = args.out
    try:
        loaded = _load(args)
        _make_writable(out)
    except (data.DataError, _WrongOptionsError) as error:
        return _fail(str(error), 2)
    except OSError as error:
        return _fail(f"cannot write to {str(out)!r}: {error.strerror}", 2)

    comparison = run.Comparison(loaded, settings)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a column may be named in any script
    terminal = sys.stdout.isatty()
    console = Console() if terminal else Console(width=100)
    for line in summary.description(comparison):
        console.print(line, markup=False, highlight=False, soft_wrap=not terminal)
    shown: progress.Progress = progress.Lines(settings.epochs)
    if terminal and not console.is_dumb_terminal:
        shown = progress.Bars(console, comparison.trainings, settings.epochs)
    status = 0
    try:
        comparison.go(shown)
    except (KeyboardInterrupt, MemoryError) as error:
        of = f"the results are of {len(comparison.runs)} of {comparison.planned} runs"
        if isinstance(error, MemoryError):
            status = _fail(f"not enough memory: {error}; {of}", 1)
        else:
            status = 130
            print(f"\nInterrupted: {of}.", file=sys.stderr)

    if comparison.runs:
        report.print_table(comparison, console)
        try:
            written = report.write(out, comparison)
        except OSError as error:
            return _fail(f"cannot write to {str(out)!r}: {error.strerror}", 1)
        print(f"Written: {', '.join(map(str, written))}")
    return status


class _WrongOptionsError(ValueError):
    """Options that do not go together."""


def _load(args: argparse.Namespace) -> Data:
    from fastopt.compare import data

    for name in args.lr.keys() - {None, *args.optimizers}:
        raise _WrongOptionsError(f"--lr has {name!r}, which is not among --optimizers")
    if args.data is None:
        for name in ("target", "task", "impute", "categorical", "ignore"):
            if getattr(args, name):
                raise _WrongOptionsError(f"--{name} goes with --data FILE.csv")
        return data.digits(args.seed, args.dtype)
    if args.target is None:
        raise _WrongOptionsError("--data needs --target COLUMN: what to predict")
    return data.read_csv(
        args.data,
        args.target,
        args.seed,
        args.dtype,
        task=args.task,
        impute=args.impute,
        categorical=args.categorical,
        ignore=args.ignore,
    )


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
