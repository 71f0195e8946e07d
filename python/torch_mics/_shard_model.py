"""shard_model: finds the units of a model and shards them, in one line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy

from torch_mics._fully_shard import fully_shard
from torch_mics._groups import HierarchicalGather, ShardSize, default_mesh, ensure_process_group

Units = str | set[type[nn.Module]] | Callable[[nn.Module], bool] | int | list[nn.Module]
Model = TypeVar("Model", bound=nn.Module)


def shard_model(
    model: Model,
    *,
    units: Units = "auto",
    mesh: DeviceMesh | None = None,
    shard_size: ShardSize | Literal["auto"] | None = None,
    mp_policy: MixedPrecisionPolicy | str | None = None,
    reshard_after_forward: bool | int | None = None,
    ignored_params: set[nn.Parameter] | None = None,
    hierarchical_gather: HierarchicalGather = "auto",
    accumulate: str = "two_hop",
    keep_between_microsteps: str = "shard",
) -> Model:
    """Shards a whole model in place: each unit, then the root with what is left.

    Args:
        model: any module.
        units: "auto": the classes in the model's `_no_split_modules` (Hugging Face), else the class
            repeated in the largest ModuleList, and embeddings and the final norm and head beside them;
            a set of module classes; a predicate on modules; an int: modules of at least so many
            parameters that hold no such module; or the modules themselves.
        shard_size: as fully_shard(), or "auto": the one that plan() finds (docs/planner.md#auto).
        mesh, mp_policy, reshard_after_forward, ignored_params, hierarchical_gather, accumulate,
        keep_between_microsteps: as fully_shard().

    Returns:
        `model`.

    Raises:
        ValueError, TypeError: as fully_shard(); also when no unit is found.
    """
    if mesh is not None and shard_size is not None:
        raise ValueError(
            f"give either a mesh or a shard_size: got both (shard_size={shard_size!r})."
        )
    ensure_process_group()
    if shard_size == "auto":
        from torch_mics.planner._auto import choose_shard_size  # it needs find_units

        shard_size = choose_shard_size(model, units)
    if mesh is None:
        mesh = default_mesh("node" if shard_size is None else shard_size)
    common: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": mp_policy,
        "ignored_params": ignored_params,
        "hierarchical_gather": hierarchical_gather,
        "accumulate": accumulate,
        "keep_between_microsteps": keep_between_microsteps,
    }
    for group in find_units(model, units):
        fully_shard(
            group if len(group) > 1 else group[0],
            reshard_after_forward=reshard_after_forward,
            **common,
        )
    fully_shard(model, reshard_after_forward=reshard_after_forward, **common)
    return model


def find_units(model: nn.Module, units: Units = "auto") -> list[list[nn.Module]]:
    """Lists the units below the root, inner ones first; modules of one list form one unit.

    Tied parameters end up in one list, or in none (then the root has them).
    """
    if isinstance(units, list):
        chosen = list(units)
    elif isinstance(units, str):
        if units != "auto":
            raise ValueError(
                f'units must be "auto", a set of classes, a predicate, an int or a list: got {units!r}.'
            )
        blocks = _find_blocks(model)
        joined = _join_tied(_innermost_first(model, blocks), _find_outer_units(model, blocks))
        return _without_ties_to_the_root(model, joined)
    elif isinstance(units, set):
        classes = tuple(units)
        chosen = [m for m in model.modules() if isinstance(m, classes)]
    elif isinstance(units, bool):
        raise TypeError(f"units must not be a bool: got {units!r}.")
    elif isinstance(units, int):
        chosen = _find_by_size(model, units)
    elif callable(units):
        chosen = [m for m in model.modules() if units(m)]
    else:
        raise TypeError(
            'units must be "auto", a set of classes, a predicate, an int or a list: got '
            f"{type(units).__name__}."
        )
    chosen = [module for module in chosen if module is not model]
    if not chosen and not isinstance(units, int):
        raise ValueError(f"no module of {type(model).__name__} is a unit: got units={units!r}.")
    return _join_tied(_innermost_first(model, chosen), [])


def _find_blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks: by name of class if the model says so, else by the largest ModuleList."""
    names = set(getattr(model, "_no_split_modules", None) or [])
    if names:
        return [module for module in model.modules() if type(module).__name__ in names]
    best: list[nn.Module] = []
    for module in model.modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential) or len(module) < 2:
            continue
        members = _members_of(module)
        kinds = [type(member) for member in members]
        # In the order of the members: every rank must find the same.
        for kind in dict.fromkeys(kinds):
            repeated = [member for member in members if type(member) is kind]
            if len(repeated) > 1 and _numel(repeated) > _numel(best):
                best = repeated
    return best


