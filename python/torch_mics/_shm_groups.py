"""Which groups talk through shared memory, and how their members come together.

A role is what a communicator carries ("gather/intra"); every rank of the world has a group for it. All
groups of a role use the same backend, so that every rank knows without asking whether the others need
a process group.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import logging
import os
from typing import Literal, cast, get_args

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from torch_mics import _C
from torch_mics._exchange import exchange

IntraBackend = Literal["auto", "shm", "c10d"]
_VARIABLE = "MICS_INTRA_BACKEND"

_log = logging.getLogger("torch_mics")

RankGroups = list[list[int]]


def resolve_intra_backend(asked: str) -> IntraBackend:
    """Gives MICS_INTRA_BACKEND where it is set, else what was asked for.

    Raises:
        ValueError: it is none of the three.
    """
    chosen = os.environ.get(_VARIABLE) or asked
    if chosen not in get_args(IntraBackend):
        source = _VARIABLE if os.environ.get(_VARIABLE) else "the argument"
        raise ValueError(
            f'intra_backend must be "auto", "shm" or "c10d": got {chosen!r} from {source}.'
        )
    return cast(IntraBackend, chosen)


@dataclasses.dataclass
class ShmGroups:
    """Makes the communicators of one mesh that run over shared memory.

    Attributes:
        backend: what the user wants.
        device_type: of the mesh.
        topology: of the mesh.
        reasons: by role, why it is not on shared memory; filled by make().
    """

    backend: IntraBackend
    device_type: str
    topology: _C.Topology
    reasons: dict[str, str] = dataclasses.field(default_factory=dict)
    _hosts: list[str] = dataclasses.field(default_factory=list)

    def make(self, roles: dict[str, RankGroups]) -> dict[str, _C.Communicator]:
        """Makes this rank's communicator of every role that can use shared memory. Collective.

        Every member has attached when it returns. A role whose members cannot all attach is left out on
        every rank, with the reason.

        Args:
            roles: by role, all groups of the world.

        Raises:
            ValueError: shared memory was asked for and an intra-node group cannot use it. On every rank.
        """
        usable = {}
        for role, groups in roles.items():
            reason = self._why_not(groups)
            if reason is None:
                usable[role] = groups
            else:
                self.reasons[role] = reason
        made: dict[str, _C.Communicator] = {}
        if usable:
            made = self._attach(usable)
        for role in roles:
            if role in self.reasons and self.backend == "shm" and role.endswith("/intra"):
                raise ValueError(
                    'intra_backend="shm" needs groups that can share memory: got none for '
                    f'{role}, because {self.reasons[role]}. Use intra_backend="auto".'
                )
        return made

    def describe(self, role: str) -> str:
        """Says what carries a role, and why."""
        return f"c10d ({self.reasons[role]})" if role in self.reasons else "shm"

    def _why_not(self, groups: RankGroups) -> str | None:
        """Why these groups cannot use shared memory; the same on every rank."""
        if self.backend == "c10d":
            return 'intra_backend is "c10d"'
        if self.device_type != "cpu":
            return f"tensors are on {self.device_type}"
        if dist.get_backend() == "fake":
            return "the process group is a fake"
        if any(len({self.topology.node_of(rank) for rank in group}) > 1 for group in groups):
            return "a group has members on several nodes"
        if not self._hosts:
            self._hosts = exchange("hosts of shared memory", _C.shm_host_identity())
        for group in groups:
            if len({self._hosts[rank] for rank in group}) > 1:
                return f"world ranks {group} are on one node but not on one host or PID namespace"
        return None

    def _attach(self, roles: dict[str, RankGroups]) -> dict[str, _C.Communicator]:
        rank = dist.get_rank()
        mine = {
            role: next(group for group in groups if rank in group) for role, groups in roles.items()
        }
        made: dict[str, _C.Communicator] = {}
        errors: dict[str, str] = {}
        names: dict[str, str] = {}
        for role, group in mine.items():
            if group[0] == rank:
                _C.remove_stale_shm_segments()
                names[role] = _C.make_shm_segment_name()
                self._make_one(role, group, names[role], made, errors, creates=True)
        found = [json.loads(text) for text in exchange("segments", json.dumps([names, errors]))]
        for role, group in mine.items():
            created, failed = found[group[0]]
            if group[0] != rank and role not in failed:
                self._make_one(role, group, created[role], made, errors, creates=False)
        # Everybody has attached, or everybody knows that somebody has not.
        outcomes = [json.loads(text) for text in exchange("attached", json.dumps(errors))]
        for other, failures in enumerate(outcomes):
            for role, reason in failures.items():
                made.pop(role, None)
                if role not in self.reasons:
                    self.reasons[role] = f"world_rank {other} could not attach: {reason}"
                    if rank == 0:
                        _log.warning("%s uses c10d: %s", role, self.reasons[role])
        return made

    def _make_one(
        self,
        role: str,
        group: list[int],
        segment: str,
        made: dict[str, _C.Communicator],
        errors: dict[str, str],
        *,
        creates: bool,
    ) -> None:
        try:
            made[role] = _C.make_shm_communicator(
                segment,
                creates=creates,
                name=role,
                world_ranks=group,
                nodes=[self.topology.node_of(member) for member in group],
                rank=group.index(dist.get_rank()),
                timeout=_timeout(),
            )
        except (ValueError, RuntimeError) as error:
            errors[role] = str(error)


def _timeout() -> datetime.timedelta:
    """That of the process group."""
    group = dist.group.WORLD
    assert group is not None
    options = group._get_backend(torch.device("cpu")).options
    return getattr(options, "_timeout", c10d.default_pg_timeout)
