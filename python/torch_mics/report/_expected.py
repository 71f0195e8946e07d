"""The bytes that steps of a sharded model should move, by communicator and tier."""

from __future__ import annotations

import dataclasses

import torch.distributed as dist

from torch_mics import _C
from torch_mics._context import Context
from torch_mics._groups import traffic_of
from torch_mics._unit import ShardedUnit
from torch_mics.planner._bytes import COMMUNICATORS

TIERS = ("intra", "inter")  # to ranks of the same node, and of others

Bytes = dict[tuple[str, str], int]  # by communicator and tier


@dataclasses.dataclass(frozen=True)
class StepShape:
    """How many backwards a step has."""

    num_microsteps: int
    num_boundaries: int  # of them, those that synchronised the replicas


def expected_bytes(context: Context, shape: StepShape) -> Bytes:
    """Gives the bytes that this rank receives in one step; all units must be used once per micro-step."""
    total: Bytes = dict.fromkeys(((name, tier) for name in COMMUNICATORS for tier in TIERS), 0)
    for unit in context.units:
        if unit.handle is None or not unit.parameters:
            continue
        step = _step_bytes(unit, shape)
        made = context.communicators[unit.variant]
        for communicator in made.all():
            name = communicator.name
            nbytes = getattr(step, name.replace("/", "_"))
            # An all-reduce is a reduce-scatter and an all-gather of as many bytes.
            share = {"gather": 1.0, "reduce": 0.0, "replicate": 0.5}[name.partition("/")[0]]
            gathered = int(share * nbytes)
            inside = _from_same_node(
                communicator, unit.groups.topology, gathered, nbytes - gathered
            )
            total[name, "intra"] += inside
            total[name, "inter"] += nbytes - inside
    return total


def _from_same_node(
    communicator: _C.Communicator, topology: _C.Topology, gathered: int, reduced: int
) -> int:
    """Gives how many of the bytes that a rank receives come from ranks of its own node."""
    if communicator.size == 1:
        return 0
    nodes = [topology.node_of(rank) for rank in communicator.world_ranks]
    mine = nodes[communicator.rank]
    beside, others = nodes.count(mine) - 1, communicator.size - 1
    before_is_beside = nodes[communicator.rank - 1] == mine

    def inside(nbytes: int, in_ring: bool) -> int:
        if in_ring:
            return nbytes if before_is_beside else 0
        return nbytes * beside // others

    return inside(gathered, communicator.gathers_in_ring) + inside(
        reduced, communicator.reduces_in_ring
    )


def counted_bytes(context: Context) -> Bytes:
    """Gives the bytes that were counted since the communicators were made."""
    counters = traffic_of(context.all_communicators())
    return {
        (name, tier): counters[name][f"received_{tier}_nbytes"] if name in counters else 0
        for name in COMMUNICATORS
        for tier in TIERS
    }


def unit_size(unit: ShardedUnit) -> _C.UnitSize:
    """Gives numbers and sizes of the elements that a unit sends; replicas sum in fp32 at least."""
    layout, trainable = unit.layout(), unit.gradient_layout()
    return _C.UnitSize(
        shard_numel=layout.shard_numel,
        payload_numel=layout.payload_numel,
        gradient_shard_numel=trainable.shard_numel,
        gradient_payload_numel=trainable.payload_numel,
        parameter_nbytes=unit.parameter_dtype.itemsize,
        gradient_nbytes=unit.reduce_dtype.itemsize,
        replicate_nbytes=max(4, unit.reduce_dtype.itemsize),
    )


def residency_of(unit: ShardedUnit) -> _C.ResidencySettings:
    """Gives the residency that costs the bytes of this unit; accumulate="local" keeps full gradients."""
    assert unit.handle is not None
    settings = unit.handle.settings
    residency = _C.ResidencySettings(
        after_forward=settings.residency.after_forward,
        between_microsteps=settings.residency.between_microsteps,
        gradient_accumulation=settings.residency.gradient_accumulation,
    )
    if unit.settings.accumulate == "local":
        residency.gradient_accumulation = _C.Residency.FULL
    if not settings.unshard_in_backward:
        residency.after_forward = _C.Residency.FULL
    return residency


def _step_bytes(unit: ShardedUnit, shape: StepShape) -> _C.StepBytes:
    topology = unit.groups.topology
    residency = residency_of(unit)
    hops = _C.count_hops(residency, shape.num_microsteps, topology.replication_size)
    hops.replicate *= shape.num_boundaries
    # The formula assumes one boundary. What is accumulated is reduced at each of them.
    if residency.gradient_accumulation == _C.Residency.FULL:
        hops.reduce_intra = shape.num_boundaries
    if residency.gradient_accumulation != _C.Residency.SHARD:
        hops.reduce_rail = shape.num_boundaries
    # What is kept serves one accumulation.
    if residency.between_microsteps != _C.Residency.SHARD:
        hops.gather_rail *= shape.num_boundaries
    if residency.between_microsteps == _C.Residency.FULL:
        hops.gather_intra *= shape.num_boundaries
    if topology.partition_size == 1 and unit.parameter_dtype == unit.dtype:
        hops.gather_rail = hops.gather_intra = 0  # the shard is the full parameters
    group = topology.rail_group(dist.get_rank(), unit.variant)
    num_nodes = len(group)
    local = topology.partition_size // num_nodes
    return _C.step_bytes(unit_size(unit), (num_nodes, local), topology.replication_size, hops)
