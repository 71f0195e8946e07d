"""The collectives of a partition group on single tensors, run as the runtime runs them for a unit.

    groups = GroupCollectives(mics.init_mesh("world"))
    groups.all_gather(full, piece)       # full [p * n], piece [n]
    groups.reduce_scatter(piece, full)

Over several nodes they take two hops: between ranks with the same place in their nodes, and inside a node.
"""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh

from torch_mics import _C
from torch_mics._groups import HierarchicalGather, traffic_of
from torch_mics._mesh import groups_of


class GroupCollectives:
    """All-gather and reduce-scatter over the partition groups of a mesh.

    An operation has run when its call returns. Every member makes the same calls, on one thread, and
    none while a model on the mesh runs.

    Attributes:
        size: ranks of a partition group.
        is_hierarchical: whether an operation takes two hops.
    """

    def __init__(self, mesh: DeviceMesh, *, hierarchical: HierarchicalGather = "auto") -> None:
        """Collective over all ranks.

        Args:
            mesh: as for shard_model.
            hierarchical: as hierarchical_gather of shard_model.

        Raises:
            ValueError: hierarchical was asked for on nodes where it cannot work.
        """
        groups = groups_of(mesh)
        self._groups = groups
        self._communicators = groups.communicators(groups.variant(hierarchical))
        self.size = groups.topology.partition_size
        self.is_hierarchical = self._communicators.gather_rail is not None

    def all_gather(self, output: torch.Tensor, piece: torch.Tensor) -> None:
        """Gathers every rank's piece into `output`, in rank order.

        Args:
            output: [size * numel], contiguous.
            piece: [numel]; it may be this rank's part of `output` if there is one hop.

        Raises:
            ValueError: sizes or dtypes do not fit.
        """
        rail, intra = self._communicators.gather_rail, self._communicators.gather_intra
        self._check(output, piece)
        if rail is None:
            intra.all_gather([output], [piece])
            return
        block = piece.new_empty(rail.size * piece.numel())
        rail.all_gather([block], [piece])
        intra.all_gather(list(output.chunk(rail.size)), list(block.chunk(rail.size)))

    def reduce_scatter(self, piece: torch.Tensor, full: torch.Tensor) -> None:
        """Sums every rank's `full` and leaves this rank's part in `piece`.

        Each hop sums as its backend does, for CPUs in rank order in fp32, rounded once; see
        docs/backends.md. fp16 overflows where a sum does.

        Args:
            piece: [numel], contiguous.
            full: [size * numel]. Read only.

        Raises:
            ValueError: sizes or dtypes do not fit.
        """
        rail, intra = self._communicators.reduce_rail, self._communicators.reduce_intra
        self._check(full, piece)
        if rail is None:
            intra.reduce_scatter([piece], [full])
            return
        block = piece.new_empty(rail.size * piece.numel())
        intra.reduce_scatter(list(block.chunk(rail.size)), list(full.chunk(rail.size)))
        rail.reduce_scatter([piece], [block])

    def backends(self) -> dict[str, str]:
        """Says what carries each communicator, as torch_mics.backends()."""
        return {c.name: self._groups.backends[c] for c in self._of_groups()}

    def traffic(self) -> dict[str, dict[str, int]]:
        """Gives this rank's calls and bytes since the start, as torch_mics.traffic()."""
        return traffic_of(self._of_groups())

    def _of_groups(self) -> list[_C.Communicator]:
        replicate = self._communicators.replicate
        return [c for c in self._communicators.all() if c is not replicate]

    def _check(self, full: torch.Tensor, piece: torch.Tensor) -> None:
        if (
            full.numel() != self.size * piece.numel()
            or full.dtype != piece.dtype
            or not (full.is_contiguous() and piece.is_contiguous())
        ):
            raise ValueError(
                "a collective of a group takes contiguous tensors of one dtype, one size times the "
                f"other: got size={self.size}, {full.numel()} elements of {full.dtype} and "
                f"{piece.numel()} of {piece.dtype}."
            )
