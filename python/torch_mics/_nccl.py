"""The nccl backend: whether it can be used, the world that makes its communicators, and its closing."""

from __future__ import annotations

import atexit
import datetime
import logging
import os
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from torch_mics import _C
from torch_mics._backend import Backend, Made, Properties, Reasons, Roles, membership
from torch_mics._exchange import check_same, operation_timeout
from torch_mics._hosts import device_of_rank, host

# How long the end of a world waits for collectives in flight.
_PATIENCE = datetime.timedelta(seconds=5)
# The first NCCL that knows NCCL_LAUNCH_ORDER_IMPLICIT.
_FIRST_LAUNCH_ORDER = 22600

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
    "MICS_NCCL_BLOCKING": ("is_blocking", "1", {"0": False, "1": True}.__getitem__, "0 or 1"),
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


def order_launches(version: int) -> None:
    """Lets NCCL keep the order of launches of several communicators on the device, unless the user decides.

    NCCL reads the variable once, at the first launch of the process.
    """
    if version >= _FIRST_LAUNCH_ORDER:
        os.environ.setdefault("NCCL_LAUNCH_ORDER_IMPLICIT", "1")


def nbytes_outside_torch(world: _C.NcclWorld, device: torch.device) -> int:
    """Gives the memory in use on `device` that torch does not count, nor the runtime's plan.

    Communicators of NCCL, the CUDA context, and what other processes use.
    """
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device) - world.allocated_nbytes


_DIRECTIONS = {"reduce": _C.NcclDirection.REDUCE, "replicate": _C.NcclDirection.REPLICATE}


def direction_of(role: str) -> _C.NcclDirection:
    """Gives the direction of a role; "control" sums on a stream of gathers, and counts with them."""
    return _DIRECTIONS.get(role.partition("/")[0], _C.NcclDirection.GATHER)


class Nccl(Backend):
    """NCCL for GPUs. All communicators of a rank come from one world.

    The world lives until every rank makes that of a later session, or until the process ends, whenever
    models are collected: communicators end at points that all ranks share.
    """

    name = "nccl"
    properties = Properties(
        "NCCL's, by algorithm", "that of the dtype sent, at each addition", registers_memory=True
    )
    _living: ClassVar[list[Nccl]] = []  # that have a world

    def __init__(self) -> None:
        self._world: _C.NcclWorld | None = None

    def world(self) -> _C.NcclWorld:
        """Gives this rank's world on its device. Collective when new.

        Raises:
            ValueError: on every rank: ranks share a GPU, or differ in the version of NCCL or in its
                options.
        """
        if self._world is not None:
            return self._world
        options = options_from_environment()
        for earlier in list(self._living):  # of sessions that have ended
            earlier.close()
        order_launches(_C.nccl_versions().library)
        rank = dist.get_rank()
        store = distributed_c10d._get_default_store()
        # Ranks make their worlds in the same order, so the number is the same on all.
        number = store.add(f"torch_mics/nccl_worlds/{rank}", 1)
        world = _C.NcclWorld(
            dist.PrefixStore(f"torch_mics/nccl/{number}", store),
            rank=rank,
            world_size=dist.get_world_size(),
            device=device_of_rank("cuda").index,
            host=os.environ.get("NCCL_HOSTID") or host(),  # not a simulated node
            timeout=operation_timeout(),
            **options,
        )
        self._world = world
        self._living.append(self)
        # The watchdog's thread must not outlive the libraries that it calls.
        atexit.register(self.close)
        return world

    def make(self, roles: Roles, topology: _C.Topology) -> tuple[Made, Reasons]:
        world = self.world()
        made = {
            role: world.make_communicator(
                **membership(role, groups, topology),
                direction=direction_of(role),
                only_gathers=role == "gather/intra",
            )
            for role, groups in roles.items()
        }
        return made, {}

    def describe(self, why: str) -> str:
        return f"{self.name} {version_text(_C.nccl_versions().library)}"

    def close(self) -> None:
        """Ends the communicators of the world, which cannot be used again. Nothing when there is none."""
        world, self._world = self._world, None
        if world is None:
            return
        atexit.unregister(self.close)
        if self in self._living:
            self._living.remove(self)
        try:
            world.close(_PATIENCE)
        except RuntimeError as error:
            _log.warning("the communicators were aborted at the end of the process: %s", error)
