"""``fastopt compare``: its arguments, and what it prints and writes."""

from __future__ import annotations

import argparse
import io
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fastopt._bfloat16 import bfloat16
from fastopt._cli import Parser, fail, integer, make_writable, some_of
from fastopt.compare.algorithms import (
    ALGORITHMS,
    DEFAULT,
    PARAM_DTYPES,
    SCHEDULES,
    STATE_DTYPES,
    STATELESS,
)

if TYPE_CHECKING:
    from fastopt.compare.data import Data


def add(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add the command to those that there are."""
    compare = commands.add_parser(
        "compare",
        help="find out which algorithm serves your data best",
        description="Train the same network with each algorithm, on handwritten digits or on your "
        "own table, with a learning rate chosen for each; show a table, a plot and a page. In "
        "parentheses is what is done without an option. "
        "Needs: pip install 'fastopt[compare]'",
        allow_abbrev=False,
    )
    count = integer(1, 10**6)
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
        type=_algorithms,
        default=DEFAULT,
        metavar="NAME,...",
        help=f"of {', '.join(ALGORITHMS)}, or all ({','.join(DEFAULT)})",
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
        type=integer(0, 2**32 - 1),
        default=0,
        metavar="N",
        help="of the split, the initial weights and the batches (0)",
    )
    training.add_argument(
        "--seeds",
        type=integer(1, 1000),
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
        "--param-dtype",
        type=some_of(PARAM_DTYPES),
        default=(),
        metavar="DTYPE,...",
        help="train each algorithm once more for each of these types of parameters: "
        f"{', '.join(PARAM_DTYPES)}; with the learning rate of float32",
    )
    training.add_argument(
        "--state-dtype",
        type=some_of(STATE_DTYPES),
        default=(),
        metavar="DTYPE,...",
        help=f"the same for each of these types of state: {', '.join(STATE_DTYPES)}; with "
        "--param-dtype, for each pair",
    )
    training.add_argument(
        "--master-weights",
        action=argparse.BooleanOptionalAction,
        help="train float32 weights, which parameters of 16 bits round (they do)",
    )
    training.add_argument(
        "--threads",
        type=integer(1, 1024),
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
    compare.set_defaults(command=_run)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, not {text!r}")
    return value


def _sizes(text: str) -> tuple[int, ...]:
    size = integer(1, 10**6)
    return tuple(size(part.strip()) for part in text.split(",")) if text.strip() else ()


_names = some_of(ALGORITHMS, "algorithm")


def _algorithms(text: str) -> tuple[str, ...]:
    return tuple(ALGORITHMS) if text == "all" else _names(text)


def _rates(text: str) -> dict[str | None, float]:
    """Parse ``RATE``, which is for all algorithms (None), or ``NAME=RATE,NAME=RATE``."""
    rates: dict[str | None, float] = {}
    for part in text.split(","):
        name, equals, rate = part.rpartition("=")
        if not equals and "," in text:
            raise argparse.ArgumentTypeError(f"must be RATE, or NAME=RATE,..., not {text!r}")
        rates[_names(name)[0] if equals else None] = _positive(rate)
    return rates


def _run(args: argparse.Namespace) -> int:
    try:
        from rich.console import Console

        from fastopt.compare import data, progress, report, run, summary
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in {"sklearn", "threadpoolctl", "rich", "matplotlib"}:
            raise
        needed = f"{missing} is missing; 'fastopt compare' needs: pip install 'fastopt[compare]'"
        return fail(needed, 2)

    rates = dict.fromkeys(args.optimizers, args.lr[None]) if None in args.lr else args.lr
    chosen = ("optimizers", "hidden", "epochs", "batch_size", "schedule", "seed", "seeds", "dtype")
    settings = run.Settings(
        lr=rates,
        threads=args.threads,
        param_dtypes=args.param_dtype,
        state_dtypes=args.state_dtype,
        master_weights=args.master_weights is not False,
        **{name: getattr(args, name) for name in chosen},
    )
    out: Path = args.out
    try:
        _check_storage(args)
        loaded = _load(args)
        make_writable(out)
    except (data.DataError, _WrongOptionsError) as error:
        return fail(str(error), 2)
    except OSError as error:
        return fail(f"cannot write to {str(out)!r}: {error.strerror}", 2)

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
            status = fail(f"not enough memory: {error}; {of}", 1)
        else:
            status = 130
            print(f"\nInterrupted: {of}.", file=sys.stderr)

    if comparison.runs:
        report.print_table(comparison, console)
        try:
            written = report.write(out, comparison)
        except OSError as error:
            return fail(f"cannot write to {str(out)!r}: {error.strerror}", 1)
        print(f"Written: {', '.join(map(str, written))}")
    return status


class _WrongOptionsError(ValueError):
    """Options that do not go together."""


def _check_storage(args: argparse.Namespace) -> None:
    """Raise an error if algorithms cannot be compared in these storages."""
    given = {"--param-dtype": args.param_dtype, "--state-dtype": args.state_dtype}
    for name, dtypes in given.items():
        if dtypes and args.dtype != "float32":
            raise _WrongOptionsError(f"{name} goes with --dtype float32, not {args.dtype}")
        if "bfloat16" in dtypes:
            try:
                bfloat16(f"{name} bfloat16")
            except ImportError as error:
                raise _WrongOptionsError(str(error)) from error
    if {*args.state_dtype} - {"float32"} and {*args.optimizers} <= {*STATELESS}:
        raise _WrongOptionsError(f"--state-dtype: {args.optimizers[0]} has no state")
    if args.master_weights is not None and not {*args.param_dtype} - {"float32"}:
        flag = "--master-weights" if args.master_weights else "--no-master-weights"
        raise _WrongOptionsError(f"{flag} goes with --param-dtype bfloat16 or float16")


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
