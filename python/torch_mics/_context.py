"""Context: one root module, its units in order, and the engine that drives them."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from torch_mics import _C
from torch_mics._exchange import check_same, exchange
from torch_mics._groups import Communicators
from torch_mics._session import session
from torch_mics._unit import ShardedUnit, original_class, units_of

_log = logging.getLogger("torch_mics")


def context_of(unit: ShardedUnit) -> Context | None:
    """Gives the context that drives the unit; None before the first forward."""
    return unit.owner if isinstance(unit.owner, Context) else None


def contexts_of(units: list[ShardedUnit]) -> list[Context]:
    """Lists the contexts of units, each once. There are several where modules ran without their root."""
    found = map(context_of, units)
    return list({id(context): context for context in found if context is not None}.values())


def release(units: list[ShardedUnit]) -> None:
    """Closes the contexts of `units`, so that their parameters may be moved or replaced.

    Raises:
        RuntimeError: gradients wait for their synchronisation.
    """
    for context in contexts_of(units):
        context.close()


class Context:
    """Units below a root, with their engine. All ranks make it together, at the root's first forward."""

    def __init__(self, root: nn.Module, root_unit: ShardedUnit) -> None:
        self.root_unit = root_unit
        self.units = units_of(root)
        for other_root in root_unit.modules[1:]:
            # The root was sharded as a list: all its modules are roots.
            self.units += [unit for unit in units_of(other_root) if unit not in self.units]
        # Contexts of units that have run before, by themselves or below another root.
        older = contexts_of(self.units)
        below = {id(unit) for unit in self.units}
        self.roots = [root_unit]
        for other in older:
            self.roots += [unit for unit in other.roots if id(unit) not in below]
            self.units += [unit for unit in other.units if id(unit) not in below]
        self._name_units(root)
        _check_shards(self.units)
        _check_agreement(self.units)
        # All models of a session share these two, and each keeps them alive.
        self.flight_log = session().flight_log() if dist.get_world_size() > 1 else None
        self.nccl_world = root_unit.groups.nccl_world()
        self.communicators: dict[_C.Variant, Communicators] = {}
        # Units of older contexts keep their communicators.
        self.other_communicators = [made for other in older for made in other.all_communicators()]
        for unit in self.units:
            if unit.handle is not None:
                continue
            if unit.variant not in self.communicators:
                self.communicators[unit.variant] = root_unit.groups.communicators(unit.variant)
        self.control = root_unit.groups.control()
        self.streams = root_unit.groups.streams(root_unit.shard.device)
        self._has_told_of_order = False
        self._make_engine(older)

    def _name_units(self, root: nn.Module) -> None:
        names = {id(module): name for name, module in root.named_modules()}
        for unit in self.units:
            found = [
                names.get(id(module)) or original_class(module).__name__ for module in unit.modules
            ]
            for each in unit.all:
                each.name = ", ".join(found)
            for companion in unit.companions:
                companion.name += f" ({str(companion.dtype).removeprefix('torch.')})"

    def _make_engine(self, older: list[Context]) -> None:
        handles = [unit.handle or self._make_handle(unit) for unit in self.units]
        self.engine = _C.Engine(
            handles,
            control=self.control,
            streams=self.streams,
            depths=self._depths(),
        )
        for index, (unit, handle) in enumerate(zip(self.units, handles, strict=True)):
            handle.name = unit.name
            is_root = any(unit in root.all for root in self.roots)
            unit.attach(self, self.engine, handle, index, is_root=is_root)
        for other in older:
            self.engine.adopt(other.engine, [unit.index for unit in other.units])
        self.engine.set_callbacks(
            refresh=_weakly(self.follow_requires_grad), check_hooks=_weakly(self.check_hooks)
        )
        self.push_prefetch()
        for unit in self.units:
            unit.push_settings()
            unit.connect_hooks()

    def _make_handle(self, unit: ShardedUnit) -> _C.Unit:
        nested = [inner for module in unit.modules for inner in units_of(module)]
        return unit.make_handle(
            self.communicators[unit.variant],
            has_nested_units=any(inner.modules != unit.modules for inner in nested),
        )

    def _depths(self) -> _C.Depths:
        settings = self.root_unit.settings
        depths = _C.Depths()
        depths.intra, depths.rail = settings.prefetch_depths
        depths.reductions = settings.reductions_in_flight
        return depths

    def push_depths(self) -> None:
        """Sets the engine's depths to the root's. Collective; raises ValueError where ranks differ."""
        settings = self.root_unit.settings
        check_same("prefetch depths", [*settings.prefetch_depths, settings.reductions_in_flight])
        self.engine.set_depths(self._depths())

    def push_prefetch(self) -> None:
        """Tells the engine which prefetches the user has asked for."""

        def indices(units: list[ShardedUnit]) -> list[int]:
            return [other.index for other in units if other.owner is self]

        for unit in self.units:
            self.engine.set_prefetch(_C.Phase.FORWARD, unit.index, indices(unit.forward_prefetch))
            self.engine.set_prefetch(_C.Phase.BACKWARD, unit.index, indices(unit.backward_prefetch))

    def refresh(self) -> None:
        """Adapts to parameters that were frozen or unfrozen. To be called before each outermost forward."""
        self._tell_of_order_changes()
        # Without autograd the flags do not matter, and may be set back before they do.
        if torch.is_grad_enabled() and not self.engine.matches_requires_grad():
            self.follow_requires_grad()

    def follow_requires_grad(self) -> None:
        """Gives units gradients for the parameters that now require them. Collective."""
        check_same(
            "which parameters require gradients",
            {
                unit.name: {p.name: p.sharded.requires_grad for p in unit.parameters}
                for unit in self.units
            },
        )
        for unit in self.units:
            if unit.handle is not None and not unit.handle.matches_requires_grad():
                unit.change_trainable()

    def check_hooks(self) -> None:
        """Raises RuntimeError where a sharded parameter has a hook that would never run."""
        for unit in self.units:
            for parameter in unit.parameters:
                if parameter.sharded._backward_hooks:
                    raise RuntimeError(
                        "a sharded parameter must have no gradient hooks: got Tensor.register_hook on "
                        f'"{parameter.name}" of unit "{unit.name}". Autograd never sees sharded '
                        "parameters. Use register_post_accumulate_grad_hook, set_all_reduce_hook on its "
                        "unit, or change `.grad` after backward."
                    )

    def _tell_of_order_changes(self) -> None:
        if self._has_told_of_order or self.engine.num_order_changes == 0:
            return
        self._has_told_of_order = True
        _log.warning(
            "units have run in another order than the one recorded before: they were gathered on demand, "
            "and the new order is recorded. As long as the order keeps changing, nothing is prefetched."
        )

    def close(self) -> None:
        """Detaches all units; the next forward makes a new context.

        Raises:
            RuntimeError: gradients wait for their synchronisation.
        """
        for unit in self.units:
            if unit.is_unfinished:
                raise RuntimeError(
                    "parameters must not be moved or replaced during an accumulation: unit "
                    f'"{unit.name}" has gradients that are not synchronised. Finish the step, or call '
                    "reset() on the root module."
                )
        self.engine.reset()
        for unit in self.units:
            unit.detach()

    def all_communicators(self) -> list[_C.Communicator]:
        """Lists the communicators of its units, and the one of all ranks."""
        found = [c for made in self.communicators.values() for c in made.all()]
        found += self.other_communicators
        return found if self.control is None else [*found, self.control]


