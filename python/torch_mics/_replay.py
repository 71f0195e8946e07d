"""Replays a construction on full tensors, whose rows go into the shards as soon as they are made."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map

from torch_mics._construction import (
    Construction,
    MetaDevice,
    Operation,
    View,
)
from torch_mics._random_state import RandomState, RandomStream
from torch_mics._standins import Slot, poison

_EMPTY = (
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
)


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

    def digest(self) -> str:
        """Hashes what slots get from outside the meta device: tensors made elsewhere, and numbers."""
        hashed = hashlib.sha256()
        wanted = {*self._slots, *(view.storage for _, view in self._late)}
        for operation in _needed(self.construction.operations, wanted):
            for value in tree_flatten((operation.args, operation.kwargs))[0]:
                if isinstance(value, torch.Tensor):
                    flat = value.detach().cpu().contiguous().reshape(-1)
                    hashed.update(flat.view(torch.uint8).numpy().tobytes())
                elif isinstance(value, int | float | complex):
                    hashed.update(repr(value).encode())
        return hashed.hexdigest()[:16]

    def play(self, stream: RandomStream | None, start: RandomState | None = None) -> None:
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
