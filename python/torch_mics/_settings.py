"""What a unit keeps between its uses, and when it reduces: what users ask for, resolved once."""

from __future__ import annotations

import dataclasses

from torch_mics import _C

RESIDENCIES = {
    "shard": _C.Residency.SHARD,
    "block": _C.Residency.BLOCK,
    "full": _C.Residency.FULL,
}


@dataclasses.dataclass
class Settings:
    """What fully_shard() and the methods of MiCSModule set; written to the C++ unit when it changes."""

    reshard_after_forward: _C.Residency | None = None  # None: FULL for a root, SHARD for others
    keep_between_microsteps: _C.Residency = _C.Residency.SHARD
    reshard_after_backward: bool = True  # False: kept until the next forward, as in FSDP2
    unshard_in_backward: bool = True
    requires_gradient_sync: bool = True
    requires_all_reduce: bool = True
    is_last_backward: bool = True
    accumulate: str = "two_hop"
    gradient_divide_factor: float | None = None  # None: the world size
    prefetch_depths: tuple[int, int] = (1, 2)  # hop 2, hop 1; the root's holds for all
    reductions_in_flight: int = 2  # the root's holds for all

    def described(self, ranks_per_node: int) -> dict[str, str]:
        """Gives the settings as a user writes them, for messages."""
        words = vars(self) | {
            "reshard_after_forward": reshard_argument(self.reshard_after_forward, ranks_per_node),
            "keep_between_microsteps": self.keep_between_microsteps.name.lower(),
        }
        return {name: str(value) for name, value in words.items()}

    def write_to(self, target: _C.UnitSettings, *, is_root: bool, world_size: int) -> None:
        """Writes these settings to a C++ unit.

        What is kept between micro-steps is kept after forward too. The root, whose backward follows at
        once, frees nothing after forward unless asked to.
        """
        after_forward, between = self.reshard_after_forward, self.keep_between_microsteps
        if after_forward is None:
            after_forward = _C.Residency.FULL if is_root else _C.Residency.SHARD
        residency = target.residency
        residency.after_forward = max(after_forward, between, key=list(RESIDENCIES.values()).index)
        residency.between_microsteps = between if self.reshard_after_backward else _C.Residency.FULL
        residency.gradient_accumulation = (
            _C.Residency.BLOCK if self.accumulate == "block" else _C.Residency.SHARD
        )
        target.unshard_in_backward = self.unshard_in_backward
        target.reduce_gradients = self.requires_gradient_sync or self.accumulate != "local"
        target.synchronize_gradients = (
            self.requires_gradient_sync and self.requires_all_reduce and self.is_last_backward
        )
        target.gradient_factor = 1.0 / (self.gradient_divide_factor or float(world_size))


def check_depths(depths: tuple[int, int]) -> tuple[int, int]:
    """Gives the depths; raises ValueError unless 0 <= intra <= rail."""
    intra, rail = depths
    if not 0 <= intra <= rail:
        raise ValueError(
            "prefetch_depths must be two numbers (intra, rail), 0 <= intra <= rail: got "
            f"({intra}, {rail})."
        )
    return intra, rail


def resolve_reshard(
    asked: object, topology: _C.Topology, variant: _C.Variant
) -> _C.Residency | None:
    """Turns reshard_after_forward into what stays after forward; None: nothing was asked.

    Raises:
        ValueError: neither True, False nor None, nor a number of ranks that is possible here.
    """
    if asked is None:
        return None
    if isinstance(asked, bool):
        return _C.Residency.SHARD if asked else _C.Residency.FULL
    if not isinstance(asked, int):
        raise ValueError(
            f"reshard_after_forward must be True, False, None or a number of ranks: got {asked!r}."
        )
    if asked == topology.partition_size:
        return _C.Residency.SHARD
    _check_block(f"reshard_after_forward={asked}", topology, variant)
    if asked != topology.ranks_per_node:
        raise ValueError(
            "reshard_after_forward as a number must be the ranks of a node or of the partition group: "
            f"got {asked}, ranks_per_node={topology.ranks_per_node}, "
            f"partition_size={topology.partition_size}."
        )
    return _C.Residency.BLOCK


def reshard_argument(residency: _C.Residency | None, ranks_per_node: int) -> bool | int | None:
    """Gives the reshard_after_forward that resolve_reshard() turns into `residency`."""
    if residency == _C.Residency.BLOCK:
        return ranks_per_node
    return None if residency is None else residency == _C.Residency.SHARD


def resolve_keep(asked: object, topology: _C.Topology, variant: _C.Variant) -> _C.Residency:
    """Turns keep_between_microsteps into what stays between micro-steps.

    Raises:
        ValueError: it is unknown, or impossible with these groups.
    """
    if not isinstance(asked, str) or asked not in RESIDENCIES:
        raise ValueError(
            f'keep_between_microsteps must be "shard", "block" or "full": got {asked!r}.'
        )
    if asked == "block":
        _check_block('keep_between_microsteps="block"', topology, variant)
    return RESIDENCIES[asked]


def resolve_accumulate(asked: str, topology: _C.Topology, variant: _C.Variant) -> str:
    """Gives `asked`; raises ValueError when it is unknown, or impossible with these groups."""
    if asked not in ("two_hop", "block", "local"):
        raise ValueError(f'accumulate must be "two_hop", "block" or "local": got {asked!r}.')
    if asked == "block":
        _check_block('accumulate="block"', topology, variant)
    return asked


def _check_block(asked: str, topology: _C.Topology, variant: _C.Variant) -> None:
    """A node block is what hop 1 leaves, so there must be two hops."""
    is_hierarchical = variant == _C.Variant.HIERARCHICAL
    if topology.spans_nodes and is_hierarchical and topology.ranks_per_node > 1:
        return
    raise ValueError(
        f"{asked} needs a partition group over several nodes of several ranks, gathered hierarchically: "
        f"got partition_size={topology.partition_size} on {topology.describe_nodes()}, "
        f"hierarchical_gather={is_hierarchical}. Without two hops there is no node block to keep."
    )
