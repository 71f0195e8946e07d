"""The commands of `python -m torch_mics`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch_mics._environment import environment
from torch_mics.cli._calibrate import add_calibrate
from torch_mics.cli._model import add_model, add_search, plan_of
from torch_mics.cli._simulate import add_simulate
from torch_mics.planner._report import (
    explanation,
    plan_json,
    plot_plan,
    ranking_table,
    verdict,
)
from torch_mics.published import accuracy_page, validate


def build_parser() -> argparse.ArgumentParser:
    """Gives the parser of all commands; docs and tests read it too."""
    parser = argparse.ArgumentParser(prog="torch_mics", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    _add_plan(commands)
    add_simulate(commands)
    add_calibrate(commands)
    _add_validate(commands)
    _add_env(commands)
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


# --- plan -----------------------------------------------------------------------------------------


def _add_plan(commands: Any) -> None:
    command = commands.add_parser("plan", help="find the fastest settings that fit")
    add_model(command)
    add_search(command, required=True)
    command.add_argument("--explain", action="store_true", help="time and memory term by term")
    command.add_argument("--json", action="store_true", help="print JSON and nothing else")
    command.add_argument("--plot", type=Path, metavar="FILE", help="time and memory over p")
    command.set_defaults(run=_run_plan)


def _run_plan(options: argparse.Namespace) -> None:
    found = plan_of(options)
    if options.plot is not None:
        plot_plan(found, options.plot)
    if options.json:
        print(json.dumps(plan_json(found), indent=1))
        return
    ranking_table(found).show()
    if options.explain:
        for table in explanation(found):
            table.show()
    print(verdict(found))


# --- env ------------------------------------------------------------------------------------------


def _add_env(commands: Any) -> None:
    command = commands.add_parser("env", help="print what a bug report needs to say")
    command.add_argument("--json", action="store_true", help="print JSON and nothing else")
    command.set_defaults(run=_run_env)


def _run_env(options: argparse.Namespace) -> None:
    found = environment()
    if options.json:
        print(json.dumps(found, indent=1))
        return
    width = max(map(len, found))
    for name, value in found.items():
        print(f"{name:{width}}  {value}")


# --- validate -------------------------------------------------------------------------------------


def _add_validate(commands: Any) -> None:
    command = commands.add_parser(
        "validate", help="fit, predict every published number, and print the errors"
    )
    command.add_argument("--page", type=Path, help="also write the tables as a Markdown page")
    command.set_defaults(run=_run_validate)


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
