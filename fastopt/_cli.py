"""What the commands share: arguments, errors in one line, and folders to write to."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """Reports an error in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see '{self.prog} --help')\n")


def integer(low: int, high: int) -> Callable[[str], int]:
    """Return an argument type: a whole number from `low` to `high`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(
                f"must be a whole number from {low} to {high}, not {text!r}"
            )
        return value

    return parse


def some_of(known: Collection[str], what: str = "type") -> Callable[[str], tuple[str, ...]]:
    """Return an argument type: one or several of these, with commas between."""

    def parse(text: str) -> tuple[str, ...]:
        names = tuple(name.strip() for name in text.split(","))
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(
                    f"no {what} {name!r}; there are {', '.join(known)}"
                )
        if len(set(names)) < len(names):
            raise argparse.ArgumentTypeError(f"each name once, not {text!r}")
        return names

    return parse


def fail(message: str, status: int) -> int:
    print(f"fastopt: error: {message}", file=sys.stderr)
    return status


def make_writable(folder: Path) -> None:
    """Make a folder, and find out before the work, not after it, that it cannot be written to."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass
