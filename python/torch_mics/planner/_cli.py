"""The commands of `python -m torch_mics`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from torch_mics.planner._page import accuracy_page
from torch_mics.planner._validate import validate


def build_parser() -> argparse.ArgumentParser:
    """Gives the parser of all commands; docs and tests read it too."""
    parser = argparse.ArgumentParser(prog="torch_mics", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "validate", help="fit, predict every published number, and print the errors"
    )
    command.add_argument("--page", type=Path, help="also write the tables as a Markdown page")
    command.set_defaults(run=_run_validate)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command. Returns the exit status: 2 for bad input, with the message on stderr."""
    options = build_parser().parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"torch_mics {options.command}: {error}", file=sys.stderr)
        return 2
    return 0


def _run_validate(options: argparse.Namespace) -> None:
    result = validate()
    for table in result.tables():
        table.show()
    print("Left out of every mean:")
    for line in result.left_out():
        print(f"  {line}")
    if options.page is not None:
        options.page.write_text(accuracy_page(result))
    print(result.summary())
