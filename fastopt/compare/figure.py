"""The plots, as PNG."""

from __future__ import annotations

import math
import statistics
import textwrap
from io import BytesIO
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from fastopt.compare.algorithms import GRID
from fastopt.compare.run import Comparison, Run
from fastopt.compare.summary import loss_name, losses, summarize

# Colours of Okabe and Ito, then of Tol, which stay apart for colour-blind readers; marker and dash
# say it again.
STYLES: dict[str, dict[str, Any]] = {
    "sgd": {"color": "#56B4E9", "marker": "o", "linestyle": (0, (1, 1))},
    "momentum": {"color": "#0072B2", "marker": "s", "linestyle": (0, (4, 1.5))},
    "nesterov": {"color": "#CC79A7", "marker": "P", "linestyle": (0, (4, 1, 1, 1, 1, 1))},
    "adagrad": {"color": "#E69F00", "marker": "^", "linestyle": (0, (4, 1.5, 1, 1.5))},
    "rmsprop": {"color": "#009E73", "marker": "D", "linestyle": (0, (7, 2))},
    "adam": {"color": "#D55E00", "marker": "v", "linestyle": "-"},
    "amsgrad": {"color": "#000000", "marker": "X", "linestyle": (0, (2, 2))},
    "adamw": {"color": "#7F7F7F", "marker": "*", "linestyle": (0, (9, 1.5, 2, 1.5))},
    "adamax": {"color": "#AA4499", "marker": "<", "linestyle": (0, (5, 1.5, 1, 1.5, 1, 1.5))},
    "adadelta": {"color": "#999933", "marker": "p", "linestyle": (0, (3, 3))},
    "lion": {"color": "#882255", "marker": ">", "linestyle": (0, (6, 1, 3, 1))},
    "nadam": {"color": "#DDCC77", "marker": "H", "linestyle": (0, (2, 1, 2, 3))},
    "radam": {"color": "#44AA99", "marker": "h", "linestyle": (0, (1, 3))},
    "rprop": {"color": "#332288", "marker": "d", "linestyle": (0, (8, 1, 1, 1))},
}
_LOOK: dict[str, Any] = {
    "linewidth": 1.7,
    "markersize": 5,
    "markeredgecolor": "white",
    "markeredgewidth": 0.6,
}


def _styles(comparison: Comparison) -> dict[str, dict[str, Any]]:
    """Return the look of each line: an algorithm's own, and for storages those that are free."""
    variants = comparison.settings.variants
    plain = {v.name: STYLES[v.algorithm] for v in variants if not v.param_dtype}
    free = [style for name, style in STYLES.items() if name not in plain] or [*STYLES.values()]
    others = [v.name for v in variants if v.param_dtype]
    return plain | {name: free[i % len(free)] for i, name in enumerate(others)}


def curves(comparison: Comparison) -> bytes:
    """Draw the training loss over the epochs and over the seconds.

    A line is the mean of an algorithm's runs, in the shade of their range; it ends where one of
    them diverged.
    """
    figure = Figure(figsize=(10, 4.6), layout=ConstrainedLayoutEngine(wspace=0.05))
    left, right = figure.subplots(1, 2, sharey=True)
    shown, epoch_seconds, styles = [], _epoch_seconds(comparison), _styles(comparison)
    for algorithm, runs in _by_algorithm(comparison).items():
        length = min(sum(e.training_loss is not None for e in run.epochs) for run in runs)
        epochs = [run.epochs[:length] for run in runs]
        loss = np.array([[e.training_loss for e in run] for run in epochs], dtype=float)
        seconds = np.arange(length) * epoch_seconds[algorithm]
        style = {
            **styles[algorithm],
            **_LOOK,
            "label": algorithm + " (diverged)" * any(run.diverged for run in runs),
            "markevery": 1 + length // 12,
        }
        for axes, x in ((left, np.arange(length)), (right, seconds)):
            axes.plot(x, loss.mean(axis=0), **style)
            axes.fill_between(
                x, loss.min(axis=0), loss.max(axis=0), color=style["color"], alpha=0.15, linewidth=0
            )
        shown.append(loss)
    _scale_losses(left, np.concatenate([loss.ravel() for loss in shown]))
    left.set(ylabel=f"training loss\n({loss_name(comparison)})", xlabel="epoch")
    left.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    if all(len(loss[0]) == 1 for loss in shown):  # no line at all: every algorithm diverged
        left.set_xlim(-0.05, 1)
        right.set_xlim(-0.05 * max(epoch_seconds.values()), max(epoch_seconds.values()))
    right.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    right.set(xlabel="seconds of training (forward, backward and optimizer)")
    for axes in (left, right):
        _tidy(axes)
    right.tick_params(axis="y", which="both", left=False)
    right.spines["left"].set_visible(False)
    about = f"{comparison.data.description['name']}: training loss of each algorithm"
    if comparison.settings.seeds > 1:
        about += f", mean and range of {comparison.settings.seeds} seeds"
    figure.suptitle(textwrap.fill(about, 110), x=0.01, ha="left", fontsize=12)
    figure.legend(
        *left.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=3 if any(run.diverged for run in comparison.runs) else 5 if len(shown) <= 5 else 4,
        frameon=False,
        handlelength=3.2,
    )
    return _png(figure)


