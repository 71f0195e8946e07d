"""Stand-ins: parameters that become full when an initialiser touches them, and shards again after it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from torch_mics._parameters import Parameter
from torch_mics._unit import ShardedUnit

# What can be answered without the values.
_SHAPE_QUESTIONS: set[Any] = {
    getattr(torch.Tensor, name)
    for name in (
        [
            "size",
            "dim",
            "numel",
            "nelement",
            "stride",
            "is_floating_point",
            "is_complex",
            "requires_grad_",
        ]
    )
}
_SHAPE_QUESTIONS |= {
    getattr(torch.Tensor, name).__get__
    for name in ("shape", "ndim", "dtype", "layout", "requires_grad", "is_leaf", "grad")
}
_SHAPE_QUESTIONS.add(torch.Tensor.requires_grad.__set__)  # type: ignore[attr-defined]
_DEVICE = torch.Tensor.device.__get__
_IS_META = torch.Tensor.is_meta.__get__  # type: ignore[attr-defined]


class FullValues:
    """The full parameters that exist at the moment: at most `budget` bytes, or one parameter."""

    def __init__(self, device: torch.device, budget: int) -> None:
        self.device = device
        self.budget = budget
        self.held: dict[int, Slot] = {}

    def make_room(self, nbytes: int) -> None:
        """Cuts the oldest full parameters to shards until `nbytes` more fit. The same on every rank."""
        for slot in list(self.held.values()):
            if sum(other.nbytes for other in self.held.values()) + nbytes <= self.budget:
                return
            if not slot.is_viewed():
                slot.cut()

    def cut_all(self) -> None:
        """Cuts all full parameters to shards."""
        for slot in list(self.held.values()):
            slot.cut()


class Slot:
    """One parameter of a unit while first values are made.

    Attributes:
        is_kept: it has its values; what is written to it is dropped.
        is_incomplete: when it was last cut, a part of it had never been written.
        is_touched: an initialiser has seen its values.
        is_recorded: it has the values of its recorded construction.
        is_determined: the framework's initialisation has written it, whatever the constructor did.
        writes: how often an initialiser has written to it.
        reset_writes: how many of these are by its own module's reset_parameters().
        num_resets: how many modules' reset_parameters() have written to it.
    """

    def __init__(
        self,
        values: FullValues,
        unit: ShardedUnit,
        index: int,
        parameter: Parameter,
        *,
        has_values: bool,
    ) -> None:
        self.values = values
        self.unit = unit
        self._index = index
        self.parameter = parameter
        self.has_values = has_values
        self.is_kept = has_values
        self.is_incomplete = False
        self.is_touched = False
        self.is_recorded = False
        self.is_determined = False
        self.writes = 0
        self.reset_writes = 0
        self.num_resets = 0
        self.full: torch.Tensor | None = None
        self._version = 0
        meta = torch.empty(parameter.sizes, dtype=parameter.sharded.dtype, device="meta")
        self.stand_in = StandIn(meta, parameter.sharded.requires_grad)
        self.stand_in.__dict__.update(parameter.marks)
        self.stand_in._slot = self

    @property
    def dtype(self) -> torch.dtype:
        """The parameter's dtype."""
        return self.parameter.sharded.dtype

    @property
    def nbytes(self) -> int:
        """The bytes of the full parameter."""
        return self.parameter.sizes.numel() * self.dtype.itemsize

    @property
    def has_tensor(self) -> bool:
        """Whether load() gives more than poison."""
        return self.has_values or self.full is not None

    def adopt(self, tensor: torch.Tensor) -> None:
        """Makes a new tensor's storage the full parameter."""
        self.values.make_room(self.nbytes)
        empty = torch.empty(0, dtype=self.dtype, device=tensor.device)
        stride = torch.empty(self.parameter.sizes, device="meta").stride()
        storage = tensor.untyped_storage()
        self.full = empty.set_(storage, 0, self.parameter.sizes, stride)
        self._hold()

    def _hold(self) -> None:
        assert self.full is not None
        self._version = self.full._version
        self.values.held[id(self)] = self
        self.is_touched = True

    def load(self) -> torch.Tensor:
        """Gives the full parameter: gathered, or poison as long as nothing was written. Collective."""
        if self.full is None:
            self.values.make_room(self.nbytes)
            if self.has_values:
                gathered = self.parameter.sharded.detach().full_tensor()  # type: ignore[attr-defined]
                self.full = gathered.to(self.values.device).clone()
            else:
                self.full = torch.empty(
                    self.parameter.sizes, dtype=self.dtype, device=self.values.device
                )
                poison(self.full)
            self._hold()
        self.is_touched = True
        return self.full

    def is_viewed(self) -> bool:
        """Whether somebody still holds the full parameter, or a view of it, and may write to it."""
        assert self.full is not None
        storage = self.full.untyped_storage()
        # Two references are our own: the attribute and the argument; the attribute and `storage`.
        return sys.getrefcount(self.full) > 2 or torch._C._storage_Use_Count(storage._cdata) > 2

    def cut(self) -> None:
        """Keeps this rank's rows of the full parameter."""
        full = self.full
        if full is None:
            return
        del self.values.held[id(self)]
        self.full = None
        if self.is_kept:
            return
        self.writes += full._version - self._version
        self.take(full)

    def take(self, full: torch.Tensor) -> None:
        """Writes this rank's rows of `full` into the shard."""
        first, last = self.unit.layout().rows_of(self._index, self.unit.partition_rank)
        self.parameter.local.copy_(full[first:last])
        self.is_incomplete = is_poisoned(full)
        self.has_values = True

    def apart(self) -> Slot:
        """Gives another slot of this parameter, whose values are dropped."""
        other = Slot(self.values, self.unit, self._index, self.parameter, has_values=False)
        other.is_kept = True
        return other

    def place(self) -> None:
        """Puts the stand-in into the modules."""
        self.parameter.register(self.stand_in)

    def take_replaced(self, places: Iterable[Any]) -> None:
        """Takes the values of tensors that an initialiser has put in place of the stand-in."""
        for place in places:
            found = place.module._parameters.get(place.name)
            if isinstance(found, StandIn) and found._slot.parameter is self.parameter:
                continue
            if found is not None and found.shape == self.parameter.sizes and not found.is_meta:
                value = found.detach()
                self.cut()
                if not self.is_kept:
                    self.take(value)
                    self.is_touched = True
                    self.writes += 1
                place.module._parameters[place.name] = self.stand_in


