"""Backends: what carries the collectives of groups, and with which properties. Here: local and c10d.

A role is the purpose of a communicator ("gather/intra"); every rank of the world is in a group for it.
"""

from __future__ import annotations

import abc
import dataclasses
import weakref
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from torch_mics import _C
from torch_mics._exchange import operation_timeout

RankGroups = list[list[int]]  # all groups of a role, all of one size
Roles = dict[str, RankGroups]
Made = dict[str, _C.Communicator]  # by role
Reasons = dict[str, str]  # by role


@dataclasses.dataclass(frozen=True)
class Properties:
    """What holds for the collectives of a backend; docs/backends.md has them as a table.

    Communicator.sums_in_wire_dtype says of each communicator whether `precision` is that of the wire.
    """

    sum_order: str = "rank order"
    precision: str = "fp32, rounded once"  # of sums
    groups_launches: bool = True  # the tensors of one call are one launch, without a copy
    registers_memory: bool = False  # it can register the runtime's memory with the network


class Backend(abc.ABC):
    """Makes communicators. A session has one object of each backend, for all its models."""

    name: ClassVar[str]
    properties: ClassVar[Properties] = Properties()

    @abc.abstractmethod
    def make(self, roles: Roles, topology: _C.Topology) -> tuple[Made, Reasons]:
        """Makes this rank's communicator of every role. Collective.

        Returns:
            The communicators, and the reason for each role that this backend cannot carry. Both have the
            same roles on every rank.
        """

    def describe(self, why: str) -> str:
        """Names what carries a communicator; `why` says what ruled out the backends before this one."""
        return f"{self.name} ({why})"

    def close(self) -> None:  # noqa: B027
        """Frees at the end of the process what outlives the last communicator; most backends: nothing."""


def membership(role: str, groups: RankGroups, topology: _C.Topology) -> dict[str, Any]:
    """Gives this rank's group of a role, as arguments that every maker of communicators takes."""
    mine = dist.get_rank()
    ranks = next(group for group in groups if mine in group)
    nodes = [topology.node_of(rank) for rank in ranks]
    return {"name": role, "world_ranks": ranks, "nodes": nodes, "rank": ranks.index(mine)}


class Local(Backend):
    """Ranks as threads of one process; here a group of one, which moves nothing."""

    name = "local"

    def make(self, roles: Roles, topology: _C.Topology) -> tuple[Made, Reasons]:
        made = {}
        for role, groups in roles.items():
            world = _C.LocalWorld(topology.world_size, timeout=operation_timeout())
            made[role] = world.make_communicator(**membership(role, groups, topology))
        return made, {}


def _introduce(group: dist.ProcessGroup) -> None:
    """Lets torch's recorder of collectives see a new group before our threads use it.

    torch 2.11 adds a group to that recorder at its first collective, without a lock: the first ones of
    two groups, on the threads of two streams, ended the process now and then.
    """
    if any(device.type == "cpu" for device in group._device_types):
        dist.all_reduce(torch.zeros(1, device="cpu"), group=group)


class C10d(Backend):
    """torch's process groups, which live until torch.distributed ends."""

    name = "c10d"
    properties = Properties(groups_launches=False)

    def __init__(self) -> None:
        self._groups: weakref.WeakValueDictionary[str, dist.ProcessGroup] = (
            weakref.WeakValueDictionary()
        )

    def make(self, roles: Roles, topology: _C.Topology) -> tuple[Made, Reasons]:
        timeout = operation_timeout()
        made = {}
        for role, groups in roles.items():
            member = membership(role, groups, topology)
            # One per role: roles run on different streams, but a process group runs in one order.
            key = f"{role} {groups}"
            found = self._groups.get(key)
            if found is None:
                # Every rank makes all groups of a role.
                new = {str(group): dist.new_group(group, timeout=timeout) for group in groups}
                found = self._groups[key] = new[str(member["world_ranks"])]
                _introduce(found)
            made[role] = _C.make_c10d_communicator(found, **member, timeout=timeout)
        return made, {}
