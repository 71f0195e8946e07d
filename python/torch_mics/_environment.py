"""What a bug report must say about a machine: versions, devices, environment variables."""

from __future__ import annotations

import os
import pathlib
import platform

import torch

from torch_mics import _C
from torch_mics._build_check import built_for_torch
from torch_mics._nccl import version_text
from torch_mics._version import __version__

# Variables that change how collectives run.
_PREFIXES = (
    "CUDA_",
    "FI_",
    "GLOO_",
    "MICS_",
    "NCCL_",
    "OMP_",
    "PYTORCH_",
    "TORCH_NCCL_",
    "TORCH_DIST_",
)


def environment() -> dict[str, str]:
    """Gives names and values, in the order to print them. Starts no collective and needs no GPU."""
    found = {
        "torch_mics": __version__,
        "built for torch": built_for_torch(pathlib.Path(_C.__file__)) or "not recorded",
        "torch": torch.__version__,
        "CUDA of torch": torch.version.cuda or "none",
        **_nccl(),
        **_devices(),
        "Python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "cores": str(len(os.sched_getaffinity(0))),
    }
    variables = {
        name: os.environ[name] for name in sorted(os.environ) if name.startswith(_PREFIXES)
    }
    return found | variables


def _nccl() -> dict[str, str]:
    versions = _C.nccl_versions()
    found = {}
    if versions.header:
        found["NCCL of the headers"] = version_text(versions.header)
    if versions.library:
        found["NCCL that is loaded"] = version_text(versions.library)
    found["cuda"] = f"cannot be used: {versions.problem}" if versions.problem else "can be used"
    return found


def _devices() -> dict[str, str]:
    found = {}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found[f"GPU {index}"] = (
            f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB, "
            f"compute {properties.major}.{properties.minor}"
        )
    return found
