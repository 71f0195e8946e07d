"""The start-up report: what a model runs with, and what was asked for and not obtained."""

from __future__ import annotations

import logging

import torch.distributed as dist

from torch_mics import _C
from torch_mics._context import Context
from torch_mics._find_units import listed

_log = logging.getLogger("torch_mics")


def log_startup(context: Context) -> None:
    """Logs the report on rank 0, at level INFO."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    if rank == 0 and _log.isEnabledFor(logging.INFO):
        _log.info(startup_report(context))


def startup_report(context: Context) -> str:
    """Gives groups, units, what carries each communicator, and planned memory."""
    topology = context.root_unit.groups.topology
    variants = " and ".join(sorted(variant.name.lower() for variant in context.communicators))
    numel = sum(parameter.sizes.numel() for unit in context.units for parameter in unit.parameters)
    lines = [
        f"torch_mics {_C.version}, built for torch {_C.built_for_torch}",
        f"groups: {topology.replication_size} replicas over partition groups of "
        f"{topology.partition_size}, {variants}; {topology.describe_nodes()}",
        f"units: {len(context.units)} of {numel:,} parameters in {context.root_unit.dtype}, computed in "
        f"{context.root_unit.parameter_dtype}, reduced in {context.root_unit.reduce_dtype}",
    ]
    lines += [note for unit in context.units for note in unit.notes]
    lent = [unit.name for unit in context.units if unit.handle is not None and unit.handle.is_lent]
    if lent:
        lines.append(
            f"lent: {listed(lent)}, used outside of their own forwards, and kept full until the "
            "outermost forward returns"
        )
    lines += [f"{name}: {backend}" for name, backend in carried(context).items()]
    memory = context.engine.memory()
    parts = ", ".join(f"{part.name} {part.nbytes:,}" for part in memory.parts)
    planned = sum(part.nbytes for part in memory.parts)
    lines.append(f"memory: {planned:,} bytes ({parts or 'none'})")
    if context.nccl_world is not None:
        lines += [f"note: {text}" for text in context.nccl_world.notes()]
    return "\n  ".join(lines)


def carried(context: Context) -> dict[str, str]:
    """Says what carries each communicator, by name; several groups of one name may differ."""
    found: dict[str, list[str]] = {}
    for communicator in context.all_communicators():
        known = (unit.groups.backends.get(communicator) for unit in context.units)
        text = next(text for text in known if text is not None)
        texts = found.setdefault(communicator.name, [])
        if text not in texts:
            texts.append(text)
    return {name: "; ".join(texts) for name, texts in found.items()}
