"""What remains of ``fastopt bench --storage``: tables, storage.json and storage.png."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from fastopt._files import replace
from fastopt.bench.check import TRAVEL_TOLERANCE
from fastopt.bench.peers import STORAGE_NAMES, TITLES
from fastopt.bench.report import LOOK, SPOKEN, STYLES, missing, processor, short, up_to
from fastopt.bench.run import LIMIT
from fastopt.bench.storage import OWN, Result, Row

_HEADINGS = (
    ("", "left"),
    ("storage", "left"),
    ("bytes", "right"),
    ("µs a\nstep", "right"),
    ("GB/s", "right"),
    ("times\nfloat32", "right"),
    ("times\nlimit", "right"),
    ("way of the\nweights", "right"),
)
_LINE: dict[str, Any] = {"color": "0.6", "linewidth": 1.5, "zorder": 1}


def print_tables(results: Sequence[Result]) -> None:
    """Print a table a workload, whose numbers are wrong, and who is missing."""
    console = Console()
    for result in results:
        title = f"{result.workload.title} ({result.rule.name}, {up_to(result.threads)})"
        console.print(f"\n{title}", highlight=False)
        console.print(_table(result))
    faults = {_who(row): row.fault for result in results for row in result.rows if row.fault}
    for who, fault in faults.items():
        console.print(f"Wrong: {who}: {fault}", markup=False, highlight=False)
    for line in missing(results):
        console.print(f"Missing: {line}", markup=False, highlight=False)
    about = (
        "Bytes: read and written, an element and step. Times limit: over moving as many bytes. Way "
        "of the weights: over the exact one, with gradients of about 1, then of 0.01; within "
        f"{TRAVEL_TOLERANCE:.0%} of 1 if right."
    )
    console.print(about, markup=False, highlight=False)


def _table(result: Result) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for heading, side in _HEADINGS:
        table.add_column(heading, justify="left" if side == "left" else "right")
    for row in result.rows:
        way = "" if row.travel is None else " ".join(f"{share:.2f}" for share in row.travel)
        table.add_row(
            row.name,
            row.storage,
            f"{row.bytes_an_element:.1f}",
            short(row.us),
            short(row.GB_per_s),
            f"{row.to_float32:.2f}",
            f"{row.to_limit:.2f}",
            f"{way} wrong" if row.fault else way,
        )
    return table


def _who(row: Row) -> str:
    return f"{row.name}, {row.storage}"


def write_figure(path: Path, results: Sequence[Result]) -> None:
    """Draw times over float32's, over the bytes of a step, a panel a workload, as a PNG.

    Parameters
    ----------
    path : Path
        Replaced only once the new picture is complete.
    results : sequence of Result
        Of one rule and number of threads.
    """
    figure = Figure(figsize=(10, 6), layout=ConstrainedLayoutEngine(wspace=0.03))
    panels = figure.subplots(1, len(results), sharey=True, squeeze=False)[0]
    for axes, result in zip(panels, results, strict=True):
        _draw(axes, result)
    ratios = [row.to_float32 for result in results for row in result.rows]
    panels[0].set(yscale="log", ylabel="time over that of fastopt in float32")
    panels[0].set_ylim(min(ratios) / 1.6, max(ratios) * 1.4)
    ticks = [
        tick
        for tick in (0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
        if tick < 1.4 * max(ratios)
    ]
    panels[0].set_yticks([tick for tick in ticks if tick > min(ratios) / 1.6])
    panels[0].yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panels[0].minorticks_off()
    rule, threads = results[0].rule.name, results[0].threads
    figure.suptitle(
        f"A step of {SPOKEN[rule]} over what is stored in fewer bits  "
        f"({processor()}, {up_to(threads)})",
        x=0.01,
        ha="left",
        fontsize=11,
    )
    figure.legend(
        handles=_legend(results),
        loc="outside lower center",
        ncols=4,
        frameon=False,
        fontsize=9,
    )
    png = BytesIO()
    figure.savefig(png, format="png", dpi=150)
    replace(path, png.getvalue())


def _legend(results: Sequence[Result]) -> list[Line2D]:
    there = {row.name for result in results for row in result.rows}
    marks = [
        Line2D([], [], label=TITLES[name], **_mark(name, wrong=False))
        for name in STORAGE_NAMES
        if name in there
    ]
    line = Line2D([], [], label="moving the bytes, computing nothing", **_LINE)
    if any(row.fault for result in results for row in result.rows):
        hollow: dict[str, Any] = {"color": "0.4", "marker": "o", "linestyle": "none"}
        hollow["markerfacecolor"] = "none"
        marks.append(Line2D([], [], label="hollow: the numbers are wrong", **hollow))
    return [*marks, line]


def _mark(name: str, wrong: bool) -> dict[str, Any]:
    style = {**LOOK, **STYLES[name], "linestyle": "none", "markersize": 8}
    if wrong:
        style |= {"markerfacecolor": "none", "markeredgecolor": style["color"]}
        style["markeredgewidth"] = 1.4
    return style


def _draw(axes: Axes, result: Result) -> None:
    """Draw a mark for each candidate and storage, under the names of the storages."""
    plain, limit = result.rows[:2]
    own = [row for row in result.rows if row.name == OWN]
    most = 1.06 * max(row.bytes_an_element for row in result.rows)
    places = np.linspace(most / 50, most, 200)
    axes.plot(places, limit.to_float32 * places / plain.bytes_an_element, **_LINE)
    for row in result.rows:
        if row.name != LIMIT:
            axes.plot(row.bytes_an_element, row.to_float32, **_mark(row.name, bool(row.fault)))
    for row in own:
        axes.axvline(row.bytes_an_element, color="0.9", linewidth=0.7, zorder=0)
    stored: dict[float, list[str]] = {}
    for row in own:
        stored.setdefault(row.bytes_an_element, []).append(row.storage)
    names = axes.secondary_xaxis("top")
    names.set_xticks(
        list(stored),
        ["\n".join(storages) for storages in stored.values()],
        rotation=40,
        ha="left",
        rotation_mode="anchor",
        fontsize=8,
    )
    names.tick_params(length=0, pad=2)
    names.spines["top"].set_visible(False)
    about = "bytes read and written, an element and step"
    axes.set(xlim=(0, most), xlabel=f"{result.workload.title}: {about}")
    axes.grid(axis="y", color="0.9", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
