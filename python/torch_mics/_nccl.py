"""The nccl backend: whether it can be used, the world that makes its communicators, and its closing."""

from __future__ import annotations

import atexit
import datetime
import logging
import os
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from torch_mics import _C
from torch_mics._backend import Backend, Made, Properties, Reasons, Roles, membership
from torch_mics._exchange import check_same, operation_timeout
from torch_mics._hosts import host

# How long the end of the process waits for collectives in flight.
_PATIENCE = datetime.timedelta(seconds=5)

_log = logging.getLogger("torch_mics")


def check_device(device_type: str) -> None:
    """Checks that "cuda" can be used.

    Raises:
        RuntimeError: there is no GPU, or a library is missing; the message says which.
    """
    if device_type != "cuda":
        return
    problem = _C.nccl_versions().problem
    if problem:
        raise RuntimeError(
            f'device_type="cuda" needs a GPU and NCCL: {problem} Use device_type="cpu", or a torch '
            "with CUDA on a host with a GPU."
        )


def version_text(version: int) -> str:
    """Writes NCCL's version code as 2.28.9."""
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}"


_REGISTRATIONS = {
    "none": _C.NcclRegistration.NONE,
    "buffers": _C.NcclRegistration.BUFFERS,
    "windows": _C.NcclRegistration.WINDOWS,
}


def _count(text: str) -> int:
    if int(text) < 0:
        raise ValueError
    return int(text)


# By name of the variable: the argument of NcclWorld, its default, its parser, and the rule for messages.
_OPTIONS: dict[str, tuple[str, str, Callable[[str], Any], str]] = {
    "MICS_NCCL_REGISTRATION": (
        "registration",
        "none",
        _REGISTRATIONS.__getitem__,
        "none, buffers or windows",
    ),
    "MICS_NCCL_COPY_ENGINE": ("copy_engine", "0", {"0": False, "1": True}.__getitem__, "0 or 1"),
    "MICS_NCCL_MAX_IN_FLIGHT": ("max_in_flight", "4", _count, "a number, 0 for no limit"),
    "MICS_NCCL_MAX_CTAS": ("max_ctas", "0", _count, "a number, 0 for NCCL's choice"),
}


def options_from_environment() -> dict[str, Any]:
    """Reads options of NCCL from the environment, as arguments of NcclWorld. Collective.

    Raises:
        ValueError: on every rank: the variables differ between ranks, or one has no legal value.
    """
    texts = {variable: os.environ.get(variable) or None for variable in _OPTIONS}
    check_same("the environment", texts)
    options = {}
    for variable, (argument, default, parse, rule) in _OPTIONS.items():
        text = texts[variable] or default
        try:
            options[argument] = parse(text)
        except (KeyError, ValueError):
            raise ValueError(f"{variable} must be {rule}: got {text!r}.") from None
    return options


class Nccl(Backend):
    """NCCL for GPUs. All communicators of a rank come from one world, which its users keep alive."""

    name = "nccl"
    properties = Properties("NCCL's, by algorithm", "NCCL's", registers_memory=True)

    def __init__(self) -> None:
        self._world: weakref.ref[_C.NcclWorld] | None = None

    def world(self) -> _C.NcclWorld:
        """Gives this rank's world on torch's current device, for the caller to keep. Collective when new.

        Raises:
            ValueError: on every rank: ranks share a GPU, or differ in the version of NCCL or in its
                options.
        """
        found = self._world() if self._world is not None else None
        if found is not None:
            return found
        options = options_from_environment()
        rank = dist.get_rank()
        store = distributed_c10d._get_default_store()
        # Ranks make their worlds in the same order, so the number is the same on all.
        number = store.add(f"torch_mics/nccl_worlds/{rank}", 1)
        world = _C.NcclWorld(
            dist.PrefixStore(f"torch_mics/nccl/{number}", store),
            rank=rank,
            world_size=dist.get_world_size(),
            device=torch.cuda.current_device(),
            host=os.environ.get("NCCL_HOSTID") or host(),  # not a simulated node
            timeout=operation_timeout(),
            **options,
        )
        self._world = weakref.ref(world)
        # The watchdog's thread must not outlive the libraries that it calls.
        atexit.register(self.close)
        return world

    def make(self, roles: Roles, topology: _C.Topology) -> tuple[Made, Reasons]:
        world = self.world()
        made = {
            role: world.make_communicator(
                **membership(role, groups, topology), only_gathers=role == "gather/intra"
            )
            for role, groups in roles.items()
        }
        return made, {}

    def describe(self, why: str) -> str:
        return f"{self.name} {version_text(_C.nccl_versions().library)}"

    def close(self) -> None:
        world = self._world() if self._world is not None else None
        if world is None:
            return
        try:
            world.close(_PATIENCE)
        except RuntimeError as error:
            _log.warning("the communicators were aborted at the end of the process: %s", error)
