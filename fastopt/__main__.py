"""The command line: ``fastopt info``, ``compare`` and ``bench``, also as ``python -m fastopt``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

import fastopt
from fastopt._cli import Parser, fail
from fastopt.bench import cli as bench
from fastopt.compare import cli as compare


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="fastopt",
        description="First-order optimizers for training on the CPU.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"fastopt {fastopt.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    info = commands.add_parser(
        "info",
        help="how this fastopt was built and what it uses here",
        description="Print how this fastopt was built and what it uses on this machine.",
        allow_abbrev=False,
    )
    info.add_argument("--json", action="store_true", help="print JSON")
    info.set_defaults(command=_info)

    compare.add(commands)
    bench.add(commands)
    return parser


def _info(args: argparse.Namespace) -> int:
    info = fastopt.build_info()
    if args.json:
        print(json.dumps(info, indent=2))
        return 0
    rows: dict[str, Any] = {}
    for name, value in info.items():
        if isinstance(value, dict):
            rows |= {f"{name} {key}": entry for key, entry in value.items()}
        else:
            rows[name] = value
    for name, value in rows.items():
        if isinstance(value, bool):
            value = "yes" if value else "no"
        elif isinstance(value, list | tuple):
            value = " ".join(value)
        print(f"{name + ':':<20} {value}".rstrip())
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    argv : sequence of str, optional
        The arguments, without the program's name; those of the process by default.

    Returns
    -------
    int
        The exit status: 0, or 130 after Ctrl-C, or another number after an error, which is one line
        on standard error.

    Raises
    ------
    SystemExit
        By argparse: after ``--help`` and ``--version``, and for arguments that cannot be parsed.
    """
    args = _parser().parse_args(argv)
    try:
        status: int = args.command(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return fail("interrupted", 130)
    except BrokenPipeError:  # the reader has gone, as in `fastopt compare | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status


if __name__ == "__main__":
    sys.exit(main())