class StandIn(nn.Parameter):
    """A parameter as the modules see it; operations on its values run on the full parameter."""

    _slot: Slot

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Runs `func` on full tensors and gives stand-ins back where it returns its argument."""
        kwargs = kwargs or {}
        if func in _SHAPE_QUESTIONS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func == _DEVICE and isinstance(args[0], StandIn):
            return args[0]._slot.values.device
        if func == _IS_META and isinstance(args[0], StandIn):
            return False
        used: dict[int, StandIn] = {}

        def full_of(value: Any) -> Any:
            if not isinstance(value, StandIn):
                return value
            full = value._slot.load()
            used[id(full)] = value
            return full

        full_args, full_kwargs = tree_map(full_of, (args, kwargs))
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*full_args, **full_kwargs)
        return tree_map(lambda value: used.get(id(value), value), result)


def poison(tensor: torch.Tensor) -> None:
    """Fills with what no initialiser writes: a NaN of rare bits, or a rare integer. Sets bools to False."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.detach())
    bits = _POISON.get(tensor.dtype.itemsize)
    if bits is None or tensor.dtype == torch.bool:
        tensor.zero_()
    elif tensor.dtype in _PLAIN_FLOATS:
        tensor.detach().view(_INTEGERS[tensor.dtype.itemsize]).fill_(_NAN_BITS[tensor.dtype])
    elif tensor.is_floating_point():
        tensor.fill_(float("nan"))
    else:
        tensor.fill_(bits & 0x55 if tensor.dtype == torch.uint8 else bits)


def is_poisoned(tensor: torch.Tensor) -> bool:
    """Whether a part of `tensor` was never written, or computed from such a part."""
    if tensor.numel() == 0:
        return False
    if tensor.is_floating_point() or tensor.is_complex():
        is_narrow = tensor.is_floating_point() and tensor.dtype.itemsize == 1
        return bool((tensor.float() if is_narrow else tensor).isnan().any())
    bits = _POISON.get(tensor.dtype.itemsize)
    if bits is None or tensor.dtype in (torch.bool, torch.uint8, torch.int8):
        return False
    return bool((tensor == bits).any())


def is_exactly_poison(tensor: torch.Tensor) -> bool:
    """As is_poisoned(), but a NaN that somebody wrote is a value."""
    if tensor.dtype not in _PLAIN_FLOATS or tensor.numel() == 0:
        return is_poisoned(tensor)
    integers = tensor.detach().contiguous().view(_INTEGERS[tensor.dtype.itemsize])
    return bool((integers == _NAN_BITS[tensor.dtype]).any())


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_POISON = {1: 0x55, 2: -0x5A5B, 4: -0x5A5B5C5D, 8: -0x5A5B5C5D5A5B5C5D}
_PLAIN_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_NAN_BITS = {  # quiet NaNs
    torch.float16: 0x7E5B,
    torch.bfloat16: 0x7FDB,
    torch.float32: 0x7FDA5B5C,
    torch.float64: 0x7FFA5B5C5D5A5B5C,
}
