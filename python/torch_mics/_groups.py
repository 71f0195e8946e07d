"""The groups of a mesh, their communicators, and the table of backends that carry them."""

from __future__ import annotations

import dataclasses
import os
import weakref
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch.distributed.device_mesh import DeviceMesh

from torch_mics import _C, _race_check
from torch_mics._backend import Backend, C10d, Local, Made, RankGroups, Roles
from torch_mics._hosts import device_of_rank
from torch_mics._nccl import Nccl
from torch_mics._session import session
from torch_mics._shm import Shm

_COUNTERS = (
    "calls",
    "sent_intra_nbytes",
    "sent_inter_nbytes",
    "received_intra_nbytes",
    "received_inter_nbytes",
)
HierarchicalGather = bool | Literal["auto"]
IntraBackend = Literal["auto", "shm", "c10d"]
Reach = Literal["rank", "node", "nodes"]  # how far apart the members of a group may be

# By device of the tensors and reach of the groups: the first backend that can carry a role does. On other
# devices that is c10d; if the user asks for c10d, it carries all groups of more than one rank.
BACKENDS: dict[tuple[str, Reach], tuple[type[Backend], ...]] = {
    ("cpu", "rank"): (Local,),
    ("cpu", "node"): (Shm, C10d),
    ("cpu", "nodes"): (C10d,),
    ("cuda", "rank"): (Local,),
    ("cuda", "node"): (Nccl,),
    ("cuda", "nodes"): (Nccl,),
}


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


def traffic_of(communicators: Iterable[_C.Communicator]) -> dict[str, dict[str, int]]:
    """Sums this rank's counters of calls and bytes, by name of the communicator."""
    totals: dict[str, dict[str, int]] = {}
    for communicator in communicators:
        counters = totals.setdefault(communicator.name, dict.fromkeys(_COUNTERS, 0))
        for counter in _COUNTERS:
            counters[counter] += getattr(communicator.traffic, counter)
    return totals


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
        # What carries a communicator, and why.
        self.backends: weakref.WeakKeyDictionary[_C.Communicator, str] = weakref.WeakKeyDictionary()

    @property
    def device(self) -> torch.device:
        """The device of this rank's shards."""
        return device_of_rank(self.mesh.device_type)

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
        roles = {
            "gather/rail": rail,
            "gather/intra": intra,
            "reduce/rail": rail,
            "reduce/intra": intra,
            "replicate": topology.replication_groups(),
        }
        made = self._make(roles)
        fields: dict[str, Any] = {role.replace("/", "_"): made.get(role) for role in roles}
        return Communicators(**fields)

    def control(self) -> _C.Communicator | None:
        """Makes the communicator of all ranks, for small agreements; None in a world of one."""
        return self._make({"control": [list(range(self.topology.world_size))]}).get("control")

    def _make(self, roles: Roles) -> Made:
        """Makes this rank's communicator of every role; for groups of one only if it is intra. Collective.

        Raises:
            ValueError: on every rank: shared memory was asked for, and an intra-node group cannot use it.
        """
        reach = {role: self._reach(groups) for role, groups in roles.items()}
        waiting = {r: g for r, g in roles.items() if reach[r] != "rank" or r.endswith("/intra")}
        reasons = {role: self._why_c10d(reach[role]) for role in waiting}
        made: Made = {}
        for backend in session().backends:
            mine = {r: g for r, g in waiting.items() if type(backend) in self._choices(reach[r])}
            for role in mine if isinstance(backend, C10d) and self.intra_backend == "shm" else ():
                if role.endswith("/intra"):
                    raise ValueError(
                        'intra_backend="shm" needs groups that can share memory: got none for '
                        f'{role}, because {reasons[role]}. Use intra_backend="auto".'
                    )
            new, left_out = backend.make(mine, self.topology) if mine else ({}, {})
            reasons |= left_out
            for role, communicator in new.items():
                del waiting[role]
                self.backends[communicator] = backend.describe(reasons[role])
                if communicator.size > 1:
                    communicator.set_flight_log(session().flight_log())
            made |= new
        return made

    def _reach(self, groups: RankGroups) -> Reach:
        if len(groups[0]) == 1:
            return "rank"
        nodes = ({self.topology.node_of(rank) for rank in group} for group in groups)
        return "nodes" if any(len(those) > 1 for those in nodes) else "node"

    def _choices(self, reach: Reach) -> tuple[type[Backend], ...]:
        if self.intra_backend == "c10d" and reach != "rank":
            return (C10d,)
        return BACKENDS.get((self.mesh.device_type, reach), (C10d,))

    def _why_c10d(self, reach: Reach) -> str:
        """Says what rules out the other backends before any of them is tried."""
        if reach == "rank":
            return "a group of one"
        if self.intra_backend == "c10d":
            return 'intra_backend is "c10d"'
        if self.mesh.device_type != "cpu":
            return f"tensors are on {self.mesh.device_type}"
        return "a group has members on several nodes"

    def nccl_world(self) -> _C.NcclWorld | None:
        """Gives this rank's NCCL world, which the caller must keep, or None. Collective when it is new."""
        is_used = Nccl in self._choices("nodes") and self.topology.world_size > 1
        return session().nccl.world() if is_used else None

    def streams(self, device: torch.device) -> _C.RuntimeStreams:
        """Gives the streams for shards on `device`: NCCL's, threads, or the caller's own thread.

        Without NCCL, work runs on the caller's thread in a world of one, where there is nothing to wait
        for, on other devices than a CPU, and where MICS_STREAMS=inline.
        """
        kind = os.environ.get("MICS_STREAMS", "threads")
        if kind not in ("inline", "threads"):
            raise ValueError(f'MICS_STREAMS must be "inline" or "threads": got "{kind}".')
        world = self.nccl_world()
        if device.type != "cpu" or self.topology.world_size == 1:
            kind = "inline" if world is None else "nccl"
        streams = session().streams
        found = streams.get(kind)
        if found is None:
            on_threads = kind == "threads"
            found = world.make_streams() if world else _C.RuntimeStreams(on_threads=on_threads)
            detector = _race_check.of_process()
            if detector is not None:
                detector.watch(found)
            streams[kind] = found
        return found


def _no_groups() -> None:
    """What unpickling gives in place of Groups."""