def search(comparison: Comparison) -> bytes | None:
    """Draw the validation loss over the learning rates tried; None if none led to one."""
    if all(trial.validation_loss is None for trial in comparison.trials):
        return None
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots()
    for algorithm in dict.fromkeys(trial.algorithm for trial in comparison.trials):
        trials = [t for t in comparison.trials if t.algorithm == algorithm]
        points = [(t.lr, t.validation_loss) for t in trials if t.validation_loss is not None]
        if not points:
            continue
        style = {**STYLES[algorithm], **_LOOK}
        axes.plot(*zip(*points, strict=True), **style, label=algorithm)
        chosen = min(points, key=lambda point: point[1])
        large = {**style, "linestyle": "none", "markersize": 11, "markeredgecolor": "black"}
        axes.plot(*chosen, **large)
    drawn = np.concatenate([line.get_ydata() for line in axes.lines])
    axes.set(
        xscale="log", xlabel="learning rate", ylabel=f"validation loss\n({loss_name(comparison)})"
    )
    axes.set_xticks(GRID)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", which="minor", length=0)
    drawn = np.minimum(drawn, 3 * losses(comparison.runs[0])[0])  # what is of use
    _scale_losses(axes, drawn)
    _tidy(axes)
    figure.legend(loc="outside right center", frameon=False, handlelength=3.2)
    return _png(figure)


def _epoch_seconds(comparison: Comparison) -> dict[str, float]:
    """Return how long an epoch of each algorithm takes: its steps, each as long as the median one.

    Forward and backward are the same work for all, so their median is that over the runs of all:
    what else the machine did while one of them trained does not count against it.
    """
    steps = math.ceil(len(comparison.data.train.x) / comparison.settings.batch_size)
    model_us = statistics.median(
        step - optimizer
        for run in comparison.runs
        for step, optimizer in zip(run.step_us, run.optimizer_us, strict=True)
    )
    return {
        row.algorithm: 1e-6 * steps * (model_us + row.optimizer_us)
        for row in summarize(comparison).rows
    }


def _by_algorithm(comparison: Comparison) -> dict[str, list[Run]]:
    runs: dict[str, list[Run]] = {}
    for run in comparison.runs:
        runs.setdefault(run.algorithm, []).append(run)
    return runs


def _scale_losses(axes: Axes, values: np.ndarray) -> None:
    """Show these losses, on a logarithmic axis where they span more than a factor of five."""
    low, high = values[values > 0].min(initial=np.inf), values.max()
    if high > 5 * low:
        margin = (high / low) ** 0.05
        axes.set(yscale="log", ylim=(low / margin, high * margin))
        few = high < 1e4 * low
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(0, 1.05 * high or 1)


def _tidy(axes: Axes) -> None:
    axes.grid(color="0.9", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _png(figure: Figure) -> bytes:
    png = BytesIO()
    figure.savefig(png, format="png", dpi=150)
    return png.getvalue()
