"""NCCL on this rank: whether it can be used, the world that makes its communicators, and its end."""

from __future__ import annotations

import atexit
import datetime
import logging
import os
import weakref

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from torch_mics import _C
from torch_mics._exchange import operation_timeout

# What is still under way when the process ends is waited for this long.
_PATIENCE = datetime.timedelta(seconds=5)

_log = logging.getLogger("torch_mics")


def check_device(device_type: str) -> None:
    """Refuses "cuda" where it cannot be used.

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


def make_world(host: str) -> _C.NcclWorld:
    """Makes this rank's world on torch's current device. Collective.

    Args:
        host: names the host, not a simulated node. NCCL_HOSTID, which names it for NCCL, comes first.

    Raises:
        ValueError: on every rank: ranks share a GPU, or run other versions of NCCL.
    """
    rank = dist.get_rank()
    store = distributed_c10d._get_default_store()
    # Ranks make their worlds in the same order, so the number is the same on all.
    number = store.add(f"torch_mics/nccl_worlds/{rank}", 1)
    world = _C.NcclWorld(
        dist.PrefixStore(f"torch_mics/nccl/{number}", store),
        rank=rank,
        world_size=dist.get_world_size(),
        device=torch.cuda.current_device(),
        host=os.environ.get("NCCL_HOSTID") or host,
        timeout=operation_timeout(),
    )
    # The watchdog's thread must not outlive the libraries that it calls.
    atexit.register(_close, weakref.ref(world))
    return world


def _close(reference: weakref.ref[_C.NcclWorld]) -> None:
    world = reference()
    if world is None:
        return
    try:
        world.close(_PATIENCE)
    except RuntimeError as error:
        _log.warning("the communicators were aborted at the end of the process: %s", error)
