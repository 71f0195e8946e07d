"""shard_model: finds the units of a model and shards them, in one line."""

from __future__ import annotations

from typing import Any, Literal, TypeVar

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy

from torch_mics._find_units import Units, find_and_explain
from torch_mics._fully_shard import fully_shard
from torch_mics._groups import HierarchicalGather
from torch_mics._mesh import ShardSize, default_mesh, ensure_process_group
from torch_mics.planner._auto import choose_shard_size

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
    prefetch_depths: tuple[int, int] = (1, 2),
) -> Model:
    """Shards a whole model in place: each unit, then the root with what is left.

    Units that share a parameter, or a module with parameters, become one unit. Those that share one with
    the root, or with a unit around them, are left to it; if `units` is a list, they are refused. A unit
    may be used outside of its own forward, when a child runs by itself or its parameters are read
    elsewhere: then it is lent, that is gathered there and kept until the outermost forward returns.
    describe() names the units that were joined, left or lent.

    Args:
        model: any module.
        units: "auto": the classes in the model's `_no_split_modules` (Hugging Face), else the class
            repeated in the largest ModuleList, and embeddings and the final norm and head beside them;
            a set of module classes; a predicate on modules; an int: modules of at least so many
            parameters that hold no such module; or the modules themselves.
        shard_size: as fully_shard(), or "auto": the one that plan() finds (docs/planner.md#auto).
        mesh, mp_policy, reshard_after_forward, ignored_params, hierarchical_gather, accumulate,
        keep_between_microsteps, prefetch_depths: as fully_shard().

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
        shard_size = choose_shard_size(model, units)
    if mesh is None:
        mesh = default_mesh("node" if shard_size is None else shard_size)
    common: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": mp_policy,
        "reshard_after_forward": reshard_after_forward,
        "hierarchical_gather": hierarchical_gather,
        "accumulate": accumulate,
        "keep_between_microsteps": keep_between_microsteps,
        "prefetch_depths": prefetch_depths,
    }
    ignored = ignored_params or set()
    found, notes = find_and_explain(model, units, ignored)
    for group in found:
        # Each unit gets only its own ignored parameters, so that the time stays linear.
        inside = {p for module in group for p in module.parameters()} if ignored else set()
        fully_shard(
            group if len(group) > 1 else group[0], ignored_params=ignored & inside, **common
        )
    fully_shard(model, ignored_params=ignored, **common)
    model._mics_unit.notes = notes  # type: ignore[union-attr]
    return model
