"""Scaling curves: how the settings of a plan do on fewer and on more ranks, beside other systems."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Literal

from torch_mics import _C
from torch_mics.planner._plan import Plan
from torch_mics.planner._workload import tflops

Scaling = Literal["weak", "strong"]
SCALINGS: tuple[Scaling, ...] = ("weak", "strong")
MOST_GPUS = 16384

_SHARDS_ONLY = _C.ResidencySettings()


@dataclasses.dataclass(frozen=True)
class Point:
    """One system on one number of GPUs. `efficiency` is set by curve(): see there."""

    scaling: Scaling
    system: str
    gpus: int
    settings: _C.StepSettings
    time: _C.StepTime
    memory: _C.MemoryTerms
    fits: bool
    tflops: float
    efficiency: float = 1.0

    @property
    def samples(self) -> int:
        """Samples of one step, over all GPUs."""
        return self.settings.micro_batch * self.settings.num_microsteps * self.gpus

    @property
    def samples_per_s(self) -> float:
        return self.samples / self.time.total


# --- systems --------------------------------------------------------------------------------------


def _mics(settings: _C.StepSettings, planned: int) -> None:
    settings.partition_size = planned


def _hsdp(settings: _C.StepSettings, planned: int) -> None:
    settings.partition_size = planned
    settings.gather = settings.reduce = _C.Variant.FLAT
    settings.residency = _SHARDS_ONLY
    settings.sync = _C.GradientSync.REPLICATE_EACH


def _zero3(settings: _C.StepSettings, planned: int) -> None:
    settings.partition_size = settings.world_size
    settings.gather = settings.reduce = _C.Variant.FLAT
    settings.residency = _SHARDS_ONLY


def _zero2(settings: _C.StepSettings, planned: int) -> None:
    _zero3(settings, planned)
    full = _C.Residency.FULL
    settings.residency = _C.ResidencySettings(after_forward=full, between_microsteps=full)


# Each changes in the plan's settings what its system decides: MiCS nothing; HSDP keeps the plan's partition
# size, gathers flat and reduces over replicas in every micro-step; ZeRO-3 is one partition group; ZeRO-2
# is too, and keeps the full parameters from the first micro-step to the optimizer.
SYSTEMS: dict[str, Callable[[_C.StepSettings, int], None]] = {
    "MiCS": _mics,
    "HSDP": _hsdp,
    "ZeRO-3": _zero3,
    "ZeRO-2": _zero2,
}


# --- curves ---------------------------------------------------------------------------------------


def gpu_counts(plan: Plan, most: int = MOST_GPUS) -> list[int]:
    """Lists the sizes to simulate: parts of a node, then nodes and partition groups doubled up to `most`.

    Raises:
        ValueError: `most` is below 1.
    """
    if most < 1:
        raise ValueError(f"a simulation needs at least one GPU: got {most}.")
    per_node = int(plan.calibration["ranks_per_node"])
    counts = {n for n in range(1, per_node) if per_node % n == 0} | {plan.world_size}
    for start in (per_node, max(per_node, plan.shard_size)):
        while start <= most:
            counts.add(start)
            start *= 2
    return sorted(n for n in counts if n <= most)


def curve(plan: Plan, scaling: Scaling, system: str, counts: list[int]) -> list[Point]:
    """Simulates one system; numbers of GPUs that do not suit it or the batch have no point.

    Weak scaling keeps the micro-batch and the micro-steps of the plan. Strong scaling keeps its global
    batch, and its micro-batch as long as a rank has that many samples. The efficiency of a point is its
    samples per second and GPU over those of the curve's first point that fits into memory.
    """
    points = list(_points(plan, scaling, system, counts))
    first = next((p for p in points if p.fits), points[0] if points else None)
    if first is None:
        return []
    per_gpu = first.samples_per_s / first.gpus
    return [dataclasses.replace(p, efficiency=p.samples_per_s / p.gpus / per_gpu) for p in points]


def _points(plan: Plan, scaling: Scaling, system: str, counts: list[int]) -> Iterator[Point]:
    workload, calibration = plan.workload, plan.calibration
    cluster, limits = calibration.cluster(workload.width), calibration.limits()
    per_node = int(calibration["ranks_per_node"])
    planned = plan.best.settings
    for gpus in counts:
        steps = _microsteps(plan, scaling, gpus)
        if steps is None:
            continue
        micro_batch, num_microsteps = steps
        settings = _copy(planned)
        settings.world_size, settings.micro_batch = gpus, micro_batch
        settings.num_microsteps = num_microsteps
        SYSTEMS[system](settings, planned.partition_size)
        legal = _C.Topology.legal_partition_sizes(gpus, min(gpus, per_node))
        if settings.partition_size not in legal:
            continue
        time = _C.step_time(workload, cluster, settings)
        memory = _C.step_memory(workload, cluster, settings, limits)
        rate = tflops(workload, settings, time.total)
        yield Point(scaling, system, gpus, settings, time, memory, _C.fits(memory, limits), rate)


def _microsteps(plan: Plan, scaling: Scaling, gpus: int) -> tuple[int, int] | None:
    """Micro-batch and number of micro-steps; None where the global batch cannot be divided."""
    settings = plan.best.settings
    if scaling == "weak":
        return settings.micro_batch, settings.num_microsteps
    if plan.global_batch % gpus != 0:
        return None
    samples = plan.global_batch // gpus
    most = min(settings.micro_batch, samples)
    micro_batch = next(b for b in range(most, 0, -1) if samples % b == 0)
    return micro_batch, samples // micro_batch


def _copy(settings: _C.StepSettings) -> _C.StepSettings:
    """A copy: a C++ struct that is shared would change for all its holders."""
    copied = _C.StepSettings()
    for name in _FIELDS:
        setattr(copied, name, getattr(settings, name))
    return copied


_FIELDS = [name for name in dir(_C.StepSettings) if not name.startswith("_")]
