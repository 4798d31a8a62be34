"""What remains of a comparison: the table, results.json and comparison.png."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import fastopt
from fastopt._files import replace
from fastopt.compare.run import LAYERS, Run, Settings

# Colours of Okabe and Ito, which stay apart for colour-blind readers; marker and dash say it again.
STYLES: dict[str, dict[str, Any]] = {
    "sgd": {"color": "#56B4E9", "marker": "o", "linestyle": (0, (1, 1))},
    "momentum": {"color": "#0072B2", "marker": "s", "linestyle": (0, (4, 1.5))},
    "adagrad": {"color": "#E69F00", "marker": "^", "linestyle": (0, (4, 1.5, 1, 1.5))},
    "rmsprop": {"color": "#009E73", "marker": "D", "linestyle": (0, (7, 2))},
    "adam": {"color": "#D55E00", "marker": "v", "linestyle": "-"},
}


def print_table(runs: Sequence[Run]) -> None:
    """Print one row a run to standard output."""
    table = Table(box=SIMPLE_HEAD)
    table.add_column("algorithm")
    for heading in (
        "learning\nrate",
        "final training\nloss",
        "test\naccuracy",
        "optimizer\nus a step",
        "share of\ntraining time",
    ):
        table.add_column(heading, justify="right")
    for run in runs:
        last = run.epochs[-1]
        table.add_row(
            run.algorithm,
            f"{run.hyperparameters['lr']:g}",
            "diverged" if last.loss is None else f"{last.loss:.4f}",
            "-" if last.loss is None else f"{last.test_accuracy:.2%}",
            f"{run.optimizer_us_median:.1f}",
            f"{run.optimizer_share:.1%}",
        )
    Console().print(table)


def write_results(path: Path, settings: Settings, runs: Sequence[Run]) -> None:
    """Write everything that was set and measured as JSON.

    Equal settings and versions give an equal file, but for the three times of each run.

    Parameters
    ----------
    path : Path
        Replaced only once the new text is complete.
    settings : Settings
        What the user chose.
    runs : sequence of Run
        The finished runs.
    """
    results = {
        "settings": {**asdict(settings), "layers": LAYERS, "dtype": "float32"},
        "versions": {
            "fastopt": fastopt.__version__,
            "numpy": np.__version__,
            "scikit-learn": version("scikit-learn"),
            "python": platform.python_version(),
            "platform": platform.platform(),
        },
        "build_info": fastopt.build_info(),
        "runs": [asdict(run) for run in runs],
    }
    replace(path, (json.dumps(results, indent=2, allow_nan=False) + "\n").encode())


def write_figure(path: Path, runs: Sequence[Run]) -> None:
    """Draw training loss and test accuracy over the epochs as a PNG.

    Parameters
    ----------
    path : Path
        Replaced only once the new picture is complete.
    runs : sequence of Run
        One line each in both panels; it ends where a run diverged.
    """
    figure = Figure(figsize=(10, 4.2), layout=ConstrainedLayoutEngine(wspace=0.06))
    left, right = figure.subplots(1, 2)
    for run in runs:
        finite = [epoch for epoch in run.epochs if epoch.loss is not None]
        epochs = [epoch.epoch for epoch in finite]
        style = {
            **STYLES[run.algorithm],
            "label": run.algorithm + " (diverged)" * run.diverged,
            "linewidth": 1.6,
            "markersize": 4.5,
            "markevery": 1 + len(epochs) // 30,
            "markeredgecolor": "white",
            "markeredgewidth": 0.6,
        }
        left.plot(epochs, [epoch.loss for epoch in finite], **style)
        right.plot(epochs, [epoch.test_accuracy for epoch in finite], **style)

    left.set(yscale="log", ylabel="training loss (cross-entropy)")
    right.set(ylabel="test accuracy")
    right.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
    for axes in (left, right):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
        axes.grid(color="0.9", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(
        *left.get_legend_handles_labels(), loc="outside upper center", ncols=5, frameon=False
    )

    png = BytesIO()
    figure.savefig(png, format="png", dpi=150)
    replace(path, png.getvalue())
