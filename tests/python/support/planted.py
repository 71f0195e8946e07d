"""Plants a tensor of the CPU where a program makes one on the device: each must be refused as by a GPU.

    places = find_places(run)             # the operations that make memory on the device, by their place
    with planted(places[3]): run()        # there, and in every later pass through it, the CPU's

An operation's place is the line of the library or of torch from which it came. Those of the C++ core come
from the line that called it, so they are told apart by operation and size too.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from support.fake_device import NAME

_MAKERS = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_zeros.default,
    torch.ops.aten.zeros.default,
    torch.ops.aten.zeros_like.default,
    torch.ops.aten.ones_like.default,
    torch.ops.aten.arange.start,
    torch.ops.aten.arange.default,
    torch.ops.aten.full.default,
    torch.ops.aten.scalar_tensor.default,
}


@dataclasses.dataclass(frozen=True)
class Place:
    """Where memory is made: the file, the function, and what is made there."""

    file: str
    function: str
    line: int
    operation: str
    sizes: tuple[int, ...]


def _place(operation: Any, made: torch.Tensor) -> Place | None:
    """The nearest line of the library; None: the library is not part of it."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if "/torch_mics/" in name:
            file = name.rpartition("/torch_mics/")[2]
            return Place(
                file, frame.f_code.co_name, frame.f_lineno, str(operation), tuple(made.shape)
            )
        frame = frame.f_back  # type: ignore[assignment]
    return None


class _Watch(TorchDispatchMode):
    def __init__(self, planted: Place | None) -> None:
        super().__init__()
        self.places: dict[Place, int] = collections.defaultdict(int)
        self._planted = planted

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        if func not in _MAKERS or type(made) is not torch.Tensor or made.device.type != NAME:
            return made
        place = _place(func, made)
        if place is None:
            return made
        self.places[place] += 1
        return made.cpu() if place == self._planted else made


def find_places(run: Callable[[], Any]) -> list[Place]:
    """Runs it once and lists the places, in the order of their first use."""
    with _Watch(None) as watch:
        run()
    return list(watch.places)


@contextlib.contextmanager
def planted(place: Place) -> Iterator[Any]:
    """Inside, tensors made at `place` are on the CPU; gives the counts."""
    with _Watch(place) as watch:
        yield watch.places
