"""``fastopt bench``: its arguments, and what it prints and writes."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from fastopt._bfloat16 import bfloat16
from fastopt._cli import Parser, fail, integer, make_writable, some_of
from fastopt.bench.workloads import RULES, WORKLOADS, Workload
from fastopt.threads import get_num_threads


def add(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add the command to those that there are."""
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
        choices=(
            "sgd",
            "momentum",
            "adagrad",
            "rmsprop",
            "adam",
            "adamw",
            "adamax",
            "adadelta",
            "lion",
            "nadam",
            "radam",
            "rprop",
            "clip-adam",
        ),
        default="adam",
        help="what to time (adam); clip-adam: clip to a global norm, Adam, zero the gradients",
    )
    bench.add_argument("--dtype", choices=("float32", "float64"), help="(float32)")
    bench.add_argument(
        "--storage",
        action="store_true",
        help="time steps over what is stored in bfloat16, float16 and 8 bits, beside float32 and "
        "the peers that have the same; each is checked first",
    )
    bench.add_argument(
        "--workloads",
        type=some_of(WORKLOADS, "workload"),
        metavar="NAME,...",
        help=f"what a step updates, of {', '.join(WORKLOADS)} "
        "(1e3,1e4,1e5,1e6,1e7,mlp,many; with --storage 1e5,1e7)",
    )
    bench.add_argument(
        "--threads",
        type=integer(1, 1024),
        metavar="N",
        help="the most that a step may use (as many as 'fastopt info' says)",
    )
    bench.add_argument(
        "--out",
        type=Path,
        default=Path("fastopt-bench"),
        metavar="DIR",
        help="folder for results.json and performance.png, or storage.json and storage.png, made "
        "if missing (fastopt-bench)",
    )
    bench.set_defaults(command=_run)


def _run(args: argparse.Namespace) -> int:
    try:
        from fastopt.bench import check, peers, report, run, storage, storage_report
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in {"rich", "matplotlib"}:
            raise
        needed = f"{missing} is missing; 'fastopt bench' needs: pip install 'fastopt[bench]'"
        return fail(needed, 2)

    if args.storage:
        if args.dtype is not None:
            return fail("--dtype goes without --storage, which has types of its own", 2)
        if args.rule == "clip-adam":
            return fail("--storage goes with the other rules, not with clip-adam", 2)
        try:
            bfloat16("--storage")
        except ImportError as error:
            return fail(str(error), 2)
    out: Path = args.out
    try:
        make_writable(out)
    except OSError as error:
        return fail(f"cannot write to {str(out)!r}: {error.strerror}", 2)

    rule, threads = RULES[args.rule], args.threads or get_num_threads()

    def timed(workload: Workload) -> Any:
        if args.storage:
            return storage.time_workload(workload, rule, threads, storage.SECONDS)
        case = run.Case(workload, rule, args.dtype or "float32", threads)
        return run.time_case(case, peers.NAMES[1:], sorted({1, threads}), run.SHORT_S)

    names = args.workloads or (storage.WORKLOADS if args.storage else run.SHORT)
    results: list[Any] = []
    interrupted = False
    try:
        for name in names:
            result = timed(WORKLOADS[name])
            results.append(result)
            own = result.rows[0]
            print(
                f"{result.workload.title}: {own.us:.3g} us a step, "
                f"{own.to_limit:.3g} times the limit",
                flush=True,
            )
    except (check.WrongResultError, MemoryError) as error:
        return fail(str(error), 1)
    except KeyboardInterrupt:
        interrupted = True
        print(
            f"\nInterrupted: the results are of {len(results)} of {len(names)} workloads.",
            file=sys.stderr,
        )

    if results:
        shown: Any = storage_report if args.storage else report
        shown.print_tables(results)
        stem = ("storage", "storage") if args.storage else ("results", "performance")
        written, figure = out / f"{stem[0]}.json", out / f"{stem[1]}.png"
        try:
            report.write_results(written, results)
            shown.write_figure(figure, results)
        except OSError as error:
            return fail(f"cannot write to {str(out)!r}: {error.strerror}", 1)
        print(f"Written: {written} and {figure}")
    return 130 if interrupted else 0
