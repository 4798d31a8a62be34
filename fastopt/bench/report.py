"""What remains of a benchmark: tables, results.json and performance.png."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from io import BytesIO
from pathlib import Path
from typing import IO, Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import fastopt
from fastopt._files import replace
from fastopt.bench import storage
from fastopt.bench.peers import NAMES, TITLES
from fastopt.bench.run import LIMIT, Absent, Result, Row

# Colours of Okabe and Ito, which stay apart for colour-blind readers; the marker says it again.
STYLES: dict[str, dict[str, Any]] = {
    "fastopt": {"color": "#D55E00", "marker": "o", "linewidth": 2.6, "markersize": 7, "zorder": 4},
    "numba": {"color": "#0072B2", "marker": "s"},
    "torch": {"color": "#000000", "marker": "^"},
    "deepspeed": {"color": "#56B4E9", "marker": "v"},
    "optax": {"color": "#009E73", "marker": "D"},
    "numpy": {"color": "#CC79A7", "marker": "P"},
    "thinc": {"color": "#E69F00", "marker": "X"},
    "keras": {"color": "#7F7F7F", "marker": "*", "markersize": 8},
    # in another picture than those whose colours they have
    "bitsandbytes": {"color": "#0072B2", "marker": "s"},
    "torchao": {"color": "#009E73", "marker": "D"},
}
LOOK = {
    "linewidth": 1.5,
    "markersize": 5.5,
    "markeredgecolor": "white",
    "markeredgewidth": 0.6,
    "zorder": 3,
}
SPOKEN = {
    "sgd": "SGD",
    "momentum": "SGD with momentum",
    "adagrad": "Adagrad",
    "rmsprop": "RMSprop",
    "adam": "Adam",
    "adamw": "AdamW",
    "adamax": "Adamax",
    "adadelta": "Adadelta",
    "lion": "Lion",
    "nadam": "NAdam",
    "radam": "RAdam",
    "rprop": "Rprop",
    "clip-adam": "clipping, Adam and zeroing",
}
_PACKAGES = (
    "numpy",
    "numba",
    "torch",
    "deepspeed",
    "bitsandbytes",
    "torchao",
    "jax",
    "optax",
    "thinc",
    "keras",
    "tensorflow",
)


def tables(results: Sequence[Result]) -> dict[str, Table]:
    """Return microseconds a step, and the ratios to the limit, of candidates over workloads.

    Parameters
    ----------
    results : sequence of Result
        Of one rule, type and number of threads.

    Returns
    -------
    dict
        Tables by title. Each candidate is there with the number of threads that suits it better.
    """
    case = results[0].case
    of = f"{case.rule.name}, {case.dtype}, {up_to(case.threads)}"
    return {
        f"Microseconds a step ({of})": _table(results, lambda row: short(row.us)),
        "Times the limit": _table(results, lambda row: short(row.to_limit)),
    }


def _table(results: Sequence[Result], cell: Callable[[Row], str]) -> Table:
    table = Table(box=SIMPLE_HEAD)
    table.add_column("")
    for result in results:
        table.add_column(result.case.workload.name, justify="right")
    for name in (LIMIT, *NAMES):
        rows = [result.best(name) for result in results]
        if any(rows):
            table.add_row(name, *("-" if row is None else cell(row) for row in rows))
    return table


def short(value: float) -> str:
    """Return three digits, or all before the point."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:#.3g}"


def up_to(count: int) -> str:
    """Say how many threads a step may use."""
    return "1 thread" if count == 1 else f"up to {count} threads"


def missing(results: Sequence[Result | storage.Result]) -> list[str]:
    """Return who is missing, a line for each reason, with where if not everywhere."""
    where: dict[Absent, list[str]] = {}
    for result in results:
        for absent in result.absent:
            where.setdefault(absent, []).append(result.workload.name)
    lines: dict[str, list[str]] = {}
    for absent, names in where.items():
        there = "" if len(names) == len(results) else f" ({', '.join(names)})"
        lines.setdefault(f"{absent.why}{there}", []).append(absent.name)
    return [f"{', '.join(names)}: {why}" for why, names in lines.items()]


def print_tables(
    results: Sequence[Result], file: IO[str] | None = None, width: int | None = None
) -> None:
    """Print the tables, and who is missing, to standard output or another file."""
    console = Console(file=file, width=width)
    for title, table in tables(results).items():
        console.print(f"\n{title}", highlight=False)
        console.print(table)
    for line in missing(results):
        console.print(f"Missing: {line}", markup=False, highlight=False)


def write_results(path: Path, results: Sequence[Result | storage.Result]) -> None:
    """Write everything that was set and measured as JSON.

    Parameters
    ----------
    path : Path
        Replaced only once the new text is complete.
    results : sequence of Result
        The finished cases.
    """
    content = {
        "versions": {
            "fastopt": fastopt.__version__,
            **{name: _version(name) for name in _PACKAGES},
            "python": platform.python_version(),
            "platform": platform.platform(),
            "processor": processor(),
        },
        "build_info": fastopt.build_info(),
        "results": [result.as_dict() for result in results],
    }
    replace(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def processor() -> str:
    """Return the processor's name, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def write_figure(path: Path, results: Sequence[Result]) -> None:
    """Draw how many bytes a second each candidate moves, as a PNG.

    Left, one array over its size; right, models of several arrays.

    Parameters
    ----------
    path : Path
        Replaced only once the new picture is complete.
    results : sequence of Result
        Of one rule, type and number of threads.
    """
    case = results[0].case
    single = [result for result in results if len(result.case.workload.shapes) == 1]
    models = [result for result in results if len(result.case.workload.shapes) > 1]
    figure = Figure(figsize=(10, 5), layout=ConstrainedLayoutEngine(wspace=0.03))
    panels = figure.subplots(
        1, 2, sharey=True, squeeze=False, width_ratios=(5, 1 + 1.5 * len(models))
    )[0]
    sizes = [result.case.workload.elements for result in single]
    _draw(panels[0], single, sizes)
    _draw(panels[1], models, range(len(models)), linestyle="none")

    panels[0].set(xscale="log", yscale="log", xlabel="elements of one array", ylabel="GB/s")
    panels[0].yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panels[1].set_xlim(-0.5, len(models) - 0.5 if models else 0.5)
    panels[1].set_xticks(
        range(len(models)),
        [result.case.workload.title.replace(", ", "\n") for result in models],
    )
    for axes in panels:
        axes.grid(axis="y", color="0.9", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
    panels[1].spines["left"].set_visible(False)
    panels[1].tick_params(axis="y", which="both", left=False)
    panels[1].tick_params(axis="x", bottom=False)
    panels[0].set_title(
        f"A step of {SPOKEN[case.rule.name]} in {case.dtype}: the bytes that it has to move, over "
        f"its time  ({processor()}, {up_to(case.threads)})",
        loc="left",
        fontsize=11,
        pad=12,
    )
    absent = sorted({absent.name for result in results for absent in result.absent})
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside right center",
        frameon=False,
        fontsize=9,
        labelspacing=0.7,
        title=f"not here: {', '.join(absent)}" if absent else None,
        title_fontsize=8,
    )
    png = BytesIO()
    figure.savefig(png, format="png", dpi=150)
    replace(path, png.getvalue())


def _draw(axes: Axes, results: Sequence[Result], places: Sequence[float], **line: Any) -> None:
    """Draw a line a candidate, and the limit as a band from one thread to all."""
    limits = [[row.GB_per_s for row in result.rows if row.name == LIMIT] for result in results]
    ends = [min(rates) for rates in limits], [max(rates) for rates in limits]
    band: dict[str, Any] = {"facecolor": "0.86", "edgecolor": "0.7", "linewidth": 1, "zorder": 1}
    if not line:
        axes.fill_between(places, *ends, label="limit: the same bytes\nread and written", **band)
    else:
        for place, low, high in zip(places, *ends, strict=True):
            axes.fill_between([place - 0.25, place + 0.25], low, high, **band)
    for name in NAMES:
        best = [result.best(name) for result in results]
        points = [(x, row.GB_per_s) for x, row in zip(places, best, strict=True) if row]
        if points:
            axes.plot(
                *zip(*points, strict=True),
                label=TITLES[name],
                **{**LOOK, **STYLES[name], **line},
            )
