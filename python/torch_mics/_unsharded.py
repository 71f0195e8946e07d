"""unsharded: the full parameters of a model, for a while, on every rank."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from torch_mics._exchange import exchange
from torch_mics._full_state import full_tensor
from torch_mics._module import sharded_module
from torch_mics._unit import units_of


@contextlib.contextmanager
def unsharded(model: nn.Module, *, writeback: bool = False) -> Iterator[None]:
    """Puts full, plain parameters into the modules, in the dtype of the shards.

    Collective on entry: every rank must enter. Forward must not run inside. The whole model is in
    memory on every rank until the end.

    Args:
        model: a sharded module; acts on all units at and below it.
        writeback: on exit, keep what was written to this rank's rows. Every rank must have written the
            same values.

    Raises:
        TypeError: `model` is not sharded.
        RuntimeError: gradients wait for their boundary and `writeback` would change weights under them.
    """
    units = units_of(sharded_module(model, "unsharded"))
    exchange("a call of unsharded", "")
    for unit in units:
        if writeback and unit.is_unfinished:
            raise RuntimeError(
                "weights must not be written during an accumulation: unit "
                f'"{unit.name}" has gradients that are not synchronised.'
            )
        unit.reshard()
    full: dict[int, nn.Parameter] = {}
    parameters = [(unit, parameter) for unit in units for parameter in unit.parameters]
    for _, parameter in parameters:
        gathered = full_tensor(cast(DTensor, parameter.sharded.detach()))
        # With one rank in the group the gathered tensor may be the shard itself.
        full[id(parameter)] = nn.Parameter(gathered.clone(), requires_grad=False)
    for unit in units:
        unit.forward.is_full_elsewhere = True
        unit.connect_hooks()
    try:
        for _, parameter in parameters:
            parameter.register(full[id(parameter)])
        yield
    finally:
        for _, parameter in parameters:
            parameter.register(parameter.sharded)
        for unit in units:
            unit.forward.is_full_elsewhere = False
            unit.connect_hooks()
    if not writeback:
        return
    with torch.no_grad():
        for unit in units:
            layout = unit.layout()
            for index, parameter in enumerate(unit.parameters):
                first, last = layout.rows_of(index, unit.partition_rank)
                parameter.local.copy_(full[id(parameter)][first:last])
