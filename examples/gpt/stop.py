"""SIGTERM as a request to save and leave."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

__all__ = ["StopRequest"]


class StopRequest:
    """Remembers SIGTERM, so that the loop can save and leave between two steps."""

    def __init__(self) -> None:
        self.received = False
        self._previous: Any = None

    def __enter__(self) -> StopRequest:
        self._previous = signal.signal(signal.SIGTERM, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._previous)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = True
