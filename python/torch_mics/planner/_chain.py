"""The time of a chain of equal layers whose compute time is known, as from a benchmark or a profile."""

from __future__ import annotations

from torch_mics import _C
from torch_mics.planner._calibration import Calibration


def chain_seconds(
    calibration: Calibration,
    *,
    num_layers: int,
    layer_numel: int,
    forward_seconds: float,
    world_size: int,
    shard_size: int,
    num_microsteps: int = 1,
    hierarchical: bool = True,
    element_nbytes: int = 4,
) -> float:
    """Predicts the seconds of one step by the time model (include/mics/model/step_model.h).

    Each layer is a unit; its backward takes twice its forward, and communication slows neither.

    Args:
        calibration: of the cluster; only what it says of the network is used.
        num_layers: in the chain.
        layer_numel: parameters of a layer.
        forward_seconds: of a layer, computed alone.
        world_size: ranks.
        shard_size: ranks of a partition group.
        num_microsteps: of a step.
        hierarchical: gathers and reductions of groups over nodes go in two hops.
        element_nbytes: of a parameter and of a gradient on the wire.

    Raises:
        ValueError: a number is below 1, or shard_size is not legal for the world.
    """
    layer = _C.UnitWork(
        name="layer",
        num_units=num_layers,
        numel=layer_numel,
        forward_flops=forward_seconds,  # of a device that does one per second
    )
    workload = _C.Workload(units=[layer], tokens_per_sample=1, width=1)
    cluster = calibration.cluster(width=1)
    cluster.peak_flops = cluster.efficiency = 1.0
    cluster.contention = _C.Contention()
    spans = shard_size > calibration["ranks_per_node"]
    variant = _C.Variant.HIERARCHICAL if hierarchical and spans else _C.Variant.FLAT
    settings = _C.StepSettings(
        world_size=world_size,
        partition_size=shard_size,
        gather=variant,
        reduce=variant,
        num_microsteps=num_microsteps,
        parameter_nbytes=element_nbytes,
        gradient_nbytes=element_nbytes,
        replicate_nbytes=max(4, element_nbytes),
    )
    return float(_C.step_time(workload, cluster, settings).total)
