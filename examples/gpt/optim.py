"""AdamW groups and the learning rate of each step."""

from __future__ import annotations

import math

import torch
from torch import nn

__all__ = ["learning_rate", "make_optimizer"]


def make_optimizer(model: nn.Module, *, peak: float, weight_decay: float) -> torch.optim.AdamW:
    """Makes AdamW for a sharded model; only matrices decay, not norms."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95))


def learning_rate(step: int, *, peak: float, warmup_steps: int, steps: int) -> float:
    """Returns the rate of `step` (1..steps): linear warm-up, then a cosine to a tenth of `peak`.

    A pure function of the step, so there is no scheduler state to save.
    """
    if step <= warmup_steps:
        return peak * step / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
    return peak * (0.1 + 0.45 * (1.0 + math.cos(math.pi * progress)))
