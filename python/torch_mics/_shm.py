"""The shm backend: the rendezvous of ranks of one host in shared memory.

All groups of a role use the same backend, so that every rank knows without asking whether the others need
a process group.
"""

from __future__ import annotations

import json
import logging
import weakref

import torch.distributed as dist

from torch_mics import _C
from torch_mics._backend import Backend, Made, RankGroups, Reasons, Roles, membership
from torch_mics._exchange import exchange, operation_timeout

_log = logging.getLogger("torch_mics")

_Opened = dict[str, _C.ShmGroup]  # by role


class Shm(Backend):
    """One segment of shared memory per group, open as long as a model uses it."""

    name = "shm"

    def __init__(self) -> None:
        # By role and ranks: what is open on this rank.
        self._opened: weakref.WeakValueDictionary[str, _C.ShmGroup] = weakref.WeakValueDictionary()
        self._hosts: list[str] = []

    def describe(self, why: str) -> str:
        return self.name

    def make(self, roles: Roles, topology: _C.Topology) -> tuple[Made, Reasons]:
        """Every member has attached when this returns. Groups that are open on all ranks are used again."""
        reasons = {role: self._why_not(groups) for role, groups in roles.items()}
        usable = {role: groups for role, groups in roles.items() if reasons[role] is None}
        made, failures = self._open(usable, topology) if usable else ({}, {})
        left_out = {role: why for role, why in (reasons | failures).items() if why is not None}
        return {role: group.make_communicator() for role, group in made.items()}, left_out

    def _why_not(self, groups: RankGroups) -> str | None:
        """Why these groups cannot use shared memory; the same on every rank."""
        if dist.get_backend() == "fake":
            return "the process group is a fake"
        if not self._hosts:
            self._hosts = exchange("hosts of shared memory", _C.shm_host_identity())
        for group in groups:
            if len({self._hosts[rank] for rank in group}) > 1:
                return f"world ranks {group} are on one node but not on one host or PID namespace"
        return None

    def _open(self, roles: Roles, topology: _C.Topology) -> tuple[_Opened, Reasons]:
        """Gives this rank's group of each role, opened before or now, and why others are missing."""
        keys = {role: f"{role} {groups}" for role, groups in roles.items()}
        found = {role: self._opened.get(key) for role, key in keys.items()}
        usable = {
            role: group
            for role, group in found.items()
            if group is not None and not group.has_failed
        }
        # A rank may have freed a model that others still have, or have missed a failure: only what all
        # ranks can use is used again.
        answers = exchange("open groups", json.dumps(list(usable)))
        common = set.intersection(*(set(json.loads(answer)) for answer in answers))
        new, failures = self._attach(
            {role: groups for role, groups in roles.items() if role not in common}, topology
        )
        self._opened.update({keys[role]: group for role, group in new.items()})
        return {role: group for role, group in usable.items() if role in common} | new, failures

    def _attach(self, roles: Roles, topology: _C.Topology) -> tuple[_Opened, Reasons]:
        if not roles:
            return {}, {}
        members = {role: membership(role, groups, topology) for role, groups in roles.items()}
        made: _Opened = {}
        errors: dict[str, str] = {}
        names: dict[str, str] = {}

        def attach(role: str, segment: str, *, creates: bool) -> None:
            timeout = operation_timeout()
            try:
                made[role] = _C.ShmGroup(segment, creates=creates, timeout=timeout, **members[role])
            except Exception as error:  # whatever it is, the other ranks must hear of it
                errors[role] = str(error) or type(error).__name__

        for role, member in members.items():
            if member["rank"] == 0:
                _C.remove_stale_shm_segments()
                names[role] = _C.make_shm_segment_name()
                attach(role, names[role], creates=True)
        found = [json.loads(text) for text in exchange("segments", json.dumps([names, errors]))]
        for role, member in members.items():
            created, failed = found[member["world_ranks"][0]]
            if member["rank"] != 0 and role not in failed:
                attach(role, created[role], creates=False)
        # Everybody has attached, or everybody knows that somebody has not.
        failures: dict[str, str] = {}
        for other, text in enumerate(exchange("attached", json.dumps(errors))):
            for role, reason in json.loads(text).items():
                made.pop(role, None)
                if role not in failures:
                    failures[role] = f"world_rank {other} could not attach: {reason}"
                    if dist.get_rank() == 0:
                        _log.warning("%s uses c10d: %s", role, failures[role])
        return made, failures
