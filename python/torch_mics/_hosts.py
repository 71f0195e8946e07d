"""Where this rank runs: its host, its node, and its device."""

from __future__ import annotations

import os
import pathlib
import socket

import torch
import torch.distributed as dist


def host() -> str:
    """Identifies the host by its name and boot id."""
    boot_id = pathlib.Path("/proc/sys/kernel/random/boot_id")
    boot = boot_id.read_text().strip() if boot_id.exists() else "unknown boot"
    return f"{socket.gethostname()}/{boot}"


def node() -> str:
    """Names this rank's node: MICS_NODE_ID if set, else the host."""
    return os.environ.get("MICS_NODE_ID") or host()


def device_of_rank(device_type: str) -> torch.device:
    """Gives this rank's device: `device_id` of init_process_group(), if it names one, or the current."""
    if device_type in ("cpu", "meta"):
        return torch.device(device_type)
    bound = _bound_device(device_type)
    if bound is not None:
        return bound
    return torch.device(device_type, torch.get_device_module(device_type).current_device())


def start_device(device_type: str) -> None:
    """Makes `device_id` of init_process_group() current, unless the program has chosen a device itself.

    Otherwise torch's DeviceMesh takes the device that LOCAL_RANK names.
    """
    bound = _bound_device(device_type)
    if bound is not None:
        module = torch.get_device_module(device_type)
        if not module.is_initialized():
            module.set_device(bound.index)


def _bound_device(device_type: str) -> torch.device | None:
    bound: torch.device | None = dist.group.WORLD.bound_device_id if dist.is_initialized() else None  # type: ignore[union-attr]
    is_it = bound is not None and bound.type == device_type and bound.index is not None
    return bound if is_it else None
