"""The rows of the table, from the runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fastopt.compare.run import Comparison, Run


@dataclass(frozen=True)
class Row:
    """An algorithm: means over its runs, and their standard deviations; None if any diverged.

    A spread is None where there is one run only. Times are medians over all steps, and the
    optimizer's share is that of its median in that of forward, backward and optimizer together.
    """

    algorithm: str
    lr: float
    runs: int
    diverged: int
    training_loss: float | None
    training_loss_spread: float | None
    test_score: float | None
    test_score_spread: float | None
    epochs_to_common_loss: float | None
    optimizer_us: float
    optimizer_share: float
    state_bytes: float


@dataclass(frozen=True)
class Summary:
    """All rows, and the best training loss that every run reaches which did not diverge."""

    common_loss: float | None
    rows: list[Row]

    def as_dict(self) -> dict[str, Any]:
        """Return it as it stands in results.json."""
        return asdict(self)


def summarize(comparison: Comparison) -> Summary:
    """Make a row for each algorithm that has finished a run."""
    by_algorithm: dict[str, list[Run]] = {}
    for run in comparison.runs:
        by_algorithm.setdefault(run.algorithm, []).append(run)
    converged = [runs for runs in by_algorithm.values() if not any(run.diverged for run in runs)]
    best = [min(losses(run)[1:]) for runs in converged for run in runs]
    common = max(best, default=None)
    return Summary(common, [_row(runs, common) for runs in by_algorithm.values()])


def losses(run: Run) -> list[float]:
    """Return the training losses, from before the first epoch on, until it diverged."""
    return [epoch.training_loss for epoch in run.epochs if epoch.training_loss is not None]


def _row(runs: Sequence[Run], common: float | None) -> Row:
    diverged = sum(run.diverged for run in runs)
    loss = loss_spread = score = score_spread = reached = None
    if not diverged:
        last = [run.epochs[-1] for run in runs]
        loss, loss_spread = _mean_and_spread([e.training_loss for e in last])
        score, score_spread = _mean_and_spread([e.test_score for e in last])
        reached = statistics.fmean(_reached(run, common) for run in runs)
    optimizer_us = statistics.median(us for run in runs for us in run.optimizer_us)
    return Row(
        runs[0].algorithm,
        runs[0].hyperparameters["lr"],
        len(runs),
        diverged,
        loss,
        loss_spread,
        score,
        score_spread,
        reached,
        optimizer_us,
        optimizer_us / statistics.median(us for run in runs for us in run.step_us),
        runs[0].state_bytes,
    )


def _reached(run: Run, common: float | None) -> int:
    """Return the first epoch with a training loss as good as `common`."""
    assert common is not None
    return next(e for e, loss in enumerate(losses(run)) if e > 0 and loss <= common)


def _mean_and_spread(values: Sequence[float | None]) -> tuple[float, float | None]:
    numbers = [value for value in values if value is not None]
    return statistics.fmean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else None


# ---- in words -----------------------------------------------------------------------------------


def headings(comparison: Comparison, summary: Summary) -> list[str]:
    """Return the headings of the table's columns."""
    common = "-" if summary.common_loss is None else number(summary.common_loss)
    return [
        "algorithm",
        "learning rate",
        "training loss",
        f"test {score_name(comparison)}",
        f"epochs to loss {common}",
        "optimizer µs a step",
        "bytes of state a weight" if stored(comparison) else "share of training time",
    ]


def cells(comparison: Comparison, row: Row) -> list[str]:
    """Return a row of the table as text."""
    percent = comparison.data.task == "classification"
    if row.diverged:
        of = "-" if row.runs == 1 else f"{row.diverged} of {row.runs} runs"
        loss, score, reached = "diverged", of, "-"
    else:
        assert row.training_loss is not None
        assert row.epochs_to_common_loss is not None
        loss = number(row.training_loss)
        score = _with_spread(row.test_score, row.test_score_spread, percent)
        reached = f"{row.epochs_to_common_loss:.{int(row.runs > 1)}f}"
    return [
        row.algorithm,
        f"{row.lr:g}",
        loss,
        score,
        reached,
        f"{row.optimizer_us:.1f}",
        f"{row.state_bytes:.2f}" if stored(comparison) else f"{100 * row.optimizer_share:.0f} %",
    ]


def stored(comparison: Comparison) -> bool:
    """Tell whether algorithms are compared in several storages."""
    return any(variant.param_dtype for variant in comparison.settings.variants)


