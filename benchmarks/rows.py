"""How long is a step that updates some rows? ``python benchmarks/rows.py``

An embedding table of float32; a batch looks rows up, some of them more than once, and gives the
gradient of each look-up. Timed are fastopt (``fastopt.Rows``), NumPy on the rows, PyTorch's sparse
gradients (SGD, Adagrad, and SparseAdam for Adam), a loop of numba, and the limit, which reads and
writes those rows and computes nothing. Each is held to ``fastopt.reference`` first. They take turns
on the same memory, after a pause in which nobody's threads spin any more; batches touch 256 MB of
rows before they come again. A figure is the median, in microseconds.

Without arguments, some minutes: Adam over the number of look-ups (`lookups`) and over the table's
size (`size`), all rules on one table (`rules`), and rows whose steps are made up for (`exact`).
``--all`` takes an hour: each rule, size, width, distribution and number of look-ups. ``--out
FOLDER`` writes rows.json and rows.png (needs matplotlib).
"""

import argparse
import gc
import itertools
import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from rows_contenders import (
    SLOTS,
    Dense,
    Exact,
    Fastopt,
    Memory,
    check,
    check_exact,
    check_formulas,
    contenders,
)

import fastopt
from fastopt.bench.measure import Interleaved
from fastopt.bench.report import LOOK, STYLES, processor, up_to

SETTLE_S = 0.02
WARM_STEPS_S = 0.05  # for fastopt to find out how many threads are fastest
RESERVE = 1 << 30  # bytes that stay free

SIZES, WIDTHS = (10**4, 10**5, 10**6, 10**7), (16, 64, 128)
LOOKUPS = (64, 256, 1024, 4096, 16384, 65536)
SKEWS = ("uniform", "Zipf")


class Case(NamedTuple):
    rule: str
    rows: int
    width: int
    skew: str
    lookups: int
    series: str


def default_cases():
    for skew, lookups in itertools.product(SKEWS, LOOKUPS):
        yield Case("Adam", 10**6, 64, skew, lookups, "lookups")
    for rows, lookups in itertools.product(SIZES, (1024, 65536)):
        yield Case("Adam", rows, 64, "uniform", lookups, "size")
    for rule, skew in itertools.product(SLOTS, SKEWS):
        yield Case(rule, 200_000, 64, skew, 1024, "rules")
        yield Case(rule, 200_000, 64, skew, 1024, "exact")  # rows come again after 195 steps
    for rule in SLOTS:
        yield Case(rule, 10**4, 64, "uniform", 1024, "exact")  # after 10


def all_cases():
    for rule, rows, width, skew, lookups in itertools.product(SLOTS, SIZES, WIDTHS, SKEWS, LOOKUPS):
        yield Case(rule, rows, width, skew, lookups, "all")


def available():
    """Return the bytes that can be allocated, or None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))


def measure(memory, case, threads, seconds):
    """Return the median seconds of each contender's step, and the rows that a batch touches."""
    memory.reset()
    rng = np.random.default_rng(1)
    exact = case.series == "exact"
    batches = memory.batches(case.lookups, case.skew, rng, least=Exact.WARM_STEPS if exact else 4)
    found, _ = contenders(case.rule)
    if exact:
        found = {"fastopt": Fastopt, "exact": Exact}
    if exact or (case.series == "size" and case.rows < 10**7):
        found["dense"] = Dense
    subjects = {}
    for name, contender in found.items():
        subjects[name] = subject = contender(memory, threads)
        subject.take(batches, itertools.count())
        if name not in ("exact", "dense"):
            check(name, subject, batches[:2])
    turns = itertools.cycle(range(len(batches)))  # of all: nobody finds rows that another fetched
    for subject in subjects.values():
        subject.turns = turns
    if exact:
        subjects["exact"].turns = itertools.cycle(range(len(batches)))
        subjects["exact"].train()
    subjects["fastopt"].begin()
    warm = Interleaved({"fastopt": subjects["fastopt"]}, settle_s=0)
    for _ in range(warm.rounds(WARM_STEPS_S, 2, 20)):
        warm.round()
    interleaved = Interleaved(subjects, settle_s=SETTLE_S)
    for _ in range(interleaved.rounds(seconds, 5, 101)):
        interleaved.round()
    touched = np.mean([len(np.unique(batch.indices)) for batch in batches[:20]])
    return {name: interleaved.timing(name).median for name in subjects}, float(touched)


def run(cases, counts, seconds):
    """Yield a result for each case and number of threads, those on one table after each other."""
    checked = set()
    order = sorted(cases, key=lambda case: (case.rule, case.rows * case.width, case.width))
    for (rule, rows, width), group in itertools.groupby(order, key=lambda case: case[:3]):
        for threads in counts:
            if (rule, width, threads) not in checked:
                check_formulas(rule, width, threads)
                check_exact(rule, width, threads)
                checked.add((rule, width, threads))
        needed, free = Memory.bytes(rule, rows, width), available()
        if free is not None and needed + RESERVE > free:
            print(f"{rule}, {rows} x {width}: left out, it needs {needed / 1e9:.1f} GB, and "
                  f"{free / 1e9:.1f} are free")  # fmt: skip
            continue
        memory = Memory(rule, rows, width)
        for case, threads in itertools.product(group, counts):
            times, touched = measure(memory, case, threads, seconds)
            yield {**case._asdict(), "threads": threads, "touched": touched, "seconds": times}
            gc.collect()
        del memory


