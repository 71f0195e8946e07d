"""Speed, memory and FLOPs."""

from __future__ import annotations

import resource
import sys

import torch

__all__ = ["PEAK_FLOPS", "peak_flops", "peak_memory_nbytes"]

# Dense 16-bit matrix FLOPs per second by the name of the device, from the vendors' data sheets.
PEAK_FLOPS = {
    "V100": 125e12,
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
}


def peak_flops(device_name: str) -> float | None:
    """Returns the 16-bit peak of a device, or None for one that is not listed."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device_name), None)


def peak_memory_nbytes(device: torch.device) -> int:
    """Returns the most memory used so far: the device's allocator, or this process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
