"""Measures the collectives of a step on the running cluster, through the library's own communicators."""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist

from torch_mics import _C
from torch_mics._exchange import exchange
from torch_mics._hosts import node
from torch_mics._mesh import groups_of, init_mesh

DEFAULT_SIZES = (2**20, 2**24, 2**27)  # bytes of a unit
_REPEATS = 5
_PRODUCT_SIZE = 512  # of the square matrices that measure a CPU


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One collective, on a network that is otherwise idle but for those of the other groups.

    Attributes:
        table: of the calibration: "flat", "rail_hop" or "intra_hop".
        num_ranks: of the partition group; of "intra_hop" those of the group that lie on one node.
        nbytes: of the unit whose shards are gathered; a rail hop moves the part of its rail only.
        seconds: until the slowest rank is done.
    """

    table: str
    num_ranks: int
    nbytes: int
    seconds: float


def ranks_per_node() -> int:
    """Gives the ranks of each node. Collective.

    Raises:
        ValueError: on every rank: there is one rank, or the nodes differ in size.
    """
    nodes = exchange("nodes", node())
    found = _C.Topology(node_of_rank=nodes, partition_size=1).ranks_per_node
    if len(nodes) < 2 or found == 0:
        raise ValueError(
            "a cluster to calibrate must have several ranks, and nodes of equal size whose ranks are "
            f"consecutive: got {len(nodes)} ranks on {len(set(nodes))} nodes. Start it with torchrun, "
            "node by node."
        )
    return found


def measure(
    sizes: Sequence[int], device: torch.device, report: Callable[[str], None]
) -> Iterator[Measurement]:
    """Measures each size on each candidate group of the world. Collective.

    All groups of a kind run at once, as in training. A gather and a reduction are timed, and their mean
    counts: the time model prices both alike.

    Args:
        sizes: bytes of a unit; rounded up to whole shards.
        device: of the tensors.
        report: called with a line on what is measured next.
    """
    world, per_node = dist.get_world_size(), ranks_per_node()
    for p in _C.Topology.legal_partition_sizes(world, per_node):
        if p == 1:
            continue
        groups = groups_of(init_mesh(p, device_type=device.type))
        flat = groups.communicators(_C.Variant.FLAT)
        hops = [("intra_hop" if p <= per_node else "flat", flat.gather_intra, flat.reduce_intra, p)]
        if p > per_node:
            rails = groups.communicators(_C.Variant.HIERARCHICAL)
            if rails.gather_rail is not None and rails.reduce_rail is not None:
                hops.append(("rail_hop", rails.gather_rail, rails.reduce_rail, p))
        for table, gather, reduce, num_ranks in hops:
            for nbytes in sizes:
                numel = -(-nbytes // (4 * p))
                report(f"{table} over {num_ranks} ranks, {4 * p * numel} bytes")
                seconds = _seconds_of(gather, reduce, numel, device)
                yield Measurement(table, num_ranks, 4 * p * numel, seconds)


def _seconds_of(
    gather: _C.Communicator, reduce: _C.Communicator, numel: int, device: torch.device
) -> float:
    """Mean of a gather and a reduction in which each member has a shard of `numel` elements."""
    full = torch.zeros(gather.size * numel, device=device)
    shard = torch.zeros(numel, device=device)

    def gathered() -> None:
        gather.all_gather([full], [shard])

    def reduced() -> None:
        reduce.reduce_scatter([shard], [full])

    return (_median(gathered, device) + _median(reduced, device)) / 2


def _median(run: Callable[[], None], device: torch.device) -> float:
    """The median, over repeats, of the time of the slowest rank; the first run is not counted."""
    mine = []
    for _ in range(1 + _REPEATS):
        dist.barrier()
        mine.append(_clock(run, device))
    everyone = [json.loads(text) for text in exchange("measured times", json.dumps(mine[1:]))]
    return statistics.median(max(times) for times in zip(*everyone, strict=True))


def _clock(run: Callable[[], None], device: torch.device) -> float:
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def measure_cpu(per_node: int) -> dict[str, float]:
    """Measures on a CPU what a data sheet says of a GPU: FLOP/s, bytes/s and bytes of a rank. Collective.

    All ranks compute at once, because they share the cores; the slowest counts.
    """
    a, b = (torch.ones(_PRODUCT_SIZE, _PRODUCT_SIZE) for _ in range(2))
    copied, source = torch.empty(2**22), torch.ones(2**22)
    cpu = torch.device("cpu")
    product = _median(lambda: _discard(torch.mm(a, b)), cpu)
    copy = _median(lambda: _discard(copied.copy_(source)), cpu)
    return {
        "peak": 2.0 * _PRODUCT_SIZE**3 / product,
        "memory_bandwidth": 2.0 * 4 * source.numel() / copy,
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / per_node,
    }


def _discard(tensor: torch.Tensor) -> None:
    del tensor
