"""The device mesh: its groups of ranks, which nodes they are on, and meshes made by default."""

from __future__ import annotations

import os
import warnings
import weakref
from typing import Literal, cast, get_args

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from torch_mics import _C
from torch_mics._exchange import check_same, exchange, operation_timeout
from torch_mics._groups import Groups, IntraBackend
from torch_mics._hosts import node, start_device
from torch_mics._nccl import check_device

ShardSize = int | Literal["node", "world"]

_MESH_DIMS = ("dp_replicate", "dp_shard")
_INTRA_BACKEND = "MICS_INTRA_BACKEND"
# Meshes of calls that name none, one per shard size; they live as long as the process group.
_default_meshes: weakref.WeakKeyDictionary[object, dict[ShardSize, DeviceMesh]] = (
    weakref.WeakKeyDictionary()
)


def ensure_process_group() -> None:
    """Makes a process group of one when the script runs alone.

    Raises:
        RuntimeError: a launcher started several processes but torch.distributed is not initialised.
    """
    if dist.is_initialized():
        return
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1:
        raise RuntimeError(
            "torch.distributed must be initialised before sharding: got WORLD_SIZE="
            f"{world_size} and no process group. Call torch.distributed.init_process_group() first."
        )
    dist.init_process_group(
        "gloo" if not torch.cuda.is_available() else "cpu:gloo,cuda:nccl",
        store=dist.HashStore(),
        rank=0,
        world_size=1,
    )


def _default_device_type() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _resolve_shard_size(shard_size: ShardSize, nodes: list[str]) -> int:
    """Turns "node" and "world" into a number of ranks."""
    if isinstance(shard_size, bool) or not isinstance(shard_size, int | str):
        raise TypeError(f'shard_size must be an int, "node" or "world": got {shard_size!r}.')
    if isinstance(shard_size, int):
        return shard_size
    if shard_size == "world":
        return len(nodes)
    if shard_size != "node":
        raise ValueError(f'shard_size must be an int, "node" or "world": got {shard_size!r}.')
    topology = _C.Topology(node_of_rank=nodes, partition_size=1)
    if topology.ranks_per_node == 0:
        raise ValueError(
            'shard_size="node" needs nodes of equal size whose ranks are consecutive: got '
            f"{topology.describe_nodes()}. Start the ranks node by node, or give a number."
        )
    return topology.ranks_per_node


