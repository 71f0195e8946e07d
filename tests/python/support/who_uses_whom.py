"""Who uses whom, file by file, and the circles among them.

    python tests/python/support/who_uses_whom.py src include python/torch_mics benchmarks

prints the table, and fails where there is a circle. In C++ a header and the source of its name are
one file.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator, Mapping, Set
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]

Uses = Mapping[str, Set[str]]  # by file, the files that it names


def python_uses(*folders: str) -> dict[str, set[str]]:
    """Gives the imports among the Python files of `folders`, also those in functions and for types."""
    files = [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]
    found = {_name(file): {_name(other) for other in _imports(file)} for file in files}
    return {name: (used & set(found)) - {name} for name, used in found.items()}


def cpp_uses(*folders: str) -> dict[str, set[str]]:
    """Gives the includes among the C++ files of `folders`; include/mics/x.h goes with its x.cc."""
    sources = [f for folder in folders for f in sorted((ROOT / folder).rglob("*.*"))]
    sources = [file for file in sources if file.suffix in {".h", ".cc"}]
    homes = {file.stem: _name(file.with_suffix("")) for file in sources if file.suffix == ".cc"}
    assert len(homes) == sum(file.suffix == ".cc" for file in sources), "sources have one name each"
    names = {file: homes.get(file.stem, _name(file.with_suffix(""))) for file in sources}
    found: dict[str, set[str]] = {name: set() for name in names.values()}
    for file in sources:
        for header in re.findall(r'#include "([^"]+)"', file.read_text()):
            places = [ROOT / "src" / header, ROOT / "include" / header, file.parent / header]
            found[names[file]] |= {names[place] for place in places if place in names}
    return {name: used - {name} for name, used in found.items()}


def _name(file: Path) -> str:
    return str(file.relative_to(ROOT))


def _imports(file: Path) -> Iterator[Path]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _find(file, alias.name, None)
        elif isinstance(node, ast.ImportFrom):
            package = file.parents[node.level - 1] if node.level else None
            for alias in node.names:
                yield from _find(file, node.module or "", alias.name, package)


def _find(file: Path, module: str, name: str | None, package: Path | None = None) -> Iterator[Path]:
    """The file that `module`, or `name` in it, stands for; a package's own only if it is what is named."""
    # A script finds what lies beside it, a package what lies beside the outermost package.
    places = [
        p for p in file.parents if ROOT in (p, *p.parents) and not (p / "__init__.py").exists()
    ]
    for place in [package] if package else places:
        path = place.joinpath(*filter(None, module.split(".")))
        if path.with_suffix(".py").is_file():
            yield path.with_suffix(".py")
            return
        if path.is_dir() and name is not None and (inside := sorted(path.glob(f"{name}.*"))):
            yield from (each for each in inside if each.suffix == ".py")
            return
        if (path / "__init__.py").is_file():
            yield path / "__init__.py"
            return


def circles(uses: Uses) -> list[list[str]]:
    """Lists the sets of files that all use each other, directly or through others."""
    reached = {name: _reached(uses, name) for name in uses}
    found = {
        tuple(sorted(other for other in reached[name] if name in reached[other]))
        for name in uses
        if name in reached[name]
    }
    return [list(circle) for circle in sorted(found)]


def _reached(uses: Uses, start: str) -> set[str]:
    found: set[str] = set()
    waiting = list(uses[start])
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += uses[name]
    return found


def table(uses: Uses) -> str:
    """Gives a line for each file, those that use nothing first."""
    depth = {name: len(_reached(uses, name)) for name in uses}
    order = sorted(uses, key=lambda name: (depth[name], name))
    return "\n".join(f"{name}: {', '.join(sorted(uses[name])) or '-'}" for name in order)


if __name__ == "__main__":
    shown = {**cpp_uses(*sys.argv[1:]), **python_uses(*sys.argv[1:])}
    print(table(shown))
    if found := circles(shown):
        sys.exit("\n".join(f"circle: {', '.join(circle)}" for circle in found))
