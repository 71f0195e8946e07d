"""DeepSpeed as a contestant: ZeRO-3, and MiCS in the versions that have it.

It is not a dependency: `pip install --no-build-isolation wheel deepspeed`. A contestant that does not run
is recorded with its message and leaves the contest, so that the others go on.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from contestant import Contestant, Setting, first_line
from torch import nn


class DeepSpeedContestant(Contestant):
    """Trains by the engine's own backward and step."""

    def backward(self, loss: torch.Tensor, micro_steps: int) -> None:
        """The engine counts micro-steps itself and divides by their number."""
        self.model.backward(loss)  # type: ignore[operator]
        if not self.model.is_gradient_accumulation_boundary():  # type: ignore[operator]
            self.model.step()  # type: ignore[operator]

    def step(self) -> None:
        self.model.step()  # type: ignore[operator]

    def gradient_norm(self) -> float:
        """Gives the norm of the whole gradient. Collective."""
        from deepspeed.utils import safe_get_full_grad

        square = 0.0
        for parameter in self.model.parameters():
            gradient = safe_get_full_grad(parameter)
            if gradient is not None:
                square += gradient.detach().double().square().sum().item()
        return math.sqrt(square)


def make_deepspeed(
    name: str, model: nn.Module, shard_size: int | None, setting: Setting
) -> Contestant:
    """ZeRO-3, or MiCS over groups of `shard_size`. Collective."""
    try:
        engine = _make_engine(model, shard_size, setting)
    except Exception as error:  # whatever it raises is recorded
        return Contestant(name, model, copies=1, why_not=first_line(error))

    copies = dist.get_world_size() // (shard_size or dist.get_world_size())
    return DeepSpeedContestant(name, engine, copies, may_fail=True, optimizer=engine.optimizer)


def _make_engine(model: nn.Module, shard_size: int | None, setting: Setting) -> Any:
    import deepspeed

    zero: dict[str, Any] = {"stage": 3}
    if shard_size is not None:
        from deepspeed.runtime.zero.mics import MiCS_Init

        zero |= {"mics_shard_size": shard_size, "mics_hierarchical_params_gather": False}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": setting.micro_steps,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if shard_size is not None:
        MiCS_Init(module=model, config_dict_or_path=config, dtype=torch.float32)
    assert setting.optimizer is not None
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=setting.optimizer(model), config=config, dist_init_required=False
    )
    return engine
