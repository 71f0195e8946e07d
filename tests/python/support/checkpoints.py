"""A model with all that trains it, and layouts to save and load it at."""

from __future__ import annotations

from typing import Any

import torch

import torch_mics as mics
from support.models import TinyGPT, batch, loss, make_gpt
from support.ranks import run_ranks
from support.values import whole
from torch_mics.checkpoint import TrainState


class Counter:
    """An extra as users write them."""

    def __init__(self) -> None:
        self.steps = 0
        self.note = torch.zeros(3)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "note": self.note}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps, self.note = state["steps"], state["note"]


class Run:
    """A model with all that trains it."""

    def __init__(self, shard_size: int, *, tied: bool = False, seed: int = 0) -> None:
        self.model: TinyGPT = mics.shard_model(make_gpt(tied, seed=seed), shard_size=shard_size)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, step_size=1, gamma=0.5)
        self.counter = Counter()
        self.state = TrainState(
            self.model, self.optimizer, scheduler=self.scheduler, counter=self.counter
        )

    def train(self, first: int, last: int, rank: int) -> list[float]:
        losses = []
        for step in range(first, last):
            value = loss(self.model, batch(step, 0, rank))
            value.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.scheduler.step()
            self.counter.steps += 1
            self.counter.note += step + 0.5
            losses.append(value.item())
        return losses

    def everything(self) -> dict[str, torch.Tensor]:
        """Model, optimizer and extras as plain tensors, the same at every layout."""
        found = {f"model.{k}": whole(v) for k, v in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state[parameter].items():
                found[f"optimizer.{name}.{key}"] = whole(value)
        found["lr"] = torch.tensor(self.optimizer.param_groups[0]["lr"], dtype=torch.float64)
        found["scheduler"] = torch.tensor(self.scheduler.last_epoch)
        found["steps"] = torch.tensor(self.counter.steps)
        found["note"] = self.counter.note.clone()
        return found


def run_at(layout: tuple[int, int, int], function: Any, *args: Any) -> list[Any]:
    world_size, shard_size, ranks_per_node = layout
    return run_ranks(world_size, function, shard_size, *args, ranks_per_node=ranks_per_node)
