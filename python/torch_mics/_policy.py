"""Mixed precision: which dtype is used where, and the tensors in what modules take and return."""

from __future__ import annotations

import collections
import collections.abc
import copy
import dataclasses
import operator
import types
from collections.abc import Callable
from types import NoneType
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

_SHORTHANDS = {"bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_policy(policy: MixedPrecisionPolicy | str | None) -> MixedPrecisionPolicy:
    """Turns None, "bf16" or "fp16" into a policy; the shorthands reduce gradients in fp32.

    Raises:
        ValueError: another string.
        TypeError: neither a string nor a policy.
    """
    if policy is None:
        return MixedPrecisionPolicy()
    if isinstance(policy, str):
        if policy not in _SHORTHANDS:
            raise ValueError(
                f'mp_policy must be "bf16", "fp16" or a MixedPrecisionPolicy: got {policy!r}.'
            )
        return MixedPrecisionPolicy(param_dtype=_SHORTHANDS[policy], reduce_dtype=torch.float32)
    if not isinstance(policy, MixedPrecisionPolicy):
        raise TypeError(
            f'mp_policy must be "bf16", "fp16" or a MixedPrecisionPolicy: got {type(policy).__name__}.'
        )
    if getattr(policy, "param_dtype_override_fn", None) is not None:
        raise ValueError("mp_policy.param_dtype_override_fn is not supported: leave it None.")
    return policy


def cast_floating(value: Any, dtype: torch.dtype) -> Any:
    """Casts the floating point tensors in a nest of containers to `dtype`.

    Containers keep their types: those of Python with their subclasses, dataclasses, mappings, packed
    sequences, and what is registered with torch's pytree. One in which nothing is cast is returned
    itself; others are copied, not changed.
    """

    def cast(leaf: torch.Tensor) -> torch.Tensor:
        return leaf.to(dtype) if leaf.is_floating_point() and leaf.dtype != dtype else leaf

    return _map(value, cast)


def _map(value: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, PackedSequence):
        data = function(value.data)
        return value if data is value.data else value._replace(data=data)
    children = _children(value)
    if children is None:
        return value
    mapped = [_map(child, function) for child in children]
    if all(map(operator.is_, mapped, children)):
        return value
    return _rebuild(value, mapped)


def _children(value: Any) -> list[Any] | None:
    """What a container holds; None for anything else."""
    if isinstance(value, str | bytes | int | float | torch.Size | NoneType):
        return None
    if _is_dataclass(value):
        return [getattr(value, field.name) for field in _fields(value)]
    if isinstance(value, list | tuple | set | frozenset | collections.deque):
        return list(value)
    if isinstance(value, collections.abc.Mapping):
        return list(value.values())
    if type(value) in pytree.SUPPORTED_NODES:
        return list(pytree.SUPPORTED_NODES[type(value)].flatten_fn(value)[0])
    return None


def _rebuild(value: Any, children: list[Any]) -> Any:
    """A container like `value` that holds `children`."""
    if _is_dataclass(value):
        made = copy.copy(value)
        for field, child in zip(_fields(value), children, strict=True):
            if child is getattr(value, field.name):
                continue
            if isinstance(value, dict):  # has each field as attribute and item, as in transformers
                setattr(made, field.name, child)
            else:
                object.__setattr__(made, field.name, child)  # frozen ones too
        return made
    if isinstance(value, tuple):
        return type(value)(*children) if hasattr(value, "_fields") else type(value)(children)
    if isinstance(value, set | frozenset):
        return type(value)(children)
    if isinstance(value, collections.deque):
        made = copy.copy(value)
        made.clear()
        made.extend(children)
        return made
    if isinstance(value, list):
        made = copy.copy(value)
        made[:] = children
        return made
    if isinstance(value, collections.abc.MutableMapping):
        made = copy.copy(value)
        for key, child in zip(value, children, strict=True):
            made[key] = child
        return made
    if isinstance(value, collections.abc.Mapping):
        return type(value)(zip(value, children, strict=True))  # type: ignore[call-arg]
    node = pytree.SUPPORTED_NODES[type(value)]
    return node.unflatten_fn(children, node.flatten_fn(value)[1])


def _is_dataclass(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _fields(value: Any) -> list[dataclasses.Field[Any]]:
    """Lists the fields that have a value: one without a default may not be set yet."""
    return [field for field in dataclasses.fields(value) if hasattr(value, field.name)]


def find_tensors(value: Any) -> list[torch.Tensor]:
    """Lists the tensors in a module's output.

    Objects of other classes are looked into only where no container holds a tensor that requires a
    gradient: a cache of earlier calls must not count as this call's output.
    """
    found: list[torch.Tensor] = []
    _collect(value, found)
    if not any(tensor.requires_grad for tensor in found):
        _collect_from_objects(value, found)
    return found


def _collect(value: Any, found: list[torch.Tensor]) -> None:
    if isinstance(value, torch.Tensor):
        found.append(value)
        return
    for child in _children(value) or ():
        _collect(child, found)


_MAX_OBJECTS = 10_000  # looked at in one output


def _collect_from_objects(value: Any, found: list[torch.Tensor]) -> None:
    seen: dict[int, Any] = {id(tensor): tensor for tensor in found}
    waiting = [value]
    while waiting and len(seen) < _MAX_OBJECTS:
        each = waiting.pop()
        if id(each) in seen or isinstance(each, _OPAQUE):
            continue
        seen[id(each)] = each
        if isinstance(each, torch.Tensor):
            found.append(each)
            continue
        waiting += _children(each) or []
        waiting += getattr(each, "__dict__", {}).values()
        for cls in type(each).__mro__:
            slots = cls.__dict__.get("__slots__", ())
            names = (slots,) if isinstance(slots, str) else slots
            waiting += [getattr(each, name) for name in names if hasattr(each, name)]


# Never part of an output, or not to be looked into.
_OPAQUE = (
    str,
    bytes,
    int,
    float,
    type,
    type(None),
    types.ModuleType,
    types.FunctionType,
    nn.Module,
)
