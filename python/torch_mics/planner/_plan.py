"""plan(): the fastest way to train a model on a cluster, and what it costs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from torch import nn

from torch_mics import _C
from torch_mics._find_units import Units
from torch_mics._settings import reshard_argument
from torch_mics.planner._calibration import Calibration, load_calibration, shipped_instances
from torch_mics.planner._workload import module_workload, tflops

Size = tuple[int, _C.Variant]
_MOST_RANKS = 16384  # tried when nothing fits


@dataclasses.dataclass(frozen=True)
class Plan:
    """What plan() found. Times are seconds of an optimizer step, memory is bytes of one rank.

    `ranked` are the fastest settings of all; `leaders` the fastest of each partition size and variant;
    `misses` those with the least memory at each partition size where nothing fits.
    """

    calibration: Calibration
    workload: _C.Workload
    world_size: int
    global_batch: int
    ranked: list[_C.Candidate]
    leaders: list[_C.Candidate]
    misses: list[_C.Candidate]
    num_considered: int
    num_fitting: int

    @property
    def best(self) -> _C.Candidate:
        return self.ranked[0]

    @property
    def runner_up(self) -> _C.Candidate | None:
        """The fastest with another partition size or variant; None when there is none."""
        others = [c for c in self.leaders if size_of(c) != size_of(self.best)]
        return min(others, key=lambda c: c.time.total, default=None)

    @property
    def margin(self) -> float | None:
        """By what share of the best time the runner-up is slower."""
        other = self.runner_up
        return None if other is None else other.time.total / self.best.time.total - 1

    @property
    def is_tie(self) -> bool:
        """Whether the margin is within the error that the calibration's times have."""
        return self.margin is not None and self.margin <= self.calibration.time_error

    @property
    def is_extrapolated(self) -> bool:
        """Whether the best time is extrapolated beyond a measured table of the calibration."""
        return self.best.time.is_extrapolated

    @property
    def shard_size(self) -> int:
        """The partition size to pass to shard_model()."""
        return self.best.settings.partition_size

    def tflops(self, candidate: _C.Candidate) -> float:
        """TFLOP/s of one rank; recomputation counts where it is done."""
        return tflops(self.workload, candidate.settings, candidate.time.total)

    def arguments(self) -> dict[str, Any]:
        """Gives the best settings as arguments of shard_model()."""
        settings = self.best.settings
        residency = settings.residency
        accumulate = {
            _C.Residency.SHARD: "two_hop",
            _C.Residency.BLOCK: "block",
            _C.Residency.FULL: "local",
        }
        return {
            "shard_size": settings.partition_size,
            "hierarchical_gather": settings.gather == _C.Variant.HIERARCHICAL,
            "reshard_after_forward": reshard_argument(
                residency.after_forward, int(self.calibration["ranks_per_node"])
            ),
            "keep_between_microsteps": residency.between_microsteps.name.lower(),
            "accumulate": accumulate[residency.gradient_accumulation],
            "prefetch_depths": (settings.prefetch_intra, settings.prefetch_rail),
        }


def size_of(candidate: _C.Candidate) -> Size:
    """Partition size and variant of a candidate."""
    return candidate.settings.partition_size, candidate.settings.gather


