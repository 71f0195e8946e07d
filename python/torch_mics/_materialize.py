"""materialize: gives a model that was built on the meta device its first values."""

from __future__ import annotations

import base64
from collections.abc import Callable

import torch
from torch import nn

from torch_mics._context import units_of
from torch_mics._exchange import exchange
from torch_mics._fully_shard import _device_of
from torch_mics._training import check_sharded
from torch_mics._unit import Parameter, ShardedUnit


def materialize(
    model: nn.Module,
    *,
    device: torch.device | str | None = None,
    init_fn: Callable[[nn.Module], None] | None = None,
) -> None:
    """Allocates the shards and initialises them module by module; at most one module is full at a time.

    Every rank initialises each module whole, from the random state of rank 0, and keeps its rows: the
    result is that of a single process, for every partition size. Buffers are allocated and initialised
    too. Collective.

    Args:
        model: the sharded root module, wholly or partly on the meta device.
        device: of the shards; by default that of the mesh.
        init_fn: initialises the parameters and buffers that a module holds itself. By default the
            module's reset_parameters(), then the model's `_init_weights(module)` (Hugging Face).

    Raises:
        ValueError: a module holds meta tensors and has no initialiser. All are named; nothing changed.
    """
    check_sharded(model, "materialize")
    units = units_of(model)
    target = torch.device(device) if device is not None else _device_of(units[0].groups)
    owned = _meta_parameters(units)
    todo = [(n, m) for n, m in model.named_modules() if id(m) in owned or _has_meta_buffer(m)]
    initialisers = {name: _initialiser(model, module, init_fn) for name, module in todo}
    missing = [
        f"{name or 'the root'} ({type(module).__name__})"
        for name, module in todo
        if initialisers[name] is None
    ]
    if missing:
        raise ValueError(
            "every module with tensors on the meta device needs an initialiser: got none for "
            f"{', '.join(missing)}. Give them reset_parameters(), or pass init_fn."
        )
    _allocate_shards(units, target)
    state = base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode()
    first = base64.b64decode(exchange("the random state", state)[0])
    torch.set_rng_state(torch.frombuffer(bytearray(first), dtype=torch.uint8))
    for name, module in todo:
        initialise = initialisers[name]
        assert initialise is not None
        _initialise_module(module, owned.get(id(module), []), target, initialise)


def _meta_parameters(
    units: list[ShardedUnit],
) -> dict[int, list[tuple[ShardedUnit, int, Parameter, str]]]:
    """Lists, per module, the parameters on the meta device that it holds."""
    owned: dict[int, list[tuple[ShardedUnit, int, Parameter, str]]] = {}
    for unit in units:
        if not unit.shard.is_meta:
            continue
        for index, parameter in enumerate(unit.parameters):
            for place in parameter.places:
                entry = (unit, index, parameter, place.name)
                owned.setdefault(id(place.module), []).append(entry)
    return owned


def _has_meta_buffer(module: nn.Module) -> bool:
    return any(buffer is not None and buffer.is_meta for buffer in module._buffers.values())


def _initialiser(
    model: nn.Module, module: nn.Module, init_fn: Callable[[nn.Module], None] | None
) -> Callable[[nn.Module], None] | None:
    if init_fn is not None:
        return init_fn
    reset = getattr(module, "reset_parameters", None)
    init_weights = getattr(model, "_init_weights", None)
    steps = [step for step in (reset, init_weights) if callable(step)]
    if not steps:
        return None

    def initialise(each: nn.Module) -> None:
        if callable(reset):
            reset()
        if callable(init_weights):
            init_weights(each)

    return initialise


def _allocate_shards(units: list[ShardedUnit], device: torch.device) -> None:
    for unit in units:
        if not unit.shard.is_meta:
            continue
        for parameter in unit.parameters:
            local = torch.zeros_like(parameter.local, device=device)
            sharded = nn.Parameter(
                unit._wrap(local, parameter.sizes), requires_grad=parameter.sharded.requires_grad
            )
            parameter.sharded._mics_replaced = parameter.name  # type: ignore[attr-defined]
            parameter.sharded = sharded
            for place in parameter.places:
                place.module._parameters[place.name] = sharded
        unit.repack()


def _initialise_module(
    module: nn.Module,
    owned: list[tuple[ShardedUnit, int, Parameter, str]],
    device: torch.device,
    initialise: Callable[[nn.Module], None],
) -> None:
    for name, buffer in module._buffers.items():
        if buffer is not None and buffer.is_meta:
            module._buffers[name] = torch.empty_like(buffer, device=device)
    for _, _, parameter, name in owned:
        values = torch.zeros(parameter.sizes, dtype=parameter.sharded.dtype, device=device)
        module._parameters[name] = nn.Parameter(values, parameter.sharded.requires_grad)
    try:
        initialise(module)
    finally:
        written = [module._parameters[name] for _, _, _, name in owned]
        for _, _, parameter, name in owned:
            module._parameters[name] = parameter.sharded
    with torch.no_grad():
        for (unit, index, parameter, _), initialised in zip(owned, written, strict=True):
            assert initialised is not None
            first, last = unit.layout().rows_of(index, unit.partition_rank)
            parameter.local.copy_(initialised[first:last])
