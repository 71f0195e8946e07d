"""Hooks on module forward: gather before, reshard after. Backward runs from the C++ core.

This is the slow path of _C.UnitHooks. Most forwards take the fast path, which is C++ alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from torch_mics import _C
from torch_mics._context import Context, context_of
from torch_mics._policy import cast_floating, find_tensors
from torch_mics._unit import ShardedUnit
from torch_mics.report._startup import log_startup


def register_hooks(unit: ShardedUnit) -> None:
    """Registers forward hooks on the unit's modules, and guards on modules with parameters below them."""
    hooks = _C.UnitHooks(
        long_pre_forward=_pre_forward, long_post_forward=_post_forward, find_tensors=find_tensors
    )
    unit.forward.hooks = hooks
    for module in unit.modules:
        module.register_forward_pre_hook(hooks.pre_forward, prepend=True, with_kwargs=True)
        # always_call: after an exception in forward the unit must not stay unsharded.
        module.register_forward_hook(hooks.post_forward, prepend=False, always_call=True)
    owners = {id(place.module): place.module for p in unit.parameters for place in p.places}
    for module in unit.modules:
        owners.pop(id(module), None)
    holders: dict[int, list[nn.Module]] = {each: [] for each in owners}
    for module in unit.modules:
        for child in module.modules():
            if id(child) in holders:
                holders[id(child)].append(module)
    for module in owners.values():
        guard = _Guard(unit, holders[id(module)])
        module.register_forward_pre_hook(guard, prepend=True)


class _Guard:
    """Lets a module inside a unit run outside of the unit's own forward, or refuses it.

    Inside another forward the unit is lent until the outermost one returns. Outside of all forwards the
    call is refused: nothing would tell when to free the parameters.
    """

    def __init__(self, unit: ShardedUnit, holders: list[nn.Module]) -> None:
        self._unit = unit
        self._holders = holders  # modules of the unit that contain the guarded one

    def __call__(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():
            return  # Dynamo drops the guard from what it compiles
        unit = self._unit
        lend(unit, self._holders)
        handle = unit.handle
        if (handle is None or not handle.is_unsharded) and not unit.forward.is_full_elsewhere:
            raise RuntimeError(
                "a module inside a unit must run inside the unit's forward or that of a module above: "
                f'got a call of {type(module).__name__} while its unit "{unit.name}" is sharded. Call '
                "the unit, or unshard() it first."
            )


def lend(unit: ShardedUnit, holders: list[nn.Module]) -> None:
    """Gathers a unit whose parameters are used outside of its own forward, but inside another one.

    They stay full until the outermost forward returns. Nothing happens while a module of `holders` runs.
    """
    if unit.engine is None or unit.forward.is_full_elsewhere:
        return
    is_group = len(unit.modules) > 1
    if is_group and any(module in unit.forward.running for module in holders):
        return
    for each in unit.all:
        unit.engine.lend(each.index, is_group=is_group)


def ensure_context(module: nn.Module, unit: ShardedUnit) -> Context:
    """Gives the unit's context; makes it when this is the first forward of a root."""
    context = context_of(unit)
    # The full parameters made here are trained later, even if this forward runs in inference mode.
    with torch.inference_mode(False):
        if context is None:
            context = Context(module, unit)
            log_startup(context)
        elif not (context.engine.is_in_forward or is_recomputation()):
            context.refresh()
    return context


def _pre_forward(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    unit: ShardedUnit = module._mics_unit  # type: ignore[assignment]
    if unit.forward.is_full_elsewhere:
        raise RuntimeError(
            f'forward must not run inside unsharded(): got a forward of unit "{unit.name}". Leave the '
            "context first."
        )
    context = ensure_context(module, unit)
    if unit.forward.post_optim_event is not None:
        unit.forward.post_optim_event.wait()
        unit.forward.post_optim_event = None
        unit.connect_hooks()
    policy = unit.policy
    if policy.cast_forward_inputs and policy.param_dtype is not None:
        args = cast_floating(args, policy.param_dtype)
        kwargs = cast_floating(kwargs, policy.param_dtype)
    if len(unit.modules) > 1 and not is_recomputation():
        unit.forward.running.append(module)
        if unit.forward.modules_to_run:
            return args, kwargs  # a later module of a group that is open
        # Outside of any other forward a module runs alone: the rest of its group may never run.
        is_alone = not context.engine.is_in_forward and not unit.is_root
        unit.forward.modules_to_run = {module} if is_alone else set(unit.modules)
    for each in unit.all:
        context.engine.pre_forward(each.index)
    return args, kwargs


def is_recomputation() -> bool:
    """Whether this forward runs inside a backward: activation checkpointing."""
    return torch._C._current_graph_task_id() != -1


def _post_forward(module: nn.Module, args: Any, output: Any) -> Any:
    unit: ShardedUnit = module._mics_unit  # type: ignore[assignment]
    context = context_of(unit)
    if context is None:  # its own pre-forward failed
        return output
    failed = _C.has_forward_failed(output)
    tensors = None
    if not failed:
        if unit.policy.output_dtype is not None:
            output = cast_floating(output, unit.policy.output_dtype)
        if torch.is_grad_enabled():
            tensors = find_tensors(output)
    is_open = False
    if not is_recomputation():
        if len(unit.modules) > 1:
            if module in unit.forward.running:
                unit.forward.running.remove(module)
            unit.forward.modules_to_run.discard(module)
            if failed:
                unit.forward.modules_to_run.clear()
            is_open = bool(unit.forward.modules_to_run)
        if unit.is_root and not is_open:
            _close_open_groups(context)
    for each in reversed(unit.all):
        if tensors is not None:
            context.engine.watch_outputs(each.index, tensors)
        if not is_open:
            context.engine.post_forward(each.index, failed=failed)
    return output


def _close_open_groups(context: Context) -> None:
    """Ends groups of which the root's forward ran some modules but not all."""
    for unit in context.units:
        if not unit.is_root and unit.forward.modules_to_run:
            unit.forward.close_group()
            for each in reversed(unit.all):
                context.engine.post_forward(each.index, failed=False)


class ForwardAdapter:
    """What functions of torch.distributed.fsdp expect from _get_fsdp_state().

    register_fsdp_forward_method calls _pre_forward and _post_forward. share_comm_ctx shares a _comm_ctx:
    all models share their streams here, so there is nothing to share.
    """

    _comm_ctx: object = None
    _fsdp_param_group: object = None

    _pre_forward = staticmethod(_pre_forward)
    _post_forward = staticmethod(_post_forward)
