"""Replays a construction on full tensors, whose rows go into the shards as soon as they are made."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map

from torch_mics._construction import (
    Construction,
    MetaDevice,
    Operation,
    View,
    random_state,
    set_random_state,
)
from torch_mics._standins import Slot, poison

_EMPTY = (
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
)


class RandomStream:
    """The random states of one process that runs all constructions, one after the other.

    On the meta device nothing is drawn, so a recording may return to a state that it has left. The replay
    then goes on from where it left that state.
    """

    def __init__(self) -> None:
        self._left: dict[bytes, bytes] = {}
        self._noted: bytes | None = None

    def go_to(self, noted: bytes) -> None:
        """Sets the state that corresponds to the one noted on the meta device."""
        if noted == self._noted:
            return
        if self._noted is not None:
            self._left[self._noted] = random_state()
        set_random_state(self._left.get(noted, noted))
        self._noted = noted

    def is_at(self, noted: bytes) -> None:
        """Says that the present state corresponds to the one noted: both processes have drawn."""
        self._noted = noted


class Replay:
    """One replay of a construction, with the parameters and buffers that take their values from it."""

    def __init__(self, construction: Construction, device: torch.device) -> None:
        self.construction = construction
        self.device = device
        self._slots: dict[int, Slot] = {}  # by storage
        self._late: list[tuple[Slot, View]] = []
        self._kept: set[int] = set()
        self._tensors: dict[int, torch.Tensor] = {}

    def give(self, slot: Slot, meta: torch.Tensor) -> bool:
        """Lets play() fill `slot` with what `meta` becomes; False when `meta` was not made here."""
        view = self.construction.view_of(meta)
        if view is None:
            return False
        nbytes = self.construction.storages[view.storage].nbytes()
        is_whole = meta.is_contiguous() and nbytes == slot.nbytes and view.dtype == slot.dtype
        if is_whole and view.storage not in self._slots and view.storage not in self._kept:
            self._slots[view.storage] = slot
        else:
            self._late.append((slot, view))
            self._kept.add(view.storage)
        return True

    def keep(self, meta: torch.Tensor) -> bool:
        """Lets play() keep what `meta` becomes; False when it was not made here, or is a slot's."""
        view = self.construction.view_of(meta)
        if view is None or view.storage in self._slots:
            return False
        self._kept.add(view.storage)
        return True

    def play(self, stream: RandomStream | None, start: bytes | None = None) -> None:
        """Runs the operations: all of them with a stream, without one only those that are needed."""
        operations = self.construction.operations
        if stream is None:
            operations = _needed(operations, {*self._slots, *self._kept})
        elif start is not None:
            stream.go_to(start)
        last_use = _last_uses(operations)
        for position, operation in enumerate(operations):
            if operation.state is not None and stream is not None:
                stream.go_to(operation.state)
            self._run(operation)
            if operation.after is not None and stream is not None:
                stream.is_at(operation.after)
            for storage in last_use.get(position, ()):
                if storage not in self._kept:
                    self._tensors.pop(storage, None)
        for slot, view in self._late:
            slot.take(self._of(view))
            slot.is_touched = True
        for slot in self._slots.values():
            slot.cut()

    def tensor_of(self, meta: torch.Tensor) -> torch.Tensor:
        """Gives the tensor that a kept `meta` has become."""
        view = self.construction.view_of(meta)
        assert view is not None
        return self._of(view)

    def _run(self, operation: Operation) -> None:
        def real(value: Any) -> Any:
            if isinstance(value, View):
                return self._of(value)
            if isinstance(value, torch.Tensor):
                return value.clone()
            return self.device if value is MetaDevice else value

        args, kwargs = tree_map(real, (operation.args, operation.kwargs))
        result = operation.function(*args, **kwargs)
        made = [v for v in tree_flatten(result)[0] if isinstance(v, torch.Tensor)]
        for view, tensor in zip(operation.outputs, made, strict=True):
            if view is None or view.storage in self._tensors:
                continue
            slot = self._slots.get(view.storage)
            if slot is not None and slot.has_tensor:
                continue
            laid = _laid_out(tensor, view)
            if operation.function in _EMPTY:
                poison(laid)
            if slot is not None:
                slot.adopt(laid)
            else:
                self._tensors[view.storage] = laid

    def _of(self, view: View) -> torch.Tensor:
        held = self._tensors.get(view.storage)
        if held is None:
            held = self._slots[view.storage].load()
        empty = torch.empty(0, dtype=view.dtype, device=held.device)
        return empty.set_(held.untyped_storage(), view.offset, view.size, view.stride)


def _views(values: Any) -> Iterable[View]:
    return (value for value in tree_flatten(values)[0] if isinstance(value, View))


def _needed(operations: list[Operation], wanted: set[int]) -> list[Operation]:
    chosen = []
    for operation in reversed(operations):
        used = {view.storage for view in _views((operation.args, operation.kwargs))}
        written = {view.storage for view in _views(operation.outputs)}
        if operation.function._schema.is_mutable:
            written |= used
        if written & wanted:
            wanted |= used
            chosen.append(operation)
    return chosen[::-1]


def _last_uses(operations: list[Operation]) -> dict[int, list[int]]:
    last = {
        view.storage: position
        for position, operation in enumerate(operations)
        for view in _views((operation.args, operation.kwargs, operation.outputs))
    }
    uses: dict[int, list[int]] = {}
    for storage, position in last.items():
        uses.setdefault(position, []).append(storage)
    return uses


def _laid_out(tensor: torch.Tensor, view: View) -> torch.Tensor:
    """The tensor with the strides that it has on the meta device."""
    if tensor.stride() == view.stride and tensor.storage_offset() == view.offset:
        return tensor
    laid = torch.empty_strided(view.size, view.stride, dtype=view.dtype, device=tensor.device)
    return laid.copy_(tensor)