_CHECKSUM_CHUNK = 1 << 22  # elements; bounds the memory of _checksum


def _weakly(method: Callable[[], None]) -> Callable[[], None]:
    """Makes a callback of a method that does not keep its object alive."""
    reference = weakref.WeakMethod(method)

    def call() -> None:
        found = reference()
        if found is not None:
            found()

    return call


def _check_shards(units: list[ShardedUnit]) -> None:
    for unit in units:
        if unit.shard.is_meta and unit.parameters:
            raise RuntimeError(
                f'parameters must have values before the first forward: unit "{unit.name}" is on the '
                "meta device. Call torch_mics.materialize(model), or load a state dict."
            )


def _describe(unit: ShardedUnit) -> dict[str, Any]:
    return {
        "parameters": {
            parameter.name: {
                "shape": list(parameter.sizes),
                "requires_grad": parameter.sharded.requires_grad,
            }
            for parameter in unit.parameters
        },
        "dtype": str(unit.dtype),
        "param_dtype": str(unit.parameter_dtype),
        "reduce_dtype": str(unit.reduce_dtype),
        "hierarchical_gather": str(unit.variant == _C.Variant.HIERARCHICAL),
        "settings": unit.settings.described(unit.groups.topology.ranks_per_node),
    }


def _check_agreement(units: list[ShardedUnit]) -> None:
    """Raises on every rank when ranks differ in the model, or replicas in its values."""
    topology = units[0].groups.topology
    check_same(
        "the sharded model",
        {
            "torch": torch.__version__,
            "partition_size": topology.partition_size,
            "order of units": [unit.name for unit in units],
            "unit": {unit.name: _describe(unit) for unit in units},
        },
    )
    if topology.replication_size == 1:
        return
    sums = [_checksum(unit.shard) for unit in units]
    all_sums = [text.split(";") for text in exchange("the replicas' values", ";".join(sums))]
    for rank in range(dist.get_world_size()):
        first = topology.partition_rank(rank)
        for unit, mine, reference in zip(units, all_sums[rank], all_sums[first], strict=True):
            if mine != reference:
                raise ValueError(
                    f'replicas must start from the same values: unit "{unit.name}" differs between '
                    f"world_rank {first} and {rank}. Seed every rank alike before the model is built "
                    "(torch.manual_seed), or load a checkpoint before the first step."
                )


def _checksum(shard: torch.Tensor) -> str:
    """Hashes the bits of a shard: the weighted sum of its elements as integers, modulo 2**64."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32}.get(
        shard.element_size(), torch.int64
    )
    total = 0
    for start in range(0, shard.numel(), _CHECKSUM_CHUNK):
        bits = shard.detach()[start : start + _CHECKSUM_CHUNK].view(integers).long()
        first = start * bits.numel() // max(1, min(_CHECKSUM_CHUNK, shard.numel() - start))
        places = torch.arange(first, first + bits.numel(), device=bits.device)
        # Odd weights lose no bit. The constant is the golden ratio in 32 bits.
        total += int((bits * (2 * places * 0x9E3779B1 + 1)).sum())
    return f"{total % 2**64:x}"
