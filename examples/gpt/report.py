"""What rank 0 tells people (lines, a progress bar) and programs (metrics.jsonl)."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

__all__ = ["Console", "MetricsFile", "StepStats", "clean", "format_count", "step_line"]


def format_count(value: float) -> str:
    """Writes a count with three or four digits: 812, 41.2k, 1.06M, 3.21G."""
    for unit, scale, digits in (("G", 1e9, 2), ("M", 1e6, 2), ("k", 1e3, 1)):
        if value >= scale:
            return f"{value / scale:.{digits}f}{unit}"
    return f"{value:.0f}"


def _traffic(nbytes: float) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"


@dataclass(frozen=True)
class StepStats:
    """The numbers of one step line; speeds and traffic are means since the line before it."""

    step: int
    steps: int
    loss: float
    gradient_norm: float
    tokens_per_second: float
    world_size: int
    sent_inter_nbytes: float
    memory_nbytes: int
    seconds_left: float
    flops_per_second: float | None = None
    peak_flops: float | None = None


def step_line(stats: StepStats) -> str:
    """Formats one step line."""
    per_rank = stats.tokens_per_second / stats.world_size
    step_width = len(str(stats.steps)) + 1
    parts = [
        f"step {stats.step:>{step_width}}/{stats.steps}",
        f"loss {stats.loss:.3f}",
        f"gnorm {stats.gradient_norm:.2f}",
        f"{format_count(stats.tokens_per_second)} tok/s ({format_count(per_rank)}/rank)",
    ]
    if stats.flops_per_second is not None:
        per_gpu = stats.flops_per_second / stats.world_size
        parts.append(f"{per_gpu / 1e12:.1f} TFLOPS/GPU")
        if stats.peak_flops is not None:
            parts.append(f"MFU {100 * per_gpu / stats.peak_flops:.1f}%")
    parts += [
        f"net {_traffic(stats.sent_inter_nbytes)}/step",
        f"mem {stats.memory_nbytes / 2**30:.2f} GiB",
        f"eta {timedelta(seconds=round(stats.seconds_left))}",
    ]
    return " | ".join(parts)


def clean(value: Any) -> Any:
    """Copies a JSON value with what JSON cannot hold (inf, nan) as null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): clean(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean(item) for item in value]
    return value


class MetricsFile:
    """metrics.jsonl: one record per step."""

    def __init__(self, path: Path, resumed_step: int, *, writable: bool = True) -> None:
        """Opens the file; keeps the records up to `resumed_step` and drops the later ones.

        Where it is not writable (every rank but one), the file is left alone.
        """
        self._path = path
        if not writable:
            return
        kept = [r for r in self.read(path) if r["step"] <= resumed_step] if resumed_step else []
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(record) + "\n" for record in kept))

    @staticmethod
    def read(path: Path) -> list[dict[str, Any]]:
        """Returns the records of a file; none where there is no file.

        A last line that a killed run left half written is skipped.
        """
        records = []
        for line in path.read_text().splitlines() if path.is_file() else []:
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return records

    def write(self, record: Mapping[str, Any]) -> None:
        """Adds one record; it is on disk when this returns."""
        with self._path.open("a") as file:
            file.write(json.dumps(clean(record)) + "\n")


class Console:
    """Prints lines on rank 0, above a progress bar where stdout is a terminal.

    Use it as a context manager. On other ranks it prints nothing.
    """

    def __init__(self, *, enabled: bool, steps: int, first_step: int = 0) -> None:
        self._enabled = enabled
        self._steps = steps
        self._first_step = first_step
        self._progress: Any = None
        self._task: Any = None

    def __enter__(self) -> Console:
        if self._enabled and sys.stdout.isatty() and importlib.util.find_spec("rich"):
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

            self._progress = Progress(
                BarColumn(bar_width=None), MofNCompleteColumn(), TimeRemainingColumn()
            )
            self._task = self._progress.add_task(
                "steps", total=self._steps, completed=self._first_step
            )
            self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def line(self, text: str) -> None:
        """Prints one line."""
        if not self._enabled:
            return
        if self._progress is None:
            print(text, flush=True)
        else:
            self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def advance(self, step: int) -> None:
        """Moves the bar to `step`."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step)
