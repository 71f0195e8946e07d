"""Residency: what a unit keeps of its full parameters and gradients between uses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch_mics import _C

if TYPE_CHECKING:
    from torch_mics._groups import Groups, HierarchicalGather

RESIDENCIES = {
    "shard": _C.Residency.SHARD,
    "block": _C.Residency.BLOCK,
    "full": _C.Residency.FULL,
}


def resolve_reshard(
    reshard_after_forward: object, groups: Groups, hierarchical: HierarchicalGather
) -> _C.Residency | None:
    """Turns reshard_after_forward into what rests after forward; None: nothing was asked.

    Raises:
        ValueError: neither True, False nor None, nor a number of ranks that can be had.
    """
    if reshard_after_forward is None:
        return None
    if isinstance(reshard_after_forward, bool):
        return _C.Residency.SHARD if reshard_after_forward else _C.Residency.FULL
    if not isinstance(reshard_after_forward, int):
        raise ValueError(
            "reshard_after_forward must be True, False, None or a number of ranks: got "
            f"{reshard_after_forward!r}."
        )
    if reshard_after_forward == groups.topology.partition_size:
        return _C.Residency.SHARD
    _check_block(f"reshard_after_forward={reshard_after_forward}", groups, hierarchical)
    ranks_per_node = groups.topology.ranks_per_node
    if reshard_after_forward != ranks_per_node:
        raise ValueError(
            "reshard_after_forward as a number must be the ranks of a node or of the partition group: "
            f"got {reshard_after_forward}, ranks_per_node={ranks_per_node}, "
            f"partition_size={groups.topology.partition_size}."
        )
    return _C.Residency.BLOCK


def check_keep(keep: object, groups: Groups, hierarchical: HierarchicalGather) -> None:
    """Raises ValueError when keep_between_microsteps cannot be had."""
    if not isinstance(keep, str) or keep not in RESIDENCIES:
        raise ValueError(
            f'keep_between_microsteps must be "shard", "block" or "full": got {keep!r}.'
        )
    if keep == "block":
        _check_block('keep_between_microsteps="block"', groups, hierarchical)


def check_accumulate(accumulate: object, groups: Groups, hierarchical: HierarchicalGather) -> None:
    """Raises ValueError when `accumulate` cannot be had."""
    if accumulate not in ("two_hop", "block", "local"):
        raise ValueError(f'accumulate must be "two_hop", "block" or "local": got {accumulate!r}.')
    if accumulate == "block":
        _check_block('accumulate="block"', groups, hierarchical)


def _check_block(asked: str, groups: Groups, hierarchical: HierarchicalGather) -> None:
    """A node block is what hop 1 leaves: there must be two hops."""
    topology = groups.topology
    if (
        topology.spans_nodes
        and groups.variant(hierarchical) == _C.Variant.HIERARCHICAL
        and topology.ranks_per_node > 1
    ):
        return
    raise ValueError(
        f"{asked} needs a partition group over several nodes of several ranks, gathered hierarchically: "
        f"got partition_size={topology.partition_size} on {topology.describe_nodes()}, "
        f"hierarchical_gather={hierarchical!r}. Without two hops there is no node block to keep."
    )


def residency_of(
    after_forward: _C.Residency | None, keep: str, *, is_root: bool
) -> tuple[_C.Residency, _C.Residency]:
    """Gives what rests after forward and between micro-steps.

    What is kept between micro-steps is kept after forward too. The root, whose backward follows at once,
    frees nothing after forward unless asked to.
    """
    if after_forward is None:
        after_forward = _C.Residency.FULL if is_root else _C.Residency.SHARD
    order = list(RESIDENCIES.values())
    between = RESIDENCIES[keep]
    return max(after_forward, between, key=order.index), between
