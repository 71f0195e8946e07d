"""meta_device: a meta device that records what constructors do."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from torch_mics._random_state import RandomState, random_state

_META = torch.device("meta")
_FROM_DATA = (torch.tensor, torch.as_tensor, torch.asarray)


@dataclasses.dataclass(frozen=True)
class View:
    """Where a meta tensor lies in its storage."""

    storage: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype


@dataclasses.dataclass
class Operation:
    """One operation of construction.

    Attributes:
        state: the random states before it, if one was set since the last operation.
        after: the random states after it, if it drew numbers for a tensor outside the meta device.
    """

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[View | None]
    state: RandomState | None
    after: RandomState | None


class MetaDevice:
    """Stands for the meta device in the arguments of an operation."""


class Construction:
    """The operations on meta tensors of one `with meta_device()`."""

    def __init__(self) -> None:
        self.operations: list[Operation] = []
        self.start = random_state()
        # Kept alive, so that no address is used twice; a meta storage takes no memory.
        self.storages: dict[int, torch.UntypedStorage] = {}
        self._state = self.start

    def view_of(self, tensor: torch.Tensor) -> View | None:
        """Describes a meta tensor; None when it was made elsewhere."""
        key = tensor.untyped_storage()._cdata
        if key not in self.storages:
            return None
        size, stride = tuple(tensor.size()), tensor.stride()
        return View(key, size, stride, tensor.storage_offset(), tensor.dtype)  # type: ignore[arg-type]

    def note(
        self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> None:
        """Records an operation that has just run."""
        flat_in = [v for v in tree_flatten((args, kwargs))[0] if isinstance(v, torch.Tensor)]
        flat_out = [v for v in tree_flatten(result)[0] if isinstance(v, torch.Tensor)]
        is_on_meta = any(v.is_meta for v in [*flat_in, *flat_out])
        is_random = torch.Tag.nondeterministic_seeded in function.tags
        if not is_on_meta and not is_random:
            return
        new = [v for v in flat_out if v.is_meta and self.view_of(v) is None]
        if is_on_meta and not new and not function._schema.is_mutable and not is_random:
            return  # a view: whatever uses it records where it lies
        state = None
        if is_random and is_on_meta and (now := random_state()) != self._state:
            state = self._state = now
        for tensor in [*flat_in, *flat_out]:
            if tensor.is_meta:
                storage = tensor.untyped_storage()
                self.storages.setdefault(storage._cdata, storage)
        described_args, described_kwargs = tree_map(self._describe, (args, kwargs))
        outputs = [self.view_of(v) if v.is_meta else None for v in flat_out]
        after = None
        if is_random and not is_on_meta:
            after = self._state = random_state()
        self.operations.append(
            Operation(function, described_args, described_kwargs, outputs, state, after)
        )

    def _describe(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return (self.view_of(value) or value) if value.is_meta else value.detach().clone()
        return MetaDevice if value == _META and isinstance(value, torch.device) else value


@contextlib.contextmanager
def meta_device() -> Iterator[Construction]:
    """`torch.device("meta")` that records what constructors do, for materialize().

        with mics.meta_device():
            model = GPT()

    materialize() then repeats it on full tensors, from the random state of this point: the values are, bit
    for bit, those of a model that is built without this. Only Hugging Face's own initialisation runs later,
    after all construction. Constructors that read values (`item()`, `if tensor:`) raise, as on every meta
    device.
    """
    construction = Construction()
    modules: dict[int, nn.Module] = {}

    def register(module: nn.Module, name: str, registered: Any) -> None:
        modules[id(module)] = module
        if isinstance(registered, nn.Module):
            modules[id(registered)] = registered

    with contextlib.ExitStack() as stack:
        for add_hook in (
            register_module_parameter_registration_hook,
            register_module_buffer_registration_hook,
            register_module_module_registration_hook,
        ):
            stack.callback(add_hook(register).remove)
        stack.enter_context(_META)
        stack.enter_context(_Recorder(construction))
        stack.enter_context(_FromData())
        yield construction
    # Copied modules have registered nothing themselves, so all modules below are searched too.
    found = {id(m): m for module in modules.values() for m in module.modules()}
    for module in found.values():
        for tensor in [*module._parameters.values(), *module._buffers.values()]:
            if tensor is not None and tensor.is_meta and construction.view_of(tensor):
                tensor._mics_construction = (construction, tensor._version)  # type: ignore[attr-defined]


class _Recorder(TorchDispatchMode):
    def __init__(self, construction: Construction) -> None:
        super().__init__()
        self._construction = construction

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self._construction.note(func, args, kwargs or {}, result)
        return result


class _FromData(TorchFunctionMode):
    """Records values that come from Python: the dispatcher does not see the arguments of torch.tensor()."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func not in _FROM_DATA or torch.device(kwargs.get("device") or _META).type != "meta":
            return func(*args, **kwargs)
        if args and isinstance(args[0], torch.Tensor) and args[0].is_meta:
            return func(*args, **kwargs)
        requires_grad = kwargs.pop("requires_grad", False)
        made = func(*args, **{**kwargs, "device": "cpu"}).to(_META)
        return made.requires_grad_() if requires_grad else made
