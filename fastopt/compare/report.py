"""What remains of a comparison: the table, results.json, comparison.png and report.html."""

from __future__ import annotations

import base64
import json
import platform
import textwrap
from dataclasses import asdict
from html import escape
from importlib.metadata import version
from pathlib import Path
from string import Template
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import fastopt
from fastopt._files import replace
from fastopt.compare import figure
from fastopt.compare.run import Comparison
from fastopt.compare.summary import (
    Summary,
    cells,
    description,
    headings,
    loss_name,
    score_name,
    summarize,
    verdict,
)

FORMAT = 1  # of results.json; goes up when a reader of the old one would be wrong


def print_table(comparison: Comparison, console: Console) -> None:
    """Print a row an algorithm, and what to read from them."""
    summary = summarize(comparison)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for i, heading in enumerate(headings(comparison, summary)):
        lines = "\n".join(textwrap.wrap(heading, 9))
        side: dict[str, Any] = {"justify": "right", "no_wrap": True} if i else {"overflow": "fold"}
        table.add_column(lines, **side)
    for row in summary.rows:
        table.add_row(*cells(comparison, row))
    console.print(table)
    said = verdict(comparison, summary)
    console.print(said, markup=False, highlight=False, soft_wrap=not console.is_terminal)


def write(folder: Path, comparison: Comparison) -> list[Path]:
    """Write all files into a folder; each replaces an older one only once it is complete.

    Parameters
    ----------
    folder : Path
        It exists.
    comparison : Comparison
        With one finished run at least.

    Returns
    -------
    list of Path
        What was written.
    """
    results, plot, page = (folder / n for n in ("results.json", "comparison.png", "report.html"))
    summary = summarize(comparison)
    replace(results, _json(comparison, summary))  # before the drawing, which takes a second
    curves = figure.curves(comparison)
    replace(plot, curves)
    replace(page, _page(comparison, summary, curves, figure.search(comparison)))
    return [results, plot, page]


def _json(comparison: Comparison, summary: Summary) -> bytes:
    """Return all that was set and found; docs/compare.md says what is where."""
    results = {
        "format": FORMAT,
        "complete": len(comparison.runs) == comparison.planned,
        "settings": asdict(comparison.settings),
        "data": comparison.data.description,
        "layers": comparison.layers,
        "versions": _versions(),
        "build_info": fastopt.build_info(),
        "search": [asdict(trial) for trial in comparison.trials],
        "runs": [run.as_dict() for run in comparison.runs],
        "summary": summary.as_dict(),
    }
    return (json.dumps(results, indent=2, allow_nan=False) + "\n").encode()


def _versions() -> dict[str, str]:
    return {
        "fastopt": fastopt.__version__,
        **{name: version(name) for name in ("numpy", "scikit-learn")},
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


# ---- the page -----------------------------------------------------------------------------------

_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
body { max-width: 62rem; margin: 2.5rem auto; padding: 0 1.25rem; color: #1b1b1b;
       background: #fff; font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin-bottom: .4rem; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .5rem; }
.verdict { font-size: 1.1rem; padding: .7rem 1rem; border-left: .3rem solid #0072b2;
           background: #f2f7fa; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .7rem; text-align: right; border-bottom: 1px solid #ddd; }
td { white-space: nowrap; }
thead th { vertical-align: bottom; border-bottom: 2px solid #555; line-height: 1.25; }
th:first-child { text-align: left; padding-left: 0; }
tbody th { font-weight: 600; }
figcaption { color: #555; font-size: .9rem; padding-top: .5rem; }
figure { margin: 0; }
img { max-width: 100%; height: auto; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.2rem; margin: 0; }
dt { color: #555; } dd { margin: 0; overflow-wrap: anywhere; }
</style>
</head>
<body>
<h1>$title</h1>
$paragraphs
<p class="verdict">$verdict</p>
<figure>
<div class="wide">
<table>
<thead><tr>$headings</tr></thead>
<tbody>
$rows
</tbody>
</table>
</div>
<figcaption>$caption</figcaption>
</figure>
<h2>Training loss</h2>
<figure>
<img alt="Training loss over epochs, left, and over seconds, right, a line an algorithm"
 width="1500" src="data:image/png;base64,$curves">
<figcaption>Over all of the training split, after each epoch$shade. A step is drawn as long as its
median: forward and backward, which are the same work, over all algorithms, the optimizer over its
own steps.</figcaption>
</figure>
$search
<h2>How it was done</h2>
<p>$method</p>
<dl>
$settings
</dl>
</body>
</html>
""")

_SEARCH = Template("""<h2>Choice of the learning rate</h2>
<figure>
<img alt="Validation loss over the learning rate, a line an algorithm" width="1500"
 src="data:image/png;base64,$image">
<figcaption>Mean loss on the validation split over the last quarter of the epochs$seeds. The large
marks are the rates chosen; where a line leaves the picture or breaks off, a rate is of no
use.</figcaption>
</figure>""")


def _page(comparison: Comparison, summary: Summary, curves: bytes, search: bytes | None) -> bytes:
    """Return a page that needs nothing besides itself."""
    settings = comparison.settings
    several = settings.seeds > 1
    rows = "\n".join(
        "<tr>"
        + "".join(
            f'<th scope="row">{escape(cell)}</th>' if i == 0 else f"<td>{escape(cell)}</td>"
            for i, cell in enumerate(cells(comparison, row))
        )
        + "</tr>"
        for row in summary.rows
    )
    caption = (
        f"Loss: {loss_name(comparison)}, after the last epoch. "
        + f"Means over {settings.seeds} seeds, ± the standard deviation. " * several
        + "The loss to reach is the best one that all of them reach. Times are of the machine that "
        "this ran on; a step is one update of all parameters."
    )
    chosen = (
        "For each algorithm the learning rate with the lowest loss on the validation split was "
        "taken from a list, the same for all. "
        if comparison.trials
        else ""
    )
    method = (
        f"{chosen}The test split was used for the table's {score_name(comparison)} alone. With the "
        "same seed, every algorithm began with the same weights and saw the same batches in the "
        "same order."
    )
    facts = {
        **{k: v for k, v in asdict(settings).items() if k not in ("lr", "threads")},
        "learning rates given": settings.lr or "none",
        "threads of a step": settings.threads or fastopt.get_num_threads(),
        **_versions(),
    }
    page = _PAGE.substitute(
        title=escape(f"fastopt compare: {comparison.data.description['name']}"),
        paragraphs="\n".join(f"<p>{escape(line)}.</p>" for line in description(comparison)),
        verdict=escape(verdict(comparison, summary)),
        caption=escape(caption),
        headings="".join(
            f'<th scope="col">{escape(text)}</th>' for text in headings(comparison, summary)
        ),
        rows=rows,
        curves=base64.b64encode(curves).decode(),
        shade="; the shade spans all seeds" * several,
        search=_SEARCH.substitute(
            image=base64.b64encode(search).decode(), seeds=" and all seeds" * several
        )
        if search
        else "",
        method=escape(method),
        settings="\n".join(
            f"<dt>{escape(name.replace('_', ' '))}</dt><dd>{escape(_said(value))}</dd>"
            for name, value in facts.items()
        ),
    )
    return page.encode()


def _said(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {number:g}" for name, number in value.items())
    if isinstance(value, (tuple, list)):
        return ", ".join(map(str, value)) or "none"
    return str(value)
