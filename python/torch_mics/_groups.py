"""Who talks to whom: nodes, the device mesh, process groups and communicators."""

from __future__ import annotations

import dataclasses
import datetime
import os
import warnings
import weakref
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from torch_mics import _C
from torch_mics._exchange import check_same, exchange, operation_timeout
from torch_mics._hosts import host, node
from torch_mics._nccl import check_device, make_world, version_text
from torch_mics._shm_groups import IntraBackend, ShmGroups, resolve_intra_backend

ShardSize = int | Literal["node", "world"]
HierarchicalGather = bool | Literal["auto"]

_MESH_DIMS = ("dp_replicate", "dp_shard")
# A failure on one rank is looked for this often by the others, and answers are waited for this long.
_ALARM_INTERVAL = datetime.timedelta(seconds=0.5)
_PATIENCE = datetime.timedelta(seconds=1.5)
# Meshes made without being asked for, one per shard size; they go with the process group.
_default_meshes: weakref.WeakKeyDictionary[object, dict[ShardSize, DeviceMesh]] = (
    weakref.WeakKeyDictionary()
)


class _Shared:
    """What the models of one torch.distributed session share, so that they use it in one order.

    Nothing here keeps it alive: process groups live until torch.distributed ends, streams and shared
    memory as long as a model that uses them.
    """

    def __init__(self) -> None:
        self.process_groups: weakref.WeakValueDictionary[str, dist.ProcessGroup] = (
            weakref.WeakValueDictionary()
        )
        self.shm: weakref.WeakValueDictionary[str, _C.ShmGroup] = weakref.WeakValueDictionary()
        self.streams: weakref.WeakValueDictionary[str, _C.RuntimeStreams] = (
            weakref.WeakValueDictionary()
        )
        self.flight_log: weakref.ref[_C.FlightLog] | None = None
        self.nccl: weakref.ref[_C.NcclWorld] | None = None


_shared_by_world: weakref.WeakKeyDictionary[object, _Shared] = weakref.WeakKeyDictionary()


def _shared() -> _Shared:
    return _shared_by_world.setdefault(dist.group.WORLD, _Shared())


