"""What state_dict() and load_state_dict() need from a sharded module."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from torch_mics._context import release
from torch_mics._parameters import Parameter
from torch_mics._unit import ShardedUnit


def plain_name(name: str) -> str:
    """Gives the name that it had before torch.compile or a checkpoint wrapper wrapped a module."""
    return name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")


def register_state_dict_hooks(unit: ShardedUnit) -> None:
    """Keeps sharded parameters registered when a state dict is taken or loaded."""
    for module in unit.modules:
        module.register_state_dict_pre_hook(_register_sharded)
        module.register_load_state_dict_pre_hook(_before_load)
        module.register_load_state_dict_post_hook(_after_load)


def _register_sharded(module: nn.Module, *args: Any) -> None:
    unit: ShardedUnit = module._mics_unit  # type: ignore[assignment]
    for each in unit.all:
        each.reshard()


def _before_load(
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: dict[str, Any],
    *args: Any,
) -> None:
    """Refuses a state dict that cannot be loaded, before anything is loaded."""
    _register_sharded(module)
    assigns = local_metadata.get("assign_to_params_buffers", False)
    for name, parameter in module.named_parameters():
        brought = state_dict.get(f"{prefix}{name}")
        if not isinstance(parameter, DTensor) or not isinstance(brought, torch.Tensor):
            continue
        if assigns:
            _check_assigned(name, parameter, brought)
        elif not isinstance(brought, DTensor):
            raise ValueError(
                "load_state_dict of a sharded model must bring DTensors: got a plain "
                f'{type(brought).__name__} {tuple(brought.shape)} for "{name}". Full tensors are loaded '
                "by torch_mics.load_full_state_dict(model, state)."
            )


def _after_load(module: nn.Module, incompatible_keys: Any) -> None:
    """Takes the values of the parameters that load_state_dict(assign=True) has put into the modules."""
    for unit in module._mics_unit.all:  # type: ignore[union-attr]
        _take_assigned(unit)


def _take_assigned(unit: ShardedUnit) -> None:
    replaced: list[tuple[Parameter, torch.Tensor]] = []
    for parameter in unit.parameters:
        for place in parameter.places:
            held = place.module._parameters[place.name]
            if held is not None and held is not parameter.sharded:
                replaced.append((parameter, held))
    if not replaced:
        return
    is_meta = unit.shard.is_meta
    if is_meta:
        release([unit])
    for parameter, present in replaced:
        if is_meta:
            # The assigned tensors bring the device; repack() lays the shard around them.
            parameter.sharded = nn.Parameter(
                present.detach(), requires_grad=parameter.sharded.requires_grad
            )
        else:
            with torch.no_grad():
                parameter.sharded.copy_(present)
    for parameter in unit.parameters:
        parameter.register(parameter.sharded)
    if is_meta:
        unit.repack()


def _check_assigned(name: str, mine: DTensor, assigned: torch.Tensor) -> None:
    if (
        isinstance(assigned, DTensor)
        and assigned.shape == mine.shape
        and assigned.placements == mine.placements
        and assigned.device_mesh == mine.device_mesh
    ):
        return
    kind = type(assigned).__name__
    raise ValueError(
        "load_state_dict(assign=True) must bring DTensors of the same shape and placements: got "
        f'{kind} {tuple(assigned.shape)} for "{name}". Use assign=False, or '
        "load_full_state_dict()."
    )
