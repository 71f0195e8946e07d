"""Predicts time and memory of a training step, and searches the settings that make it fast.

The models are in the C++ core (include/mics/model). Here are their inputs, workloads and calibrations,
and what is made of their results.
"""

from torch_mics.planner._bytes import predicted_bytes
from torch_mics.planner._calibration import Calibration, load_calibration
from torch_mics.planner._chain import chain_seconds
from torch_mics.planner._models import published_shapes
from torch_mics.planner._plan import Plan, plan
from torch_mics.report._step_report import StepReport
from torch_mics.report._watch import StepWatch, report_after

__all__ = [
    "Calibration",
    "Plan",
    "StepReport",
    "StepWatch",
    "chain_seconds",
    "load_calibration",
    "plan",
    "predicted_bytes",
    "published_shapes",
    "report_after",
]
