"""What the library sees of optimizer steps.

A step that would silently train something else than the model is refused. After a step the parameters that
were gathered before it are stale.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from torch_mics import _C
from torch_mics._unit import ShardedUnit, unit_of_parameter


@functools.cache
def install_optimizer_checks() -> None:
    """Checks every optimizer's step in this process from now on; later calls do nothing."""
    register_optimizer_step_pre_hook(_before_step)
    register_optimizer_step_post_hook(_after_step)


@contextlib.contextmanager
def ignoring_steps_of(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Skips the checks of steps inside, which only create the optimizer's state."""
    optimizer.__dict__["_mics_is_ignored"] = True
    try:
        yield
    finally:
        del optimizer.__dict__["_mics_is_ignored"]


def _before_step(
    optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    if "_mics_is_ignored" in optimizer.__dict__:
        return None
    # When torch calls the hook, args begin with the optimizer itself.
    place = 1 if args and args[0] is optimizer else 0
    closure = kwargs.get("closure") or (args[place] if len(args) > place else None)
    if closure is None or not units_of_optimizer(optimizer):
        _check_accumulation(optimizer)
        return None

    @functools.wraps(closure)
    def checked() -> Any:
        # The last micro-step may run in the closure, so its gradients are checked after it.
        value = closure()
        _check_accumulation(optimizer)
        return value

    if "closure" in kwargs:
        return args, {**kwargs, "closure": checked}
    return (*args[:place], checked, *args[place + 1 :]), kwargs


def _check_accumulation(optimizer: torch.optim.Optimizer) -> None:
    for unit in units_of_optimizer(optimizer):
        if unit.is_unfinished and unit.engine is not None:
            names = ", ".join(f'"{name}"' for name in unit.engine.unfinished_units())
            raise RuntimeError(
                "an optimizer may step only after an accumulation boundary: got gradients that are not "
                f"synchronised in units {names}. {_why_unfinished(unit)}"
            )


def _why_unfinished(unit: ShardedUnit) -> str:
    settings = unit.settings
    if not settings.requires_gradient_sync:
        return (
            "set_requires_gradient_sync(False) or no_sync() is in force: run the last micro-step "
            "outside of it."
        )
    if not settings.requires_all_reduce:
        return (
            "set_requires_all_reduce(False) is in force: set it to True for the last micro-step, or run "
            "that with microbatch(model, is_last=True)."
        )
    if not settings.is_last_backward:
        return "set_is_last_backward(False) is in force: set it to True for the last backward."
    handle = unit.handle
    if handle is not None and not handle.is_accumulating:
        return (
            "Its backward has not ended, or began at no output of its forward: with "
            "set_manual_backward_finalization(True) call finalize_backward(), else return the tensors "
            "that the loss is made of from the module's forward."
        )
    return "Run the last micro-step outside no_sync(), or with microbatch(model, is_last=True)."


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Says which units were written: an optimizer's kernels need not increase a version counter."""
    if "_mics_is_ignored" in optimizer.__dict__:
        return
    written: dict[_C.Engine, list[int]] = {}
    for unit in units_of_optimizer(optimizer):
        if unit.engine is not None:
            written.setdefault(unit.engine, []).append(unit.index)
    for engine, indices in written.items():
        engine.note_written(indices)


def units_of_optimizer(optimizer: torch.optim.Optimizer) -> list[ShardedUnit]:
    """Finds the units of an optimizer's parameters; looks again only when parameters were added."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    cached = optimizer.__dict__.get("_mics_units")
    if cached is not None and cached[0] == len(parameters):
        units = (reference() for reference in cached[1])
        return [unit for unit in units if unit is not None]
    found = _check_parameters(parameters)
    if found:  # what holds no unit now may hold unsharded parameters later
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
        unit = unit_of_parameter(parameter)
        if unit is not None:
            units.setdefault(id(unit), unit)
    if units and dist.get_world_size() > 1:
        _warn_of_others(parameters)
    return list(units.values())


def _warn_of_others(parameters: list[torch.Tensor]) -> None:
    for index, parameter in enumerate(parameters):
        is_known = hasattr(parameter, "_mics_unit") or hasattr(parameter, "_mics_ignored")
        if parameter.requires_grad and not is_known and not isinstance(parameter, DTensor):
            warnings.warn(
                f"parameter {index} of the optimizer, of shape {tuple(parameter.shape)}, is in no unit: "
                "torch_mics does not average its gradient, and without DistributedDataParallel or "
                "replicate() around it the ranks train it apart. Call fully_shard() on the root module "
                "too, or list it in ignored_params.",
                stacklevel=6,
            )
            return
