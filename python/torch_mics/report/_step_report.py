"""The report of a run: each term of the prediction beside what was measured."""

from __future__ import annotations

import dataclasses
import os
import resource
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch.distributed.tensor import DTensor

from torch_mics import _C
from torch_mics._context import Context
from torch_mics._unit import ShardedUnit
from torch_mics.planner._plan import Plan
from torch_mics.planner._tables import percent
from torch_mics.report._expected import TIERS, Bytes, StepShape, residency_of

MEMORY_ERROR = 0.10  # above it a term of the memory model counts as off

_TIER_NAMES = {"intra": "inside nodes", "inter": "between nodes"}
_PARAMETER_PARTS = ("full slots", "full, kept", "block slots", "blocks, kept")


@dataclasses.dataclass(frozen=True)
class Row:
    """One term. None where it is not predicted, or not measured."""

    term: str
    unit: Literal["bytes", "MB", "ms"]
    predicted: float | None
    measured: float | None
    tolerance: float

    @property
    def error(self) -> float | None:
        """Relative error of the prediction; None where one of the two is missing."""
        if self.predicted is None or self.measured is None:
            return None
        if self.predicted == self.measured:
            return 0.0
        return self.predicted / self.measured - 1 if self.measured else float("inf")

    @property
    def is_off(self) -> bool:
        return self.error is not None and abs(self.error) > self.tolerance


@dataclasses.dataclass(frozen=True)
class StepReport:
    """Predictions beside measurements; bytes are of all steps compared, times of one step."""

    num_steps: int
    shape: StepShape
    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    @property
    def off(self) -> tuple[Row, ...]:
        """The terms that are off."""
        return tuple(row for row in self.rows if row.is_off)

    @property
    def bytes_agree(self) -> bool:
        """Whether every byte was predicted."""
        return not any(row.is_off for row in self.rows if row.unit == "bytes")

    def text(self) -> str:
        """Gives the report as it is printed."""
        cells = [("", "predicted", "measured", "")]
        for row in self.rows:
            mark = "" if row.error is None else "equal" if row.error == 0 else percent(row.error)
            cells.append(
                (
                    row.term,
                    _number(row.predicted, row.unit),
                    _number(row.measured, row.unit),
                    f"{mark} OFF" if row.is_off else mark,
                )
            )
        widths = [max(len(row[i]) for row in cells) for i in range(3)]
        steps = f"{self.shape.num_microsteps} micro-steps, {self.shape.num_boundaries} of them a boundary"
        lines = [f"torch_mics: {self.num_steps} steps compared with the prediction ({steps})"]
        lines += [
            f"  {a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}  {d}".rstrip()
            for a, b, c, d in cells
        ]
        lines += [f"  {note}" for note in self.notes]
        names = ", ".join(row.term for row in self.off)
        lines.append(f"  off: {names or 'nothing'}")
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Observed:
    """What was measured. `seconds` are medians, from one optimizer step to the next."""

    num_steps: int
    shape: StepShape
    seconds: float
    optimizer_seconds: float
    expected: Bytes
    counted: Bytes


def make_report(
    context: Context, optimizer: torch.optim.Optimizer, observed: Observed, plan: Plan | None
) -> StepReport:
    """Puts the report together, at the end of an optimizer step."""
    run = _Run(context, optimizer, observed.shape, plan)
    rows = [*_byte_rows(observed), *run.memory_rows(), *run.time_rows(observed)]
    return StepReport(observed.num_steps, observed.shape, tuple(rows), tuple(run.notes()))


def _byte_rows(observed: Observed) -> Iterator[Row]:
    for (name, tier), expected in observed.expected.items():
        counted = observed.counted[name, tier]
        if expected or counted:
            yield Row(f"{name} {_TIER_NAMES[tier]}", "bytes", expected, counted, 0.0)
    for tier in TIERS:
        total = [
            sum(n for (_, t), n in side.items() if t == tier)
            for side in (observed.expected, observed.counted)
        ]
        yield Row(f"all {_TIER_NAMES[tier]}", "bytes", total[0], total[1], 0.0)