def score_name(comparison: Comparison) -> str:
    """Return what a score is."""
    return "accuracy" if comparison.data.task == "classification" else "R2"


def loss_name(comparison: Comparison) -> str:
    """Return what the loss is."""
    if comparison.data.task == "classification":
        return "cross-entropy"
    return "mean squared error / variance"


def number(value: float) -> str:
    """Return a loss with four digits behind the point, or in exponents where those say little."""
    return f"{value:.4f}" if 1e-3 <= value < 1e5 or value == 0 else f"{value:.1e}"


def _with_spread(mean: float | None, spread: float | None, percent: bool) -> str:
    assert mean is not None
    factor, digits, unit = (100, 1, " %") if percent else (1, 3, "")
    text = f"{factor * mean:.{digits}f}"
    if spread is not None:
        text += f" ± {factor * spread:.{digits}f}"
    return text + unit


def verdict(comparison: Comparison, summary: Summary) -> str:
    """Say which algorithm has the best test score, which are too near to tell, and what to try."""
    rows = [row for row in summary.rows if row.test_score is not None]
    if not rows:
        return "Every algorithm diverged: lower learning rates may help (--lr)."
    percent = comparison.data.task == "classification"
    test_rows = len(comparison.data.test.x)

    def end(row: Row, side: int) -> float:
        score, spread = row.test_score or 0.0, row.test_score_spread or 0.0
        return score + side * math.hypot(spread, _sampling_error(score, test_rows, percent))

    best = max(rows, key=lambda row: row.test_score or 0.0)
    text = _with_spread(best.test_score, best.test_score_spread, percent)
    near = [r.algorithm for r in rows if r is not best and end(r, 1) >= end(best, -1)]
    said = f"Best test {score_name(comparison)}: {best.algorithm}, {text}"
    if near:
        said += f"; on {test_rows} test rows too close to tell from it: {', '.join(near)}"
    return said + "." + _at_the_ends(comparison, rows)


def _sampling_error(score: float, rows: int, accuracy: bool) -> float:
    """Return how far other test rows may move a score: about its standard deviation.

    An accuracy is binomial; the squares that R2 sums up spread as those of normal errors do.
    """
    return math.sqrt(score * (1 - score) / rows) if accuracy else (1 - score) * math.sqrt(2 / rows)


def _at_the_ends(comparison: Comparison, rows: Sequence[Row]) -> str:
    """Name the algorithms that chose the first or last of the learning rates tried."""
    said = ""
    for pick, tried, other in ((min, "lowest", "lower"), (max, "highest", "higher")):
        names = []
        for row in rows:
            rates = [trial.lr for trial in comparison.trials if trial.algorithm == row.algorithm]
            if rates and row.lr == pick(rates):
                names.append(row.algorithm)
        if names:
            said += (
                f" The {tried} learning rate tried was the best for {', '.join(names)}: a {other} "
                "one may be better (--lr)."
            )
    return said


def description(comparison: Comparison) -> list[str]:
    """Say in a few lines what the data, the model and the training are."""
    about, settings = comparison.data.description, comparison.settings
    rows = about["rows"]
    what = f"{len(about['classes'])} classes" if about["classes"] else "regression"
    columns = []
    for kind in ("numeric", "categorical"):
        count = len(about[f"{kind}_columns"])
        if count:
            columns.append(f"{count} {kind} column{'s' * (count != 1)}")
    filled = f" ({about['missing_values']} missing values filled)" * bool(about["missing_values"])
    layers = " - ".join(map(str, comparison.layers))
    seeds = f"{settings.seeds} seeds" if settings.seeds > 1 else "1 seed"
    return [
        f"{about['name']}: {what} of {about['target']!r} from "
        f"{' and '.join(columns)}{filled}; {rows['training']} rows to train on, "
        f"{rows['validation']} to validate, {rows['test']} to test",
        f"{'Network' if settings.hidden else 'Linear model'} {layers}, {settings.dtype}; "
        f"{settings.epochs} epochs in batches of {settings.batch_size}, {settings.schedule} "
        f"learning rate, {seeds}",
        *_storage(comparison),
    ]


def _storage(comparison: Comparison) -> list[str]:
    if not stored(comparison):
        return []
    settings, masters = comparison.settings, ""
    if {*settings.param_dtypes} - {"float32"}:
        masters = f", {'with' if settings.master_weights else 'without'} master weights"
    return [
        f"In parentheses: what parameters and state are stored in{masters}; the learning rate is "
        "that of the algorithm in float32"
    ]
