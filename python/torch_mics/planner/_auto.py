"""shard_size="auto": the partition size that plan() finds for the cluster at hand."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import nn

from torch_mics import _C
from torch_mics._exchange import exchange
from torch_mics._find_units import Units
from torch_mics._hosts import node
from torch_mics.planner._calibration import Calibration, load_calibration, shipped_instances
from torch_mics.planner._plan import plan

# Assumed, because the call does not know the data.
TOKENS_PER_SAMPLE = 2048
MICRO_STEPS = 4


def choose_shard_size(model: nn.Module, units: Units) -> int:
    """Gives the partition size of the fastest plan that fits, the same on every rank.

    Assumes one sample of 2048 tokens per rank and micro-step, four micro-steps, and that nothing but
    shards is kept. The calibration is the one that MICS_CALIBRATION names, or that of the GPU.

    Raises:
        ValueError: on every rank: the GPU is unknown and MICS_CALIBRATION is not set, the nodes differ
            in size, or the model fits nowhere.
    """
    nodes = exchange("nodes", node())
    ranks_per_node = _C.Topology(node_of_rank=nodes, partition_size=1).ranks_per_node
    if ranks_per_node == 0:
        raise ValueError(
            'shard_size="auto" needs nodes of equal size whose ranks are consecutive: got '
            f"{len(set(nodes))} nodes for {len(nodes)} ranks. Give a number."
        )
    name = os.environ.get("MICS_CALIBRATION")
    calibration = load_calibration(name) if name else _calibration_of_gpu()
    found = plan(
        model,
        instance=calibration.replace(ranks_per_node=ranks_per_node),
        world_size=dist.get_world_size(),
        global_batch=MICRO_STEPS * dist.get_world_size(),
        tokens_per_sample=TOKENS_PER_SAMPLE,
        units=units,
        micro_batches=[1],
        vary_residency=False,
    )
    return found.shard_size


def _calibration_of_gpu() -> Calibration:
    """The shipped calibration of this GPU; of several, the one with the nearest memory."""
    name, memory = "", 0
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        name, memory = properties.name, properties.total_memory
    known = [load_calibration(instance) for instance in shipped_instances()]
    same = [calibration for calibration in known if calibration.gpu.split()[0] in name]
    if not same:
        raise ValueError(
            'shard_size="auto" needs the calibration of this cluster: got '
            f"{name or 'no GPU'}. Set MICS_CALIBRATION to an instance type or a .json file."
        )
    return min(same, key=lambda calibration: abs(calibration["memory"] - memory))