def _find_nodes(gpus_per_node: int | None) -> list[str]:
    """Gives the node of every rank."""
    if gpus_per_node is None:
        return exchange("nodes", node())
    world_size = dist.get_world_size()
    if gpus_per_node < 1 or world_size % gpus_per_node != 0:
        raise ValueError(
            f"gpus_per_node must divide the world size: got gpus_per_node={gpus_per_node}, "
            f"world_size={world_size}."
        )
    return [str(rank // gpus_per_node) for rank in range(world_size)]


def _resolve_intra_backend(asked: str) -> IntraBackend:
    """Gives MICS_INTRA_BACKEND where it is set, else what was asked for.

    Raises:
        ValueError: it is none of the three.
    """
    chosen = os.environ.get(_INTRA_BACKEND) or asked
    if chosen not in get_args(IntraBackend):
        source = _INTRA_BACKEND if os.environ.get(_INTRA_BACKEND) else "the argument"
        raise ValueError(
            f'intra_backend must be "auto", "shm" or "c10d": got {chosen!r} from {source}.'
        )
    return cast(IntraBackend, chosen)


def init_mesh(
    shard_size: ShardSize = "node",
    *,
    device_type: str | None = None,
    gpus_per_node: int | None = None,
    intra_backend: IntraBackend = "auto",
) -> DeviceMesh:
    """Makes the 2-D mesh ("dp_replicate", "dp_shard") of partition and replication groups.

    Consecutive ranks form a partition group. torch.distributed must be initialised, unless the script
    runs as a single process. Every rank must call it with the same arguments.

    Args:
        shard_size: ranks that share one copy of the model states; "node": the ranks of a node;
            "world": all. It must divide the world size, and divide the ranks of a node or be a
            multiple of them.
        device_type: "cuda" or "cpu"; by default "cuda" where there is one. The rank's device is `device_id`
            of init_process_group(), else the current one.
        gpus_per_node: ranks per node, instead of what the hosts say.
        intra_backend: what carries collectives inside a node. "shm": shared memory, for tensors on the
            CPU; "c10d": torch's process groups, on CUDA also between nodes; "auto": shared memory where
            all members of the groups can share it, on CUDA NCCL. The environment variable
            MICS_INTRA_BACKEND overrides this.

    Raises:
        ValueError: on every rank; the message lists the legal sizes, or the map of ranks to nodes.
        RuntimeError: torch.distributed is not initialised, or there is no GPU for "cuda".
    """
    check_device(device_type or _default_device_type())
    ensure_process_group()
    intra_backend = _resolve_intra_backend(intra_backend)
    check_same(
        "the arguments of init_mesh",
        {"shard_size": shard_size, "device": device_type, "intra_backend": intra_backend},
    )
    nodes = _find_nodes(gpus_per_node)
    topology = _C.Topology(
        node_of_rank=nodes, partition_size=_resolve_shard_size(shard_size, nodes)
    )
    start_device(device_type or _default_device_type())
    shape = (topology.replication_size, topology.partition_size)
    mesh = init_device_mesh(device_type or _default_device_type(), shape, mesh_dim_names=_MESH_DIMS)
    _attach_groups(mesh, nodes, intra_backend)
    return mesh


def default_mesh(shard_size: ShardSize) -> DeviceMesh:
    """Gives the mesh for calls without one: made once per process group and shard size."""
    ensure_process_group()
    meshes = _default_meshes.setdefault(dist.group.WORLD, {})
    if shard_size not in meshes:
        meshes[shard_size] = init_mesh(shard_size)
    return meshes[shard_size]


def _warn_of_irregular_nodes(topology: _C.Topology) -> None:
    """Warns once, on rank 0, where groups over several nodes cannot use two hops."""
    if not (topology.spans_nodes and topology.hierarchical_error) or dist.get_rank() != 0:
        return
    size = topology.partition_size
    warnings.warn(
        "partition groups over several nodes should have nodes of equal size whose ranks are "
        f"consecutive: got {topology.describe_nodes()}, partition_size={size}. Gathers and reductions "
        f"run in one hop: up to {size - 1}/{size} of the model crosses nodes for every rank in each, "
        "instead of once per node. Start the ranks node by node, or set MICS_NODE_ID.",
        stacklevel=4,
    )


def _attach_groups(mesh: DeviceMesh, nodes: list[str], intra_backend: IntraBackend) -> Groups:
    groups = Groups(mesh, nodes, intra_backend)
    _warn_of_irregular_nodes(groups.topology)
    # torch gives the groups of a mesh its own default time-out, not that of the process group.
    for group in {id(group): group for group in mesh.get_all_groups()}.values():
        distributed_c10d._set_pg_timeout(operation_timeout(), group)
    # Kept on the mesh: it lives as long, and every unit on the mesh finds it.
    mesh._mics_groups = groups  # type: ignore[attr-defined]
    return groups


def groups_of(mesh: DeviceMesh) -> Groups:
    """Gives the groups of a mesh. They are made at the first call, which is collective.

    Raises:
        ValueError: the mesh is not 1-D or 2-D over all ranks in natural order.
    """
    groups: Groups | None = getattr(mesh, "_mics_groups", None)
    if groups is not None:
        return groups
    if mesh.ndim not in (1, 2):
        raise ValueError(
            f"the mesh must be 1-D (shard) or 2-D (replicate, shard): got {mesh.ndim} dimensions."
        )
    ranks = mesh.mesh.flatten().tolist()
    world_size = dist.get_world_size()
    # A permuted row would shard in one order and gather in another.
    if ranks != list(range(world_size)):
        raise ValueError(
            f"the mesh must hold all ranks in natural order: got {ranks} in a world of {world_size}. "
            "Use torch_mics.init_mesh(shard_size)."
        )
    intra_backend = _resolve_intra_backend("auto")
    check_same("MICS_INTRA_BACKEND", intra_backend)
    return _attach_groups(mesh, exchange("nodes", node()), intra_backend)
