"""report_after(): compares the steps of a run with the prediction, and names the terms that differ."""

from __future__ import annotations

import statistics
import time
import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from torch_mics._context import Context, context_of
from torch_mics._hooks import is_recomputation
from torch_mics._module import sharded_unit
from torch_mics._optimizer_checks import units_of_optimizer
from torch_mics.planner._plan import Plan
from torch_mics.report._expected import Bytes, StepShape, counted_bytes, expected_bytes
from torch_mics.report._step_report import Observed, StepReport, make_report


class StepWatch:
    """The result of report_after(): watches the steps of one model until its report is made.

    Attributes:
        report: None until the steps are over.
    """

    def __init__(self, model: nn.Module, num_steps: int, plan: Plan | None, show: bool) -> None:
        self.report: StepReport | None = None
        self._unit = sharded_unit(model, "report_after")
        self._num_steps, self._plan, self._show = num_steps, plan, show
        self._context: Context | None = None
        self._optimizer: weakref.ref[torch.optim.Optimizer] | None = None  # the model's last one
        # The step at hand.
        self._microsteps = 0
        self._boundaries = 0
        self._has_other_forwards = False
        self._before: tuple[float, Bytes] | None = None
        self._stepping = 0.0
        # All steps so far.
        self._steps = 0
        self._shapes: list[StepShape] = []
        self._seconds: list[float] = []
        self._optimizer_seconds: list[float] = []
        self._expected: Bytes = {}
        self._counted: Bytes = {}
        self._expected_of: dict[StepShape, Bytes] = {}
        self._hooks: list[Any] = [
            model.register_forward_hook(self._after_forward),
            register_optimizer_step_pre_hook(self._before_step),
            register_optimizer_step_post_hook(self._after_step),
        ]

    def stop(self) -> None:
        """Ends the watch; a report that has been made stays."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        if not torch.is_grad_enabled():
            self._has_other_forwards = True
        elif not is_recomputation():
            self._microsteps += 1
            handle = self._unit.handle
            self._boundaries += handle is None or handle.settings.synchronize_gradients

    def _is_of_model(self, optimizer: torch.optim.Optimizer) -> bool:
        if self._optimizer is None or self._optimizer() is not optimizer:
            owner = self._unit.owner
            if owner is None or not any(u.owner is owner for u in units_of_optimizer(optimizer)):
                return False
            self._optimizer = weakref.ref(optimizer)
        return True

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        # Of several optimizers the first to step after a forward ends the step.
        if self._microsteps == 0 or not self._is_of_model(optimizer):
            return
        context = context_of(self._unit)
        assert context is not None
        now, counted = time.perf_counter(), counted_bytes(context)
        self._steps += 1
        if self._before is not None and context is self._context and not self._has_other_forwards:
            self._note(context, now, counted)
        if context is not self._context:
            self._expected_of.clear()
        self._context, self._before = context, (now, counted)
        self._microsteps = self._boundaries = 0
        self._has_other_forwards = False
        self._stepping = now

    def _note(self, context: Context, now: float, counted: Bytes) -> None:
        assert self._before is not None
        shape = StepShape(self._microsteps, self._boundaries)
        self._shapes.append(shape)
        self._seconds.append(now - self._before[0])
        if shape not in self._expected_of:
            self._expected_of[shape] = expected_bytes(context, shape)
        for key, value in self._expected_of[shape].items():
            self._expected[key] = self._expected.get(key, 0) + value
            self._counted[key] = self._counted.get(key, 0) + counted[key] - self._before[1][key]

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._stepping == 0 or not self._is_of_model(optimizer):
            return
        self._optimizer_seconds.append(time.perf_counter() - self._stepping)
        self._stepping = 0.0
        if self._steps < self._num_steps:
            return
        self.stop()
        assert self._context is not None
        observed = Observed(
            num_steps=len(self._shapes),
            shape=statistics.mode(self._shapes) if self._shapes else StepShape(1, 1),
            seconds=statistics.median(self._seconds) if self._seconds else 0.0,
            optimizer_seconds=statistics.median(self._optimizer_seconds),
            expected=self._expected,
            counted=self._counted,
        )
        self.report = make_report(self._context, optimizer, observed, self._plan)
        self._print(self.report)

    def _print(self, report: StepReport) -> None:
        if not self._show:
            return
        rank = dist.get_rank() if dist.is_initialized() else 0
        if rank == 0:
            print(report.text(), flush=True)
        elif not report.bytes_agree:
            wrong = ", ".join(row.term for row in report.off if row.unit == "bytes")
            print(f"torch_mics: bytes differ on world_rank {rank}: {wrong}", flush=True)


def report_after(
    model: nn.Module, num_steps: int = 20, *, plan: Plan | None = None, show: bool = True
) -> StepWatch:
    """Compares a run with its prediction: after `num_steps` optimizer steps rank 0 prints a report.

    Bytes are compared exactly, by communicator and tier, in each step from the second on that has only
    forwards with a backward. States and working memory are compared with the memory model. With `plan`,
    the plan that the run follows, so are activations (on CUDA) and the time of a step; its micro-batch,
    recomputation and calibration count, the other settings are those of the run. Another rank prints a line
    if its own bytes differ. A step costs two readings of the clock and one of the counters.

    Args:
        model: the sharded root module.
        num_steps: optimizer steps until the report.
        plan: what plan() found for this model.
        show: print; the report is in the result's `report` either way.

    Raises:
        TypeError: the model is not sharded.
        ValueError: fewer than two steps.
    """
    if num_steps < 2:
        raise ValueError(
            f"a report needs at least two steps: got num_steps={num_steps}. The first is not counted."
        )
    return StepWatch(model, num_steps, plan, show)
