"""What shows while it runs: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from time import monotonic
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as RichProgress
from rich.table import Column


class Progress:
    """Is told of everything that begins and ends, and keeps it to itself."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass

    def search(self, algorithm: str, lr: float, seed: int) -> None:
        """Begin a training that tries a learning rate."""

    def train(self, algorithm: str, lr: float, seed: int) -> None:
        """Begin a training that counts."""

    def step(self, loss: float) -> None:
        """Tell the loss of a batch, after its step."""

    def epoch(self, epoch: int, loss: float | None) -> None:
        """End an epoch, with this loss of the training split, None if it diverged."""

    def end(self) -> None:
        """End the training."""

    def searched(self, validation_loss: float | None) -> None:
        """Tell what a learning rate led to, over all seeds."""


class Lines(Progress):
    """Prints a line for each learning rate tried, and one for each epoch trained."""

    def __init__(self, epochs: int) -> None:
        self._epochs = epochs
        self._searching = ""
        self._trained = False

    def search(self, algorithm: str, lr: float, seed: int) -> None:
        """Begin a training that tries a learning rate."""
        self._searching = f"{algorithm}, learning rate {lr:g}"

    def train(self, algorithm: str, lr: float, seed: int) -> None:
        """Begin a training that counts."""
        self._searching, self._trained = "", True
        print(f"\n{algorithm}, learning rate {lr:g}, seed {seed}")

    def epoch(self, epoch: int, loss: float | None) -> None:
        """End an epoch, with this loss of the training split, None if it diverged."""
        if not self._searching:
            print(f"Epoch [{epoch}/{self._epochs}], Loss: {_text(loss)}", flush=True)

    def searched(self, validation_loss: float | None) -> None:
        """Tell what a learning rate led to, over all seeds."""
        print("\n" * self._trained, end="")
        self._trained = False
        print(f"{self._searching}: validation loss {_text(validation_loss)}", flush=True)


class Bars(Progress):
    """Draws a bar for each algorithm, which are gone at the end.

    Parameters
    ----------
    console : rich.console.Console
        The terminal.
    trainings : mapping of str to int
        How many trainings each algorithm has.
    epochs : int
        How many epochs a training has.
    """

    # Nothing is drawn by a thread of its own, which would disturb what is timed.
    _EVERY_S = 0.1

    def __init__(self, console: Console, trainings: Mapping[str, int], epochs: int) -> None:
        self._epochs = epochs
        one_line = Column(no_wrap=True, overflow="ellipsis")
        self._bars = RichProgress(
            TextColumn("{task.description}", table_column=one_line),
            BarColumn(bar_width=14),
            TextColumn("{task.fields[what]}", markup=False, table_column=one_line),
            TextColumn("{task.fields[state]}", markup=False, table_column=one_line),
            console=console,
            auto_refresh=False,
            transient=True,
        )
        self._tasks = {
            algorithm: self._bars.add_task(algorithm, total=count * epochs, what="", state="")
            for algorithm, count in trainings.items()
        }
        self._ended = dict.fromkeys(trainings, 0)
        self._now = ""
        self._epoch, self._loss_sum, self._losses = 0, 0.0, 0
        self._last: float | None = None
        self._drawn = 0.0

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bars.stop()

    @property
    def _task(self) -> TaskID:
        return self._tasks[self._now]

    def _begin(self, algorithm: str, what: str) -> None:
        self._now = algorithm
        self._epoch, self._loss_sum, self._losses = 0, 0.0, 0
        self._bars.update(self._task, what=what, state="")

    def search(self, algorithm: str, lr: float, seed: int) -> None:
        """Begin a training that tries a learning rate."""
        self._begin(algorithm, f"try lr {lr:g}, seed {seed}")

    def train(self, algorithm: str, lr: float, seed: int) -> None:
        """Begin a training that counts."""
        self._begin(algorithm, f"lr {lr:g}, seed {seed}")

    def step(self, loss: float) -> None:
        """Tell the loss of a batch, after its step."""
        self._loss_sum += loss
        self._losses += 1
        if monotonic() - self._drawn >= self._EVERY_S:
            self._draw(self._epoch + 1, self._loss_sum / self._losses)

    def epoch(self, epoch: int, loss: float | None) -> None:
        """End an epoch, with this loss of the training split, None if it diverged."""
        self._epoch, self._loss_sum, self._losses, self._last = epoch, 0.0, 0, loss
        if monotonic() - self._drawn >= self._EVERY_S:
            self._draw(epoch, loss)

    def end(self) -> None:
        """End the training."""
        last, self._epoch = self._epoch, 0
        self._ended[self._now] += 1
        self._draw(last, self._last)

    def _draw(self, epoch: int, loss: float | None) -> None:
        done = self._ended[self._now] * self._epochs + self._epoch
        state = f"Epoch [{epoch}/{self._epochs}], Loss: {_text(loss)}"
        self._bars.update(self._task, completed=done, state=state)
        self._bars.refresh()
        self._drawn = monotonic()


def _text(loss: float | None) -> str:
    return "diverged" if loss is None else f"{loss:.4f}" if abs(loss) < 1e5 else f"{loss:.2e}"
