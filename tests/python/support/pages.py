"""README.md and the pages of docs/, their fenced blocks, and the sources that they talk of."""

from __future__ import annotations

import dataclasses
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGE_IDS = [str(page.relative_to(ROOT)) for page in PAGES]
FOLDERS = ("benchmarks", "docs", "examples", "include", "python", "src", "tests")
every_page = pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, the prelude it asks for, the line of its fence."""

    language: str
    text: str
    prelude: str
    line: int


def blocks_of(text: str) -> list[Block]:
    found, lines, start, above = [], text.splitlines(), None, ""
    for number, line in enumerate(lines, start=1):
        if start is None and line.startswith("```"):
            start, prelude = number, re.fullmatch(r"<!-- prelude: (\w+) -->", above.strip())
        elif start is not None and line.startswith("```"):
            language = lines[start - 1].removeprefix("```").strip()
            body = "\n".join(lines[start : number - 1]) + "\n"
            found.append(Block(language, body, prelude.group(1) if prelude else "", start))
            start = None
        above = line or above
    assert start is None, f"a block that begins in line {start} has no end"
    return found


def prose_of(text: str) -> str:
    """The text without its fenced blocks, line for line."""
    inside, kept = False, []
    for line in text.splitlines():
        if line.startswith("```"):
            inside = not inside
        kept.append("" if inside or line.startswith("```") else line)
    return "\n".join(kept)


@cache
def all_sources() -> str:
    suffixes = {".py", ".sh", ".cc", ".h", ".txt"}
    files = [p for f in FOLDERS for p in sorted((ROOT / f).rglob("*")) if p.suffix in suffixes]
    files += [ROOT / "setup.py", ROOT / "CMakeLists.txt"]
    return "\n".join(p.read_text() for p in files if not p.name.startswith("test_docs"))


def file_problems(path: str) -> list[str]:
    return [] if (ROOT / path).exists() else [f"there is no {path}"]
