"""``fastopt bench``: its arguments, and what it prints and writes."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fastopt._cli import Parser, fail, integer, make_writable
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
        choices=("sgd", "momentum", "adagrad", "rmsprop", "adam", "adamw", "clip-adam"),
        default="adam",
        help="what to time (adam); clip-adam: clip to a global norm, Adam, zero the gradients",
    )
    bench.add_argument(
        "--dtype", choices=("float32", "float64"), default="float32", help="(float32)"
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
        help="folder for results.json and performance.png, made if missing (fastopt-bench)",
    )
    bench.set_defaults(command=_run)


def _run(args: argparse.Namespace) -> int:
    try:
        from fastopt.bench import check, peers, report, run, workloads
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in {"rich", "matplotlib"}:
            raise
        needed = f"{missing} is missing; 'fastopt bench' needs: pip install 'fastopt[bench]'"
        return fail(needed, 2)

    out: Path = args.out
    try:
        make_writable(out)
    except OSError as error:
        return fail(f"cannot write to {str(out)!r}: {error.strerror}", 2)

    threads = args.threads or get_num_threads()
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
        return fail(str(error), 1)
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
            return fail(f"cannot write to {str(out)!r}: {error.strerror}", 1)
        print(f"Written: {written} and {figure}")
    return 130 if interrupted else 0