NAMES = ("limit", "fastopt", "numba", "torch", "numpy", "exact", "dense")
TITLES = {
    "limit": "limit: the same rows read and written",
    "fastopt": "fastopt, Rows",
    "numba": "numba, a loop by hand",
    "torch": "PyTorch, sparse",
    "numpy": "NumPy on the rows",
    "dense": "fastopt, dense",
}
OTHER_STYLES = {
    "limit": {"color": "0.7", "linewidth": 5, "zorder": 1},
    "dense": {"color": "#D55E00", "marker": "o", "linestyle": "dotted"},
}
RATIOS = (
    ("fastopt", "limit"),
    ("numba", "fastopt"),
    ("torch", "fastopt"),
    ("numpy", "fastopt"),
    ("exact", "fastopt"),
    ("dense", "exact"),
)
LINE = "{:8} {:>9} {:>6} {:>8} {:>8} {:>8} {:>3}" + " {:>9}" * len(NAMES) + " {:>8}" * len(RATIOS)


def print_result(result):
    us = {name: s * 1e6 for name, s in result["seconds"].items()}
    ratios = [f"{us[a] / us[b]:.2f}" if a in us and b in us else "" for a, b in RATIOS]
    print(
        LINE.format(
            *(result[key] for key in ("rule", "rows", "width", "skew", "lookups")),
            f"{result['touched']:.0f}",
            result["threads"],
            *(f"{us[name]:.1f}" if name in us else "" for name in NAMES),
            *ratios,
        ),
        flush=True,
    )


def write(folder, results, missing):
    packages = {}
    for name in ("fastopt", "numpy", "numba", "torch"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    content = {
        "versions": {**packages, "python": platform.python_version(), "processor": processor()},
        "build_info": fastopt.build_info(),
        "missing": missing,
        "results": results,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.json").write_text(json.dumps(content, indent=1) + "\n")


def draw(path, results):
    """Draw the time over the rows that a batch touches, and over those that the table has."""
    panels = (
        ("lookups", "touched", "rows that a batch touches, of 1,000,000 x 64, Zipf", "Zipf"),
        ("size", "rows", "rows of the table, of which a batch looks up 1024", 1024),
    )
    figure = Figure(figsize=(10, 5), layout="constrained")
    for axes, (series, x, label, kind) in zip(figure.subplots(1, 2), panels, strict=True):
        shown = [r for r in results if r["series"] == series and kind in (r["skew"], r["lookups"])]
        for name in NAMES:
            points = {}
            for r in shown:  # each with its better number of threads
                if name in r["seconds"]:
                    us = r["seconds"][name] * 1e6
                    points[r[x]] = min(us, points.get(r[x], us))
            if points:
                axes.plot(*zip(*sorted(points.items()), strict=True), label=TITLES[name],
                          **{**LOOK, **STYLES.get(name, OTHER_STYLES.get(name, {}))})  # fmt: skip
        axes.set(xscale="log", yscale="log", xlabel=label, ylabel="microseconds a step")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(axis="y", color="0.9", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
    most = max(r["threads"] for r in results)
    figure.suptitle(
        f"A step of Adam by rows, float32  ({processor()}, {up_to(most)})", x=0.01, ha="left"
    )
    handles = {}
    for axes in figure.axes:
        handles |= dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=130)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--all", action="store_true", help="every case: an hour")
    for field, kind in (("series", str), ("rule", str), ("rows", int), ("width", int),
                        ("skew", str), ("lookups", int)):  # fmt: skip
        parser.add_argument(f"--{field}", type=kind, nargs="+", help="only these of the cases")
    counts = sorted({1, fastopt.get_num_threads()})
    parser.add_argument("--threads", type=int, nargs="+", default=counts, help="1, and all")
    parser.add_argument("--seconds", type=float, default=2.0, help="about, for each line (2)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="rows.json, rows.png")
    args = parser.parse_args()
    cases = [
        case
        for case in (all_cases() if args.all else default_cases())
        if all(getattr(case, name) in (getattr(args, name) or [getattr(case, name)])
               for name in ("series", "rule", "rows", "width", "skew", "lookups"))
    ]  # fmt: skip
    if not cases:
        parser.error("no case is like that")
    _, missing = contenders("Adam")
    for name, why in missing.items():
        print(f"{name}: left out, {why}")
    print(f"{processor()}; microseconds, medians; f: fastopt, th: threads, up to")
    ratios = [f"{a}/{b}".replace("fastopt", "f") for a, b in RATIOS]
    print(LINE.format(*Case._fields[:-1], "touched", "th", *NAMES, *ratios))
    results = []
    for result in run(cases, args.threads, args.seconds):
        print_result(result)
        results.append(result)
        if args.out:
            write(args.out, results, missing)
    if args.out and results:
        draw(args.out / "rows.png", results)


if __name__ == "__main__":
    main()
