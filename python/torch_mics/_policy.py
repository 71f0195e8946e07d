"""Mixed precision: what is cast where."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy
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
    """Casts the floating point tensors in a nest of containers to `dtype`."""

    def cast(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and leaf.dtype != dtype:
            return leaf.to(dtype)
        return leaf

    return pytree.tree_map(cast, value)


def find_tensors(value: Any) -> list[torch.Tensor]:
    """Lists the tensors in a module's output: containers, dataclasses, mappings."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in find_tensors(item)]
    if isinstance(value, dict):
        return [tensor for item in value.values() for tensor in find_tensors(item)]
    if hasattr(value, "__dataclass_fields__"):
        return [
            tensor
            for name in value.__dataclass_fields__
            for tensor in find_tensors(getattr(value, name))
        ]
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]
