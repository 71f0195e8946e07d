"""Tables, as Markdown for a page or by rich for a terminal."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

from torch_mics.planner._extras import extra

_PROSE = 30  # longer cells are sentences, and may be wrapped


@dataclasses.dataclass(frozen=True)
class Table:
    """A title, the names of the columns, and rows of texts."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]

    def markdown(self) -> str:
        """Gives the table without its title."""
        lines = ["| " + " | ".join(self.columns) + " |", "|" + "---|" * len(self.columns)]
        lines += ["| " + " | ".join(row) + " |" for row in self.rows]
        return "\n".join(lines) + "\n"

    def show(self) -> None:
        """Prints the table.

        Raises:
            ModuleNotFoundError: rich is not installed.
        """
        with extra("tables need rich"):
            from rich import box
            from rich.console import Console
            from rich.table import Table as RichTable
        table = RichTable(title=self.title, box=box.SIMPLE_HEAD, title_justify="left")
        for index, column in enumerate(self.columns):
            longest = max((len(row[index]) for row in self.rows), default=0)
            justify: Literal["left", "right"] = (
                "left" if index == 0 or longest > _PROSE else "right"
            )
            table.add_column(column, justify=justify, no_wrap=longest <= _PROSE)
        for row in self.rows:
            table.add_row(*row)
        # In a file or a pipe there is no width to respect.
        Console(width=None if Console().is_terminal else 160).print(table)


def percent(ratio: float) -> str:
    """Writes a relative error: +5.8%."""
    return f"{round(100 * ratio, 1) + 0.0:+.1f}%"  # never -0.0
