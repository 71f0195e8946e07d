"""What the contest needs of every way to train: a model, its steps, and its counters."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

MicroStep = Callable[[bool], contextlib.AbstractContextManager[None]]  # (is it a step's last one?)


@dataclasses.dataclass(frozen=True)
class Setting:
    """Where contestants train, and in what precision."""

    device: str = "cpu"
    policy: MixedPrecisionPolicy | None = None  # for FSDP2, HSDP and ours
    # DeepSpeed asks for these when its engine is made:
    optimizer: Callable[[nn.Module], Any] | None = None
    micro_steps: int = 1


@dataclasses.dataclass
class Contestant:
    """A model, how its micro-steps are told apart, and how its communication is counted."""

    name: str
    model: nn.Module
    copies: int  # ranks that hold the same part of the gradients
    micro_step: MicroStep = lambda is_last: contextlib.nullcontext()
    has_parity: bool = True  # trains as one process does
    optimizers: ModuleType = torch.optim  # the module that has its optimizer
    optimizer: Any = None
    may_fail: bool = False  # if it raises in the first step, that is its result
    why_not: str = ""  # the message, if it could not be made
    counted: Callable[[], tuple[int, int]] = lambda: (0, 0)  # bytes sent inside nodes, and between
    exposed: Callable[[], float] = lambda: math.nan  # seconds that this rank waited for others

    def backward(self, loss: torch.Tensor, micro_steps: int) -> None:
        """Runs the backward of one micro-step."""
        (loss / micro_steps).backward()

    def step(self) -> None:
        """Ends the step."""
        self.optimizer.step()
        self.optimizer.zero_grad()

    def gradient_norm(self) -> float:
        """Gives the norm of the whole gradient. Collective."""
        square = torch.zeros((), dtype=torch.float64)
        for parameter in self.model.parameters():
            gradient = parameter.grad
            if gradient is None:
                continue
            local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
            square += local.detach().double().square().sum().cpu()
        dist.all_reduce(square)
        return math.sqrt(square.item() / self.copies)


def first_line(error: Exception) -> str:
    """Gives the part of an error that a record keeps."""
    return f"{type(error).__name__}: {error}".splitlines()[0]
