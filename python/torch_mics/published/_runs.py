"""The published runs, and the seconds that the time model predicts for each."""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from importlib import resources
from typing import Any

from torch_mics import _C
from torch_mics.planner._calibration import Calibration
from torch_mics.planner._models import published_model
from torch_mics.planner._workload import tflops

GLOBAL_BATCH = 8192  # samples per step of the runs in the paper
_ZERO2_BUCKET_NUMEL = 5e8  # DeepSpeed's default; its gradients do not go layer by layer

FLAT, HIERARCHICAL = _C.Variant.FLAT, _C.Variant.HIERARCHICAL


@dataclasses.dataclass(frozen=True)
class Run:
    """One published throughput. `anomaly` says why it is left out of every mean; else it is ""."""

    figure: str
    instance: str
    model: str
    system: str
    gpus: int
    partition: int
    micro_batch: int
    samples_per_s: float
    anomaly: str

    @property
    def seconds(self) -> float:
        """Seconds of one micro-step."""
        return self.micro_batch * self.gpus / self.samples_per_s


@cache
def published() -> dict[str, Any]:
    """Gives the package's published.json."""
    file = resources.files("torch_mics.published") / "data" / "published.json"
    result: dict[str, Any] = json.loads(file.read_text())
    return result


@cache
def published_runs() -> tuple[Run, ...]:
    """Gives the published throughputs, in the order of the figures."""
    return tuple(Run(**run) for run in published()["runs"])


def in_buckets(workload: _C.Workload, numel: float) -> _C.Workload:
    """Cuts a workload into equal units of about `numel` parameters."""
    num_units = max(1, round(workload.numel / numel))
    unit = _C.UnitWork(
        name="bucket",
        num_units=num_units,
        numel=workload.numel // num_units,
        forward_flops=workload.flops(recompute=True) / 4 / num_units,
    )
    return _C.Workload(
        units=[unit], tokens_per_sample=workload.tokens_per_sample, width=workload.width
    )


def settings_of(run: Run, ranks_per_node: int) -> _C.StepSettings:
    """Gives the settings of a published run.

    The structure of each system is a fact, not a fitted number: DeepSpeed 0.5.6 ran communication and
    compute one after the other; MiCS gathers hierarchically over several nodes and reduces flat.
    """
    spans_nodes = run.partition > ranks_per_node
    settings = _C.StepSettings(
        world_size=run.gpus,
        partition_size=run.partition,
        micro_batch=run.micro_batch,
        num_microsteps=max(1, GLOBAL_BATCH // (run.micro_batch * run.gpus)),
        recompute=True,
    )
    if run.system in ("mics", "mics_without_two_hop") and spans_nodes:
        settings.gather = HIERARCHICAL
    if run.system == "mics_without_two_hop":
        settings.sync = _C.GradientSync.ALL_REDUCE_EACH
    if run.system.startswith("deepspeed"):
        settings.overlap = False
    if run.system == "deepspeed_zero2":
        full = _C.Residency.FULL
        settings.residency = _C.ResidencySettings(after_forward=full, between_microsteps=full)
    return settings


def predict_run(run: Run, calibration: Calibration) -> float:
    """Predicts the seconds of one micro-step of a run."""
    workload = published_model(run.model)
    if run.system == "deepspeed_zero2":
        workload = in_buckets(workload, _ZERO2_BUCKET_NUMEL)
    settings = settings_of(run, int(calibration["ranks_per_node"]))
    time = _C.step_time(workload, calibration.cluster(workload.width), settings)
    return time.total / settings.num_microsteps


def predict_step(
    model: str, calibration: Calibration, settings: _C.StepSettings
) -> tuple[float, float]:
    """Predicts the seconds of a step of a published model, and TFLOP/s per rank."""
    workload = published_model(model)
    time = _C.step_time(workload, calibration.cluster(workload.width), settings)
    return time.total, tflops(workload, settings, time.total)
