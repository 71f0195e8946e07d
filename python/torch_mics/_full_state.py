"""Full state dicts: gathered to rank 0, and loaded from rank 0."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.tensor import DTensor

from torch_mics._exchange import all_or_none, exchange, together
from torch_mics._module import sharded_module
from torch_mics._parameters import wrap
from torch_mics._state_dict_hooks import plain_name
from torch_mics._unit import unit_of_parameter, units_of


def full_state_dict(
    model: nn.Module, *, cpu_offload: bool = True, rank0_only: bool = True
) -> dict[str, Any]:
    """Gathers the whole model as plain tensors, under the names of the unsharded model. Collective.

    All names of a tied parameter refer to one tensor.

    Args:
        model: the sharded root module.
        cpu_offload: put the tensors on the CPU; one at a time is full on the device.
        rank0_only: give an empty dict on the other ranks. Needs cpu_offload, as in torch.

    Raises:
        ValueError: rank0_only without cpu_offload.
    """
    model = sharded_module(model, "full_state_dict")
    if rank0_only and not cpu_offload:
        raise ValueError(
            "rank0_only needs cpu_offload: got rank0_only=True, cpu_offload=False. Pass "
            "rank0_only=False."
        )
    keeps = not rank0_only or dist.get_rank() == 0
    found: dict[str, Any] = {}
    with together("full_state_dict"):
        # Tied parameters are gathered once and are one tensor, as in the unsharded model, so that a writer
        # can see that they are tied.
        first: dict[int, str] = {}
        for key, value in model.state_dict(keep_vars=True).items():
            name = plain_name(key)
            known = first.setdefault(id(value), name)
            if known == name:
                found[name] = _full_value(value, keeps=keeps, cpu_offload=cpu_offload)
            else:
                found[name] = found[known]
    return found if keeps else {}


def _full_value(value: Any, *, keeps: bool, cpu_offload: bool) -> Any:
    """An entry of a full state dict; None where this rank only helps to gather it."""
    if not isinstance(value, torch.Tensor):
        return value
    value = value.detach()
    if isinstance(value, DTensor):
        local = value.to_local()
        full = full_tensor(value)
        # With one rank in the group the gathered tensor may be the shard itself.
        value = full.clone() if full.data_ptr() == local.data_ptr() else full
    if not keeps:
        return None
    return value.cpu() if cpu_offload else value


def full_tensor(sharded: DTensor) -> torch.Tensor:
    """Gathers a DTensor, also of a dtype that torch's backends cannot send. Collective."""
    if sharded.dtype not in _MOVED_AS_BYTES:
        return sharded.full_tensor()
    local = sharded.to_local()
    if local.ndim == 1:
        local = local.unsqueeze(-1)
    codes = local.contiguous().view(torch.uint8)
    shape = torch.Size([sharded.shape[0], *codes.shape[1:]])
    whole = wrap(codes, sharded.device_mesh, sharded.placements, shape).full_tensor()
    return whole.view(sharded.dtype).view(sharded.shape)


_MOVED_AS_BYTES = {
    torch.int16,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    *(value for name, value in vars(torch).items() if name.startswith("float8")),
}


def load_full_state_dict(
    model: nn.Module, state: dict[str, Any], *, broadcast: bool = True, strict: bool = True
) -> None:
    """Loads plain, full tensors into a sharded model; frees its full parameters. Collective.

    Args:
        model: the sharded root module.
        state: full tensors by their names in the unsharded model. With `broadcast` only rank 0 needs it.
        broadcast: send rank 0's tensors to all; else every rank takes its rows of its own copy.
        strict: names must match exactly.

    Raises:
        ValueError: on every rank: names or shapes are those of another model.
    """
    model = sharded_module(model, "load_full_state_dict")
    # A copy: torch renames and removes entries.
    state = {plain_name(name): value for name, value in state.items()}
    exchange("a call of load_full_state_dict", "")
    _check_fits(model, state, broadcast=broadcast, strict=strict)
    broadcast = broadcast and dist.get_world_size() > 1
    mine = model.state_dict(keep_vars=True)
    # torch would bring all full tensors to the device before it takes the first; it must, from rank 0 to
    # the others and to parameters without memory, and then does so one by one.
    cuts = not broadcast and not any(unit.shard.is_meta for unit in units_of(model))
    if cuts:
        state = {**state, **_cut(mine, state)}
    options = StateDictOptions(
        full_state_dict=not cuts, broadcast_from_rank0=broadcast, strict=strict
    )
    with all_or_none("load_full_state_dict"):
        set_model_state_dict(model, state, options=options)
    for unit in units_of(model):
        unit.reshard()


def _cut(mine: dict[str, Any], state: dict[str, Any]) -> dict[str, DTensor]:
    """Gives this rank's rows of the full tensors in `state`, where they are now, as DTensors."""
    found = {}
    for key, parameter in mine.items():
        full = state.get(plain_name(key))
        unit = unit_of_parameter(parameter) if isinstance(parameter, DTensor) else None
        if unit is None or not isinstance(full, torch.Tensor) or isinstance(full, DTensor):
            continue
        index = next(i for i, each in enumerate(unit.parameters) if each.sharded is parameter)
        first, last = unit.layout().rows_of(index, unit.partition_rank)
        made = wrap(
            parameter.to_local().detach(),
            parameter.device_mesh,
            parameter.placements,
            parameter.shape,
        )
        # from_local() would bring it to the mesh's device.
        made._local_tensor = full.detach()[first:last]
        found[plain_name(key)] = made
    return found


def _check_fits(model: nn.Module, state: dict[str, Any], *, broadcast: bool, strict: bool) -> None:
    problem = describe_misfit(
        shapes_of(model.state_dict()),
        shapes_of(state),
        strict=strict,
    )
    is_checked_here = not broadcast or dist.get_rank() == 0
    problems = exchange("the state dict to load", problem if is_checked_here and problem else "")
    first = next((text for text in problems if text), None)
    if first is not None:
        raise ValueError(f"the state dict must be one of this model: {first}.")


# By name; None for what is not a tensor, as extra state may be.
Shapes = dict[str, tuple[int, ...] | None]


def shapes_of(state: dict[str, Any]) -> Shapes:
    """Gives the shapes of a state dict, under the names of the unwrapped model."""
    return {
        plain_name(name): tuple(value.shape) if isinstance(value, torch.Tensor) else None
        for name, value in state.items()
    }


def describe_misfit(mine: Shapes, other: Shapes, *, strict: bool = True) -> str | None:
    """Says in what way `other` is not a state of this model, or None when it is."""
    missing = sorted(set(mine) - set(other))
    unexpected = sorted(set(other) - set(mine))
    shapes = [
        name
        for name, shape in mine.items()
        if shape is not None and name in other and shape != other[name]
    ]
    if strict and missing:
        return f'got no "{missing[0]}" ({len(missing)} names are missing)'
    if strict and unexpected:
        return f'got an unknown "{unexpected[0]}" ({len(unexpected)} names are unknown)'
    if shapes:
        name = shapes[0]
        found = other[name]
        got = "no tensor" if found is None else f"shape {list(found)}"
        return f'got {got} for "{name}", which has {list(mine[name] or ())} here'
    return None
