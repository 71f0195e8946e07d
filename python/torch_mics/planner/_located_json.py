"""JSON whose every value knows its line, so that an error names the line of a wrong field."""

from __future__ import annotations

import json
import re
from typing import Any

_SPACE = re.compile(r"[ \t\r\n]*")
_NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][-+]?\d+)?")
_WORDS = {"true": True, "false": False, "null": None}

Path = tuple[str | int, ...]


class LocatedJson:
    """A parsed text: `value`, and the line of each value by its path of keys and indices."""

    def __init__(self, text: str, source: str, what: str = "a calibration") -> None:
        """Parses `text`; `source` names it in errors, and `what` says what it should be.

        Raises:
            ValueError: the text is no JSON, or an object has a key twice.
        """
        self.source = source
        self._what = what
        self._text = text
        self._lines: dict[Path, int] = {}
        self._decoder = json.JSONDecoder()
        self.value, end = self._read(self._skip(0), ())
        end = self._skip(end)
        if end != len(text):
            self._fail(end, "more text after the value")

    def line_of(self, path: Path) -> int:
        """Gives the line of a value, or of the nearest one around it that exists."""
        while path not in self._lines:
            path = path[:-1]
        return self._lines[path]

    def error(self, path: Path, rule: str, got: object) -> ValueError:
        """Makes the error for the value at `path`."""
        field = ".".join(map(str, path)) or "the whole file"
        return ValueError(
            f"{self._what} must be well formed: {self.source}, line {self.line_of(path)}, field "
            f"{field}: {rule}: got {got!r}."
        )

    def _fail(self, position: int, reason: str) -> None:
        line = self._text.count("\n", 0, position) + 1
        raise ValueError(f"{self._what} must be JSON: {self.source}, line {line}: {reason}.")

    def _skip(self, position: int) -> int:
        found = _SPACE.match(self._text, position)
        return found.end() if found else position

    def _read(self, position: int, path: Path) -> tuple[Any, int]:
        self._lines[path] = self._text.count("\n", 0, position) + 1
        head = self._text[position : position + 1]
        if head == "{":
            return self._read_object(position + 1, path)
        if head == "[":
            return self._read_array(position + 1, path)
        if head == '"':
            return self._read_string(position)
        for word, value in _WORDS.items():
            if self._text.startswith(word, position):
                return value, position + len(word)
        number = _NUMBER.match(self._text, position)
        if number is None:
            self._fail(position, "a value is missing or misspelt")
            raise AssertionError
        return json.loads(number.group()), number.end()

    def _read_string(self, position: int) -> tuple[str, int]:
        try:
            return self._decoder.raw_decode(self._text, position)
        except json.JSONDecodeError as error:
            self._fail(position, error.msg)
            raise AssertionError from None

    def _read_object(self, position: int, path: Path) -> tuple[dict[str, Any], int]:
        result: dict[str, Any] = {}
        position = self._skip(position)
        while self._text[position : position + 1] != "}":
            if result:
                position = self._expect(position, ",")
            if self._text[position : position + 1] != '"':
                self._fail(position, "a key in double quotes must come here")
            key, position = self._read_string(position)
            if key in result:
                self._fail(position, f'the key "{key}" is there twice')
            position = self._expect(self._skip(position), ":")
            result[key], position = self._read(position, (*path, key))
            position = self._skip(position)
        return result, position + 1

    def _read_array(self, position: int, path: Path) -> tuple[list[Any], int]:
        result: list[Any] = []
        position = self._skip(position)
        while self._text[position : position + 1] != "]":
            if result:
                position = self._expect(position, ",")
            value, position = self._read(position, (*path, len(result)))
            result.append(value)
            position = self._skip(position)
        return result, position + 1

    def _expect(self, position: int, mark: str) -> int:
        if self._text[position : position + 1] != mark:
            self._fail(position, f'"{mark}" must come here')
        return self._skip(position + 1)
