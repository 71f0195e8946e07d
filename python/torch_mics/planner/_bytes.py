"""The bytes that a run should count, by communicator."""

from __future__ import annotations

from collections.abc import Sequence

from torch_mics import _C

COMMUNICATORS = ("gather/rail", "gather/intra", "reduce/rail", "reduce/intra", "replicate")


def predicted_bytes(
    units: Sequence[_C.UnitSize],
    *,
    world_size: int,
    partition_size: int,
    ranks_per_node: int,
    hierarchical: bool,
    num_microsteps: int,
    residency: _C.ResidencySettings | None = None,
) -> dict[str, int]:
    """Gives the bytes that one rank receives in one step; it sends as many.

    The keys are those of traffic(), without control; a communicator that is not needed has 0:
    `replicate` with one replica, and both `rail` for groups inside a node.
    """
    topology = _C.Topology(
        node_of_rank=[str(rank // ranks_per_node) for rank in range(world_size)],
        partition_size=partition_size,
    )
    variant = _C.Variant.HIERARCHICAL if hierarchical else _C.Variant.FLAT
    num_nodes = len(topology.rail_group(0, variant))
    shape = (num_nodes, partition_size // num_nodes)
    replicas = topology.replication_size
    hops = _C.count_hops(residency or _C.ResidencySettings(), num_microsteps, replicas)
    total = dict.fromkeys(COMMUNICATORS, 0)
    for unit in units:
        step = _C.step_bytes(unit, shape, replicas, hops)
        for name in total:
            total[name] += getattr(step, name.replace("/", "_"))
    return total
