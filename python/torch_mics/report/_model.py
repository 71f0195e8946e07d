"""What a sharded model runs with and has done so far: describe, backends, memory, traffic, exposed."""

from __future__ import annotations

import warnings

from torch import nn

from torch_mics import _C
from torch_mics._context import Context, contexts_of
from torch_mics._groups import traffic_of
from torch_mics._hooks import ensure_context
from torch_mics._module import sharded_module, sharded_unit
from torch_mics._nccl import nbytes_outside_torch
from torch_mics._unit import units_of
from torch_mics.report._startup import carried, startup_report


def traffic(model: nn.Module) -> dict[str, dict[str, int]]:
    """Gives this rank's calls and bytes since the first forward, by communicator.

    Names: gather/rail, gather/intra, reduce/rail, reduce/intra, replicate, control. Keys: calls,
    sent_intra_nbytes, sent_inter_nbytes, received_intra_nbytes, received_inter_nbytes, where intra and
    inter are peers on the same and on another node. Empty before the first forward.
    """
    contexts = contexts_of(units_of(sharded_module(model, "traffic")))
    return traffic_of(made for context in contexts for made in context.all_communicators())


def memory(model: nn.Module) -> dict[str, int]:
    """Gives the bytes of the runtime's working memory on this rank, by part.

    It is one allocation for full parameters, node blocks and reductions, planned from the units and their
    settings (docs/training.md#memory); shards, gradients and optimizer states are not in it. "unplanned"
    counts the allocations for what did not fit, over the life of the plan: several units unsharded by
    hand, or sums of gradients beside a `.grad` that is kept. (Its key was "beside the plan", which still
    works, with a warning.)

    With NCCL "outside torch" has what is in use on the device now and is neither torch's nor planned:
    NCCL's communicators, the CUDA context, and other processes.

    Collective before the first forward.
    """
    totals = _Memory()
    contexts = _contexts(model, "memory")
    for context in contexts:
        planned = context.engine.memory()
        for part in planned.parts:
            totals[part.name] = totals.get(part.name, 0) + part.nbytes
        sums = context.engine.unplanned_sum_nbytes()
        totals["unplanned"] = totals.pop("unplanned", 0) + planned.grown_nbytes + sums
    worlds = [context.nccl_world for context in contexts if context.nccl_world is not None]
    if worlds and contexts[0].root_unit.groups.device.type == "cuda":
        totals["outside torch"] = nbytes_outside_torch(
            worlds[0], contexts[0].root_unit.shard.device
        )
    return totals


class _Memory(dict[str, int]):
    """Bytes by part, with the names that parts had before."""

    def __missing__(self, part: str) -> int:
        if part != "beside the plan":
            raise KeyError(part)
        warnings.warn(
            'mics.memory(model)["beside the plan"] is now ["unplanned"]; the old key goes with the '
            "next version.",
            FutureWarning,
            stacklevel=2,
        )
        return self["unplanned"]


def exposed(model: nn.Module) -> dict[str, dict[str, float]]:
    """Gives the seconds that this rank's training thread has waited for communication, by unit.

    By name of the unit: "gather" and "reduce", since the first forward. This is exposed communication, with
    the time that slower ranks cost. On CPUs only: a device's own waits are not measured. The ranges
    "torch_mics: ..." of torch.profiler are the same waits. Empty before the first forward.
    """
    return {
        unit.name: {
            "gather": context.engine.exposed(unit.index).gather.total_seconds(),
            "reduce": context.engine.exposed(unit.index).reduce.total_seconds(),
        }
        for context in contexts_of(units_of(sharded_module(model, "exposed")))
        for unit in context.units
    }


def _contexts(model: nn.Module, caller: str) -> list[Context]:
    """Gives the contexts of the units at and below `model`, or makes the one of `model`."""
    module = sharded_module(model, caller)
    found = contexts_of(units_of(module))
    if found:
        return found
    try:
        return [ensure_context(module, sharded_unit(module, caller))]
    except _C.TimeoutError as error:
        # Other ranks may as well run their first forward.
        raise _C.TimeoutError(
            f"{caller} must be called on every rank before the first forward: {error}"
        ) from error


def describe(model: nn.Module) -> str:
    """Gives the start-up report: groups, units, what carries each communicator, planned memory.

    Also which units shard_model() joined or left to the root for what they share, and which have been lent
    so far (docs/training.md#units). Rank 0 also logs it at the first forward, by the logger "torch_mics" at
    level INFO. Collective before the first forward.
    """
    return "\n".join(startup_report(context) for context in _contexts(model, "describe"))


def backends(model: nn.Module) -> dict[str, str]:
    """Gives what carries each communicator: "shm", or "c10d" or "local" with the reason.

    Names as in traffic(). Empty before the first forward.
    """
    found: dict[str, str] = {}
    for context in contexts_of(units_of(sharded_module(model, "backends"))):
        found |= carried(context)
    return found
