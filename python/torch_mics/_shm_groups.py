"""Which groups talk through shared memory, and how their members come together.

A role is what a communicator carries ("gather/intra"); every rank of the world has a group for it. All
groups of a role use the same backend, so that every rank knows without asking whether the others need
a process group.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import MutableMapping
from typing import Literal, cast, get_args

import torch.distributed as dist

from torch_mics import _C
from torch_mics._exchange import exchange, operation_timeout

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
    """

    backend: IntraBackend
    device_type: str
    topology: _C.Topology
    _hosts: list[str] = dataclasses.field(default_factory=list)

    def make(
        self, roles: dict[str, RankGroups], opened: MutableMapping[str, _C.ShmGroup]
    ) -> tuple[dict[str, _C.Communicator], dict[str, str]]:
        """Makes this rank's communicator of every role that can use shared memory. Collective.

        Every member has attached when it returns. A role whose members cannot all attach is left out on
        every rank.

        Args:
            roles: by role, all groups of the world.
            opened: the groups that are open on this rank, by role and ranks. What all ranks have is used
                again, what is made is added.

        Returns:
            Communicators by role, and for the roles that are left out the reason; both the same on
            every rank.

        Raises:
            ValueError: shared memory was asked for and an intra-node group cannot use it. On every rank.
        """
        reasons = {role: self._why_not(groups) for role, groups in roles.items()}
        usable = {role: groups for role, groups in roles.items() if reasons[role] is None}
        made, failures = self._open(usable, opened) if usable else ({}, {})
        left_out = {role: why for role, why in (reasons | failures).items() if why is not None}
        for role, why in left_out.items():
            if self.backend == "shm" and role.endswith("/intra"):
                raise ValueError(
                    'intra_backend="shm" needs groups that can share memory: got none for '
                    f'{role}, because {why}. Use intra_backend="auto".'
                )
        return {role: group.make_communicator() for role, group in made.items()}, left_out

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

    def _open(
        self, roles: dict[str, RankGroups], opened: MutableMapping[str, _C.ShmGroup]
    ) -> tuple[dict[str, _C.ShmGroup], dict[str, str]]:
        """Gives this rank's group of each role, opened before or now, and why others are missing."""
        keys = {role: f"{role} {groups}" for role, groups in roles.items()}
        found = {role: opened.get(key) for role, key in keys.items()}
        usable = {
            role: group
            for role, group in found.items()
            if group is not None and not group.has_failed
        }
        # A rank may have collected a model that others still have, or have missed a failure: only what
        # all ranks can use is used again.
        answers = exchange("open groups", json.dumps(list(usable)))
        common = set.intersection(*(set(json.loads(answer)) for answer in answers))
        new, failures = self._attach(
            {role: groups for role, groups in roles.items() if role not in common}
        )
        opened.update({keys[role]: group for role, group in new.items()})
        return {role: group for role, group in usable.items() if role in common} | new, failures

    def _attach(
        self, roles: dict[str, RankGroups]
    ) -> tuple[dict[str, _C.ShmGroup], dict[str, str]]:
        if not roles:
            return {}, {}
        rank = dist.get_rank()
        mine = {
            role: next(group for group in groups if rank in group) for role, groups in roles.items()
        }
        made: dict[str, _C.ShmGroup] = {}
        errors: dict[str, str] = {}
        names: dict[str, str] = {}
        for role, group in mine.items():
            if group[0] == rank:
                _C.remove_stale_shm_segments()
                names[role] = _C.make_shm_segment_name()
                self._attach_one(role, group, names[role], made, errors, creates=True)
        found = [json.loads(text) for text in exchange("segments", json.dumps([names, errors]))]
        for role, group in mine.items():
            created, failed = found[group[0]]
            if group[0] != rank and role not in failed:
                self._attach_one(role, group, created[role], made, errors, creates=False)
        # Everybody has attached, or everybody knows that somebody has not.
        failures: dict[str, str] = {}
        for other, text in enumerate(exchange("attached", json.dumps(errors))):
            for role, reason in json.loads(text).items():
                made.pop(role, None)
                if role not in failures:
                    failures[role] = f"world_rank {other} could not attach: {reason}"
                    if rank == 0:
                        _log.warning("%s uses c10d: %s", role, failures[role])
        return made, failures

    def _attach_one(
        self,
        role: str,
        group: list[int],
        segment: str,
        made: dict[str, _C.ShmGroup],
        errors: dict[str, str],
        *,
        creates: bool,
    ) -> None:
        try:
            made[role] = _C.ShmGroup(
                segment,
                creates=creates,
                name=role,
                world_ranks=group,
                nodes=[self.topology.node_of(member) for member in group],
                rank=group.index(dist.get_rank()),
                timeout=operation_timeout(),
            )
        except Exception as error:  # whatever it is, the other ranks must hear of it
            errors[role] = str(error) or type(error).__name__
