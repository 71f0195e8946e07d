"""Finds text on this machine and reads it, always in the same order."""

from __future__ import annotations

import gzip
import hashlib
import os
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gpt.config import ConfigError

__all__ = ["Document", "collect", "describe"]

_SKIPPED_DIRECTORIES = {
    "__pycache__",
    "dist-packages",
    "idle_test",
    "site-packages",
    "test",
    "tests",
}
_TEXT_SUFFIXES = {".md", ".py", ".rst", ".txt"}


@dataclass(frozen=True)
class Document:
    """One file: its name, independent of where it is installed, and its bytes."""

    name: str
    content: bytes

    @property
    def text(self) -> str:
        """The content as text; bytes that are not UTF-8 are dropped."""
        return self.content.decode("utf-8", errors="ignore")


def _named_files(root: Path, suffixes: set[str]) -> list[tuple[str, Path]]:
    found = []
    for folder, directories, names in os.walk(root):
        directories[:] = [d for d in directories if d not in _SKIPPED_DIRECTORIES and d[0] != "."]
        for name in names:
            path = Path(folder, name)
            if Path(name.removesuffix(".gz")).suffix in suffixes and path.is_file():
                found.append((path.relative_to(root).as_posix(), path))
    return found


def _python_files() -> list[tuple[str, Path]]:
    root = Path(sysconfig.get_path("stdlib"))
    # Left out: character tables and generated help, which are neither code nor prose.
    files = [
        (name, path)
        for name, path in _named_files(root, {".py"})
        if not name.startswith(("encodings/", "pydoc_data/"))
    ]
    if not files:
        raise ConfigError(
            "--data python needs the sources of the standard library: got none in "
            f"{root}. Name a file or directory of text with --data."
        )
    return files


def _english_files() -> list[tuple[str, Path]]:
    # The data directories of the XDG base directory specification, with its default.
    shares = os.environ.get("XDG_DATA_DIRS") or "/usr/local/share:/usr/share"
    roots = [Path(share, "doc") for share in shares.split(":") if share]
    files = [file for root in roots if root.is_dir() for file in _named_files(root, {".txt"})]
    files += [file for root in roots if root.is_dir() for file in _named_files(root, {".rst"})]
    if not files:
        raise ConfigError(
            "--data english needs installed documentation in *.txt or *.rst files: got none in "
            f"{', '.join(map(str, roots))}. Install a documentation package of the distribution "
            "(python3-doc, for example), or name a file or directory of text with --data."
        )
    return files


def _path_files(text: str) -> list[tuple[str, Path]]:
    path = Path(text)
    if path.is_file():
        return [(path.name, path)]
    if path.is_dir():
        files = _named_files(path, _TEXT_SUFFIXES)
        if files:
            return files
        raise ConfigError(
            f"--data DIRECTORY must hold text files ({', '.join(sorted(_TEXT_SUFFIXES))}): got "
            f"none in {text}. Name the files themselves to use others."
        )
    raise ConfigError(
        f"--data must name an existing file or directory, 'python' or 'english': got {text!r}."
    )


def _read(name: str, path: Path) -> Document:
    content = path.read_bytes()
    return Document(name, gzip.decompress(content) if path.suffix == ".gz" else content)


def collect(sources: Sequence[str]) -> list[Document]:
    """Reads every document of `sources`.

    The order is by a hash of the documents' names alone, so that a piece cut off at the end is a
    fair sample of the whole.

    Raises:
        ConfigError: a source does not exist or holds no text.
    """
    known = {"python": _python_files, "english": _english_files}
    documents = []
    for source in sources:
        files = known[source]() if source in known else _path_files(source)
        documents += [_read(name, path) for name, path in sorted(files)]
    if not any(document.content for document in documents):
        raise ConfigError(f"--data must hold text: got only empty files in {', '.join(sources)}.")
    return sorted(documents, key=lambda d: (hashlib.sha256(d.name.encode()).digest(), d.content))


def describe(sources: Iterable[str]) -> str:
    """Names the sources for people."""
    names = {"python": "Python standard library", "english": "installed English documentation"}
    return " + ".join(names.get(source, source) for source in sources)