def _members_of(container: nn.Module) -> list[nn.Module]:
    """The members that have a forward: of a ModuleList of ModuleLists, those of the inner ones."""
    members: list[nn.Module] = []
    for member in container._modules.values():
        if member is None:
            continue
        has_forward = type(member).forward is not nn.Module.forward
        members += [member] if has_forward else _members_of(member)
    return members


def _numel(modules: list[nn.Module]) -> int:
    return sum({id(p): p.numel() for m in modules for p in m.parameters()}.values())


def _find_outer_units(model: nn.Module, blocks: list[nn.Module]) -> list[list[nn.Module]]:
    """Embeddings each, and what follows the blocks (final norm and head) together."""
    inside = {id(child) for block in blocks for child in block.modules()}
    above = {id(m) for m in model.modules() if any(c is b for b in blocks for c in m.modules())}
    leaves = [
        module
        for module in model.modules()
        if id(module) not in inside and id(module) not in above and module._parameters
    ]
    embeddings: list[list[nn.Module]] = [[m] for m in leaves if isinstance(m, nn.Embedding)]
    if not blocks:
        return embeddings
    order = [id(module) for module in model.modules()]
    last_block = max(order.index(id(block)) for block in blocks)
    tail = [
        module
        for module in leaves
        if not isinstance(module, nn.Embedding) and order.index(id(module)) > last_block
    ]
    return embeddings + ([tail] if tail else [])


def _find_by_size(model: nn.Module, minimum: int) -> list[nn.Module]:
    if minimum < 1:
        raise ValueError(f"units as a number of parameters must be at least 1: got {minimum}.")
    large = [m for m in model.modules() if _numel([m]) >= minimum]
    return [
        module
        for module in large
        if not any(other is not module and other in set(module.modules()) for other in large)
        and type(module).forward is not nn.Module.forward
    ]


def _innermost_first(model: nn.Module, modules: list[nn.Module]) -> list[list[nn.Module]]:
    order = {id(module): position for position, module in enumerate(model.modules())}
    missing = [type(module).__name__ for module in modules if id(module) not in order]
    if missing:
        raise ValueError(f"units must be modules of the model: got {missing} from elsewhere.")
    return [[module] for module in sorted(modules, key=lambda module: -order[id(module)])]


def _join_tied(inner: list[list[nn.Module]], outer: list[list[nn.Module]]) -> list[list[nn.Module]]:
    """Joins units that share a parameter, so that a tied parameter is in one unit."""
    joined: list[list[nn.Module]] = []
    for unit in [*inner, *outer]:
        mine = {id(p) for module in unit for p in module.parameters()}
        sharing = [
            other
            for other in joined
            if mine & {id(p) for module in other for p in module.parameters()}
            and not _contains(unit, other)
        ]
        merged = [module for other in sharing for module in other] + unit
        joined = [other for other in joined if other not in sharing] + [merged]
    return joined


def _without_ties_to_the_root(
    model: nn.Module, units: list[list[nn.Module]]
) -> list[list[nn.Module]]:
    """Leaves to the root the units that share a parameter with what the root has anyway."""
    while True:
        inside = {id(m) for unit in units for module in unit for m in module.modules()}
        outside = {
            id(parameter)
            for module in model.modules()
            if id(module) not in inside
            for parameter in module._parameters.values()
        }
        free = [
            unit
            for unit in units
            if not any(id(p) in outside for module in unit for p in module.parameters())
        ]
        if len(free) == len(units):
            return units
        units = free


def _contains(outer: list[nn.Module], inner: list[nn.Module]) -> bool:
    """Whether the inner unit lies below the outer: its parameters are its own."""
    below = {id(child) for module in outer for child in module.modules()}
    return all(id(module) in below for module in inner)