def plan(
    model: nn.Module | _C.Workload,
    *,
    instance: str | Path | Calibration,
    world_size: int,
    global_batch: int,
    sample: tuple[Any, ...] | None = None,
    tokens_per_sample: int | None = None,
    units: Units = "auto",
    shard_sizes: list[int] | None = None,
    micro_batches: list[int] | None = None,
    hierarchical_gather: bool | None = None,
    recompute: bool | None = None,
    vary_residency: bool = True,
    num_ranked: int = 10,
) -> Plan:
    """Searches the settings that make a training step of `model` fastest and fit into memory.

    Nothing is run on a cluster and no process group is needed. The model may be on the meta device.

    Args:
        model: a module that is not sharded, or a workload.
        instance: a calibration: its name ("p4d"), the path of its file, or itself.
        world_size: ranks.
        global_batch: samples of one optimizer step, over all ranks and micro-steps.
        sample, tokens_per_sample, units: how the module is measured; see module_workload().
        shard_sizes, micro_batches, hierarchical_gather, recompute: what to try; None: all.
        vary_residency: False tries only settings that keep nothing but shards between uses.
        num_ranked: how many settings to keep.

    Raises:
        ValueError: the model fits nowhere, with the nearest misses and what would make it fit; sizes
            that are not legal; a batch that cannot be divided; a malformed calibration.
    """
    calibration = instance if isinstance(instance, Calibration) else load_calibration(instance)
    workload = model
    if not isinstance(workload, _C.Workload):
        workload = module_workload(
            workload, units=units, sample=sample, tokens_per_sample=tokens_per_sample
        )
    request = _C.PlanRequest(
        workload=workload,
        cluster=calibration.cluster(workload.width),
        limits=calibration.limits(),
        world_size=world_size,
        global_batch=global_batch,
        partition_sizes=shard_sizes or [],
        micro_batches=micro_batches or [],
        recompute=[] if recompute is None else [recompute],
        vary_residency=vary_residency,
        num_ranked=num_ranked,
    )
    if hierarchical_gather is not None:
        wanted = _C.Variant.HIERARCHICAL if hierarchical_gather else _C.Variant.FLAT
        request.variants = [wanted]
    result = _C.plan_step(request)
    if not result.ranked:
        raise ValueError(_nothing_fits(calibration, request, result))
    found = (result.ranked, result.leaders, result.misses)
    counts = (result.num_considered, result.num_fitting)
    return Plan(calibration, workload, world_size, global_batch, *found, *counts)


def _nothing_fits(calibration: Calibration, request: _C.PlanRequest, result: _C.PlanResult) -> str:
    """Says what is missing and what would do."""
    limits = calibration.limits()
    usable = limits.usable * limits.capacity_nbytes
    nearest = sorted(result.misses, key=lambda c: c.memory.peak)[:3]
    misses = ", ".join(
        f"shard_size={c.settings.partition_size} with micro-batch {c.settings.micro_batch} needs "
        f"{c.memory.peak / 1e9:.1f} GB"
        for c in nearest
    )
    return (
        f"a model must fit into memory: got {misses} (usable: {usable / 1e9:.1f} GB of "
        f"{calibration.instance}, {request.world_size} ranks). {_what_would_fit(calibration, request)}"
    )


def _fits(request: _C.PlanRequest) -> bool:
    return bool(_C.plan_step(request).ranked)


def _what_would_fit(calibration: Calibration, request: _C.PlanRequest) -> str:
    remedies = []
    if request.partition_sizes or request.micro_batches or request.recompute:
        free = _copy(request, calibration)
        free.partition_sizes, free.micro_batches, free.recompute = [], [], []
        if _fits(free):
            remedies.append("leave shard size, micro-batch and recomputation to the planner")
    per_rank = max(1, request.global_batch // request.world_size)
    more = _copy(request, calibration)
    more.partition_sizes = []
    while more.world_size < _MOST_RANKS:
        more.world_size *= 2
        more.global_batch = per_rank * more.world_size
        if _fits(more):
            remedies.append(f"use {more.world_size} ranks")
            break
    for name in shipped_instances():
        other = load_calibration(name)
        if other["memory"] > calibration["memory"] and _fits(_copy(request, other)):
            remedies.append(f"use {name}")
            break
    if not remedies:
        return "No number of ranks and no known instance type has enough: make the units smaller."
    return f"To make it fit: {', or '.join(remedies)}."


def _copy(request: _C.PlanRequest, calibration: Calibration) -> _C.PlanRequest:
    return _C.PlanRequest(
        workload=request.workload,
        cluster=calibration.cluster(request.workload.width),
        limits=calibration.limits(),
        world_size=request.world_size,
        global_batch=request.global_batch,
        partition_sizes=request.partition_sizes,
        micro_batches=request.micro_batches,
        variants=request.variants,
        recompute=request.recompute,
        vary_residency=request.vary_residency,
        num_ranked=1,
    )