class _Run:
    """The run in the terms of the memory and time models."""

    def __init__(
        self,
        context: Context,
        optimizer: torch.optim.Optimizer,
        shape: StepShape,
        plan: Plan | None,
    ) -> None:
        self._context, self._optimizer = context, optimizer
        self._shape, self._plan = shape, plan
        self._units = [u for u in context.units if u.handle is not None and u.parameters]
        self._topology = context.root_unit.groups.topology
        self._prefetch_depths = context.root_unit.settings.prefetch_depths
        self._settings = self._make_settings()

    def _make_settings(self) -> _C.StepSettings:
        """Gives the settings of the run; those of the largest unit stand for all."""
        largest = max(self._units, key=_numel)
        topology, settings = self._topology, _C.StepSettings()
        settings.world_size = topology.world_size
        settings.partition_size = topology.partition_size
        settings.gather = settings.reduce = largest.variant
        settings.residency = residency_of(largest)
        settings.num_microsteps = self._shape.num_microsteps
        settings.parameter_nbytes = largest.parameter_dtype.itemsize
        settings.gradient_nbytes = largest.reduce_dtype.itemsize
        settings.replicate_nbytes = max(4, largest.reduce_dtype.itemsize)
        # As Groups.streams(): without threads a collective runs where it is issued.
        settings.overlap = (
            os.environ.get("MICS_STREAMS", "threads") == "threads"
            and largest.shard.device.type == "cpu"
            and topology.world_size > 1
        )
        if self._shape.num_boundaries > 1:
            settings.sync = _C.GradientSync.REPLICATE_EACH
        settings.prefetch_intra, settings.prefetch_rail = self._prefetch_depths
        if self._plan is not None:
            settings.micro_batch = self._plan.best.settings.micro_batch
            settings.recompute = self._plan.best.settings.recompute
        return settings

    def notes(self) -> Iterator[str]:
        """Says where the run is not the plan."""
        if self._plan is None:
            yield "without a plan: activations and the time of a step are not predicted"
            return
        planned = self._plan.best.settings
        for name in ("world_size", "partition_size", "num_microsteps"):
            mine, theirs = getattr(self._settings, name), getattr(planned, name)
            if mine != theirs:
                yield f"the run is not the plan: {name} is {mine}, the plan has {theirs}"
        if self._plan.workload.numel != sum(map(_numel, self._units)):
            yield "the run is not the plan: the model has another number of parameters"

    # --- memory -----------------------------------------------------------------------------------

    def memory_rows(self) -> Iterator[Row]:
        runtime = self._context.engine.memory()
        parameters = sum(p.nbytes for p in runtime.parts if p.name in _PARAMETER_PARTS)
        gradients = sum(p.nbytes for p in runtime.parts if p.name not in _PARAMETER_PARTS)
        predicted: dict[str, float | None] = dict.fromkeys(("states", "gathered", "sums", "peak"))
        memory = self._predicted_memory()
        if memory is not None:
            predicted["states"] = memory.states
            predicted["gathered"] = memory.parameters_kept + memory.gathered + memory.staging
            predicted["sums"] = memory.gradients_kept + memory.unit_gradients
            if self._plan is not None:
                predicted["peak"] = memory.peak - memory.communicators
        yield _memory_row("memory of states", predicted["states"], self._state_nbytes())
        yield _memory_row("memory of gathered parameters", predicted["gathered"], parameters)
        yield _memory_row("memory of gradients on their way", predicted["sums"], gradients)
        yield _memory_row("unplanned memory", 0, runtime.grown_nbytes)
        device = self._context.root_unit.shard.device
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(device)
            yield _memory_row("peak memory, allocated", predicted["peak"], peak)
        else:
            # Of the process, with libraries, data and activations, which the model does not predict.
            kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            yield _memory_row("peak memory of the process", None, 1024 * kib)

    def _predicted_memory(self) -> _C.MemoryTerms | None:
        per_node = self._topology.ranks_per_node
        if per_node == 0:
            return None  # uneven nodes are beyond the model
        if self._plan is not None:
            workload, limits = self._plan.workload, self._plan.calibration.limits()
        else:
            units = [_C.UnitWork(name=unit.name, numel=_numel(unit)) for unit in self._units]
            workload = _C.Workload(units=units, tokens_per_sample=1, width=1)
            limits = _C.MemoryLimits(capacity_nbytes=1.0)
        cluster = _C.Cluster(machine=_C.Machine(ranks_per_node=per_node))
        return _C.step_memory(workload, cluster, self._settings, limits)

    def _state_nbytes(self) -> int:
        """Shards, gradient shards, and what the optimizer keeps of them."""
        shards = sum(
            unit.shard.nbytes + unit.dtype.itemsize * unit.gradient_layout().shard_numel
            for unit in self._units
        )
        return shards + sum(map(_nbytes, self._optimizer.state.values()))

    # --- time -------------------------------------------------------------------------------------

    def time_rows(self, observed: Observed) -> Iterator[Row]:
        step, optimizer = observed.seconds, observed.optimizer_seconds
        time = self._predicted_time()
        if time is None or self._plan is None:
            yield _time_row("forward and backward", None, step - optimizer)
            yield _time_row("optimizer", None, optimizer)
            yield _time_row("step", None, step)
            return
        error = self._plan.calibration.time_error
        yield _time_row("compute", time.compute, None)
        yield _time_row("compute lost to busy links", time.contention, None)
        yield _time_row("waiting for communication", time.exposed, None)
        rest = time.total - time.optimizer
        yield _time_row("forward and backward", rest, step - optimizer, error)
        yield _time_row("optimizer", time.optimizer, optimizer, error)
        yield _time_row("step", time.total, step, error)

    def _predicted_time(self) -> _C.StepTime | None:
        per_node = self._topology.ranks_per_node
        if self._plan is None or per_node == 0:
            return None
        cluster = self._plan.calibration.cluster(self._plan.workload.width)
        cluster.machine.ranks_per_node = per_node
        return _C.step_time(self._plan.workload, cluster, self._settings)


def _memory_row(term: str, predicted: float | None, measured: float | None) -> Row:
    return Row(term, "MB", _scaled(predicted, 1e-6), _scaled(measured, 1e-6), MEMORY_ERROR)


def _time_row(
    term: str, predicted: float | None, measured: float | None, tolerance: float = 0.0
) -> Row:
    return Row(term, "ms", _scaled(predicted, 1e3), _scaled(measured, 1e3), tolerance)


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else factor * value


def _numel(unit: ShardedUnit) -> int:
    return sum(parameter.sizes.numel() for parameter in unit.parameters)


def _nbytes(state: Any) -> int:
    found = 0
    for value in state.values() if isinstance(state, dict) else ():
        local = value.to_local() if isinstance(value, DTensor) else value
        if isinstance(local, torch.Tensor) and local.ndim > 0:
            found += local.nbytes
    return found


def _number(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f} B" if unit == "bytes" else f"{value:,.3f} {unit}"
