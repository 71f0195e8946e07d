"""Runs a body of a rank under the race detector, which sees all that it computes, frees and moves."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

from support.fakes import load, over_fakes
from torch_mics import _C, _race_check


@contextlib.contextmanager
def watched(*, keeps_trace: bool = False) -> Iterator[_C.RaceDetector]:
    """Checks models that are sharded in the block. Races are collected, not thrown."""
    detector = _C.RaceDetector(keeps_trace=keeps_trace, throws=False)
    with (
        mock.patch.object(_race_check, "of_process", return_value=detector),
        _race_check.RaceCheck(detector),
    ):
        yield detector


@contextlib.contextmanager
def watched_over_fakes(rank: int, *, keeps_trace: bool = False) -> Iterator[_C.RaceDetector]:
    """The same on the production NCCL code over fakes, with every allocation and every free.

    Streams run at once, so that each operator and each free comes in the order of the host's program, as
    a device's allocator would see it. Their order still comes from events alone.
    """
    with over_fakes(rank, at_once=True), watched(keeps_trace=keeps_trace) as detector:
        load().watch_memory(detector)
        try:
            yield detector
        finally:
            load().watch_memory(None)