def flight_log() -> _C.FlightLog:
    """Gives the log of this session's collectives; the caller keeps it alive."""
    shared = _shared()
    found = shared.flight_log() if shared.flight_log is not None else None
    if found is None:
        rank, world_size = dist.get_rank(), dist.get_world_size()
        store = distributed_c10d._get_default_store()
        # Ranks make their logs in the same order, so the number of the log is the same on all.
        number = store.add(f"torch_mics/flight_logs/{rank}", 1)
        found = _C.make_reporting_log(
            dist.PrefixStore(f"torch_mics/flight_log/{number}", store),
            rank=rank,
            world_size=world_size,
            interval=_ALARM_INTERVAL,
            patience=_PATIENCE,
        )
        shared.flight_log = weakref.ref(found)
    return found


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
        device_type: "cuda" or "cpu"; by default "cuda" where there is one.
        gpus_per_node: ranks per node, instead of what the hosts say.
        intra_backend: what carries collectives inside a node. "shm": shared memory, for tensors on the
            CPU; "c10d": torch's process groups, on CUDA between nodes too; "auto": shared memory where
            all members of the groups can share it, on CUDA NCCL. The environment variable
            MICS_INTRA_BACKEND comes first.

    Raises:
        ValueError: on every rank; the message lists the legal sizes, or the map of ranks to nodes.
        RuntimeError: torch.distributed is not initialised, or there is no GPU for "cuda".
    """
    check_device(device_type or _default_device_type())
    ensure_process_group()
    intra_backend = resolve_intra_backend(intra_backend)
    check_same(
        "the arguments of init_mesh",
        {"shard_size": shard_size, "device": device_type, "intra_backend": intra_backend},
    )
    nodes = _find_nodes(gpus_per_node)
    topology = _C.Topology(
        node_of_rank=nodes, partition_size=_resolve_shard_size(shard_size, nodes)
    )
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


@dataclasses.dataclass
class Communicators:
    """The communicators of one root module, by what they carry."""

    gather_rail: _C.Communicator | None
    gather_intra: _C.Communicator
    reduce_rail: _C.Communicator | None
    reduce_intra: _C.Communicator
    replicate: _C.Communicator | None

    def all(self) -> list[_C.Communicator]:
        """Lists those that exist."""
        fields = (getattr(self, field.name) for field in dataclasses.fields(self))
        return [communicator for communicator in fields if communicator is not None]


class Groups:
    """The groups of a mesh, and communicators over them.

    Attributes:
        mesh: 1-D (shard) or 2-D (replicate, shard), ranks in natural order.
        topology: the groups as the C++ core computes them.
    """

    def __init__(self, mesh: DeviceMesh, nodes: list[str], intra_backend: IntraBackend) -> None:
        self.mesh = mesh
        self.intra_backend = intra_backend
        self.topology = _C.Topology(node_of_rank=nodes, partition_size=mesh.size(mesh.ndim - 1))
        self.shm = ShmGroups(intra_backend, mesh.device_type, self.topology)
        # What carries a communicator, and why.
        self.backends: weakref.WeakKeyDictionary[_C.Communicator, str] = weakref.WeakKeyDictionary()

    # A mesh is copied and saved with the DTensors on it. A copy has the same groups; a mesh that is read
    # from a file finds its own when it is used.
    def __deepcopy__(self, memo: dict[int, object]) -> Groups:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return (_no_groups, ())

    def variant(self, hierarchical: HierarchicalGather) -> _C.Variant:
        """Chooses between flat and hierarchical; "auto" is hierarchical where a group spans nodes.

        Raises:
            ValueError: hierarchical was asked for on nodes where it cannot work.
        """
        topology = self.topology
        if hierarchical is True and topology.hierarchical_error:
            raise ValueError(topology.hierarchical_error)
        wanted = hierarchical is True or (
            hierarchical == "auto" and topology.spans_nodes and not topology.hierarchical_error
        )
        return _C.Variant.HIERARCHICAL if wanted else _C.Variant.FLAT

    def communicators(self, variant: _C.Variant) -> Communicators:
        """Makes the communicators of one root module. Collective when groups are new."""
        topology = self.topology
        intra, rail = topology.intra_groups(variant), topology.rail_groups(variant)
        made = self._make(
            {
                "gather/rail": rail,
                "gather/intra": intra,
                "reduce/rail": rail,
                "reduce/intra": intra,
                "replicate": topology.replication_groups(),
            }
        )
        return Communicators(
            gather_rail=made.get("gather/rail"),
            gather_intra=made["gather/intra"],
            reduce_rail=made.get("reduce/rail"),
            reduce_intra=made["reduce/intra"],
            replicate=made.get("replicate"),
        )

    def control(self) -> _C.Communicator | None:
        """Makes the communicator of all ranks, for small agreements; None in a world of one."""
        return self._make({"control": [list(range(self.topology.world_size))]}).get("control")

    def _make(self, roles: dict[str, list[list[int]]]) -> dict[str, _C.Communicator]:
        """Makes this rank's communicator of every role; groups of one only inside a node. Collective.

        Args:
            roles: by name of the communicator, all groups of the world; all of one size.
        """
        several = {role: groups for role, groups in roles.items() if len(groups[0]) > 1}
        world = self.nccl_world()
        if world is None:
            made, reasons = self.shm.make(several, _shared().shm)
            carried = dict.fromkeys(made, "shm")
        else:
            made = {role: self._over_nccl(world, role, groups) for role, groups in several.items()}
            carried = dict.fromkeys(made, f"nccl {version_text(_C.nccl_versions().library)}")
        for role, groups in roles.items():
            if role in several and role not in made:
                made[role] = self._over_process_group(role, groups)
                carried[role] = f"c10d ({reasons[role]})"
            elif role not in several and role.endswith("/intra"):
                made[role] = self._alone(role)
                carried[role] = "local (a group of one)"
        for role, communicator in made.items():
            self.backends[communicator] = carried[role]
            if communicator.size > 1:
                communicator.set_flight_log(flight_log())
        return made

    def _alone(self, name: str) -> _C.Communicator:
        rank = dist.get_rank()
        world = _C.LocalWorld(self.topology.world_size, timeout=operation_timeout())
        return world.make_communicator(
            name=name, world_ranks=[rank], nodes=[self.topology.node_of(rank)], rank=0
        )

    def nccl_world(self) -> _C.NcclWorld | None:
        """Gives NCCL's world of this rank, made when it is new, for the caller to keep; None without.

        Collective when it is new.
        """
        is_used = self.mesh.device_type == "cuda" and self.intra_backend != "c10d"
        if not is_used or self.topology.world_size == 1:
            return None
        shared = _shared()
        found = shared.nccl() if shared.nccl is not None else None
        if found is None:
            found = make_world(host())
            shared.nccl = weakref.ref(found)
        return found

    def _over_nccl(
        self, world: _C.NcclWorld, name: str, groups: list[list[int]]
    ) -> _C.Communicator:
        ranks = next(group for group in groups if dist.get_rank() in group)
        return world.make_communicator(
            name=name,
            world_ranks=ranks,
            nodes=[self.topology.node_of(rank) for rank in ranks],
            rank=ranks.index(dist.get_rank()),
            only_gathers=name == "gather/intra",
        )

    def _over_process_group(self, name: str, groups: list[list[int]]) -> _C.Communicator:
        ranks = next(group for group in groups if dist.get_rank() in group)
        return _C.make_c10d_communicator(
            self._process_group(name, ranks, groups),
            name=name,
            world_ranks=ranks,
            nodes=[self.topology.node_of(rank) for rank in ranks],
            rank=ranks.index(dist.get_rank()),
            timeout=operation_timeout(),
        )

    def _process_group(
        self, name: str, ranks: list[int], groups: list[list[int]]
    ) -> dist.ProcessGroup:
        """Gives the process group of `ranks` for `name`; every rank makes all of `groups` once.

        One per name: what has another name runs on another stream, and a process group is one order.
        """
        key = f"{name} {groups}"
        found = _shared().process_groups.get(key)
        if found is None:
            timeout = operation_timeout()
            made = {str(group): dist.new_group(group, timeout=timeout) for group in groups}
            found = _shared().process_groups[key] = made[str(ranks)]
        return found

    def streams(self, device: torch.device) -> _C.RuntimeStreams:
        """Gives the streams for shards on `device`: NCCL's, threads, or the caller's own one.

        Without NCCL on the caller's thread in a world of one, where there is nothing to wait for, on other
        devices than a CPU, and where MICS_STREAMS=inline.
        """
        kind = os.environ.get("MICS_STREAMS", "threads")
        if kind not in ("inline", "threads"):
            raise ValueError(f'MICS_STREAMS must be "inline" or "threads": got "{kind}".')
        world = self.nccl_world()
        if device.type != "cpu" or self.topology.world_size == 1:
            kind = "inline" if world is None else "nccl"
        found = _shared().streams.get(kind)
        if found is None:
            on_threads = kind == "threads"
            found = world.make_streams() if world else _C.RuntimeStreams(on_threads=on_threads)
            _shared().streams[kind] = found
        return found


def _warn_of_irregular_nodes(topology: _C.Topology) -> None:
    """Two hops need nodes alike; without them everything that a group moves may cross nodes."""
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


def _no_groups() -> None:
    """What Groups are in a file."""


def _attach_groups(mesh: DeviceMesh, nodes: list[str], intra_backend: IntraBackend) -> Groups:
    groups = Groups(mesh, nodes, intra_backend)
    _warn_of_irregular_nodes(groups.topology)
    # torch makes groups of a mesh with time-outs of their own, whatever was asked for.
    for group in {id(group): group for group in mesh.get_all_groups()}.values():
        distributed_c10d._set_pg_timeout(operation_timeout(), group)
    # Kept on the mesh, so that it lives exactly as long and every unit on the mesh finds it.
    mesh._mics_groups = groups  # type: ignore[attr-defined]
    return groups


def groups_of(mesh: DeviceMesh) -> Groups:
    """Gives the groups of a mesh, made when the mesh is new here. Then collective.

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
    intra_backend = resolve_intra_backend("auto")
    check_same("MICS_INTRA_BACKEND", intra_backend)
    return _attach_groups(mesh, exchange("nodes", node()), intra_backend)
