"""What the library sees of optimizer steps.

A step that would silently train something else than the model is refused; after a step what was gathered
from the old weights is old.
"""

from __future__ import annotations

import functools
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from torch_mics._unit import ShardedUnit

if TYPE_CHECKING:
    from torch_mics._context import Context


@functools.cache
def install_optimizer_checks() -> None:
    """Checks every optimizer's step in this process from now on; once."""
    register_optimizer_step_pre_hook(_before_step)
    register_optimizer_step_post_hook(_after_step)


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for unit in _units_of(optimizer):
        handle = unit.handle
        if handle is not None and (handle.has_pending or handle.has_full_gradient):
            assert unit.context is not None
            names = ", ".join(f'"{name}"' for name in unit.context.engine.unfinished_units())
            raise RuntimeError(
                "an optimizer may step only after an accumulation boundary: got gradients that are not "
                f"synchronised in units {names}. Run the last micro-step outside no_sync(), or with "
                "microbatch(model, is_last=True)."
            )


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """The kernels of an optimizer need not move a version counter."""
    written: dict[Context, list[int]] = {}
    for unit in _units_of(optimizer):
        if unit.context is not None:
            written.setdefault(unit.context, []).append(unit.index)
    for context, indices in written.items():
        context.engine.note_written(indices)


def _units_of(optimizer: torch.optim.Optimizer) -> list[ShardedUnit]:
    """Finds the units of an optimizer's parameters; looks again only when parameters were added."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    cached = optimizer.__dict__.get("_mics_units")
    if cached is not None and cached[0] == len(parameters):
        units = (reference() for reference in cached[1])
        return [unit for unit in units if unit is not None]
    found = _check_parameters(parameters)
    if found:  # an optimizer without units may get stale by a later sharding
        references = [weakref.ref(unit) for unit in found]
        optimizer.__dict__["_mics_units"] = (len(parameters), references)
    return found


def _check_parameters(parameters: list[torch.Tensor]) -> list[ShardedUnit]:
    units: dict[int, ShardedUnit] = {}
    for parameter in parameters:
        replaced = getattr(parameter, "_mics_replaced", None)
        if replaced is not None:
            raise RuntimeError(
                "an optimizer must be made after sharding: got one that holds the unsharded parameter "
                f'"{replaced}". Make the optimizer after shard_model() or fully_shard().'
            )
        reference = getattr(parameter, "_mics_unit", None)
        unit = None if reference is None else reference()
        if unit is not None:
            units.setdefault(id(unit), unit)
    if units:
        _check_all_in_units(parameters)
    return list(units.values())


def _check_all_in_units(parameters: list[torch.Tensor]) -> None:
    for index, parameter in enumerate(parameters):
        is_known = hasattr(parameter, "_mics_unit") or hasattr(parameter, "_mics_ignored")
        if parameter.requires_grad and not is_known:
            raise RuntimeError(
                "a trainable parameter must be in a unit, or its replicas drift apart: got parameter "
                f"{index} of the optimizer, of shape {tuple(parameter.shape)}, in none. Call "
                "fully_shard() on the root module too, or list it in ignored_params."
            )
