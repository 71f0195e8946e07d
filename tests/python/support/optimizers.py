"""Trains one model with torch_mics.optim and with torch's optimizers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import torch_mics as mics
from support.bodies import Stack, World, make, points, shard
from support.values import local

OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("AdamW", {}),
    ("AdamW", {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.0}),
    ("AdamW", {"lr": 0.02, "weight_decay": 0.3, "amsgrad": True, "maximize": True}),
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "weight_decay": 0.1, "maximize": True}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "maximize": True}),
]
Params = Callable[[nn.Module], Any]


def every(model: nn.Module) -> Any:
    return model.parameters()


def by_dimension(model: nn.Module) -> Any:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    return [{"params": matrices, "lr": 0.03}, {"params": vectors, "weight_decay": 0.2}]


def theirs(name: str, params: Any, **options: Any) -> torch.optim.Optimizer:
    """torch's, in its single-tensor form unless `options` ask for the fused one."""
    if not options.get("fused"):
        options["foreach"] = False
    return getattr(torch.optim, name)(params, **options)


def ours(name: str, params: Any, **options: Any) -> torch.optim.Optimizer:
    return getattr(mics.optim, name)(params, **options)


def bits_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """This rank's parameters and states, by name."""
    found = {}
    for name, parameter in model.named_parameters():
        found[name] = local(parameter)
        for key, value in optimizer.state.get(parameter, {}).items():
            found[f"{name} {key}"] = local(value)
    return found


class Switched(Stack):
    """Uses the spare part of its layers in even steps only."""

    def forward(self, x: torch.Tensor, step: int = 0) -> torch.Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x, use_spare=step % 2 == 0)
        return self.head(x)


def backward(model: nn.Module, rank: int, step: int) -> None:
    x = points(rank, step).to(model.head.weight.dtype)
    model(x, step).square().mean().backward()


def step_twins(
    world: World,
    name: str,
    options: dict[str, Any],
    *,
    steps: int = 3,
    params: Params = every,
    prepare: Callable[[nn.Module], None] = lambda model: None,
    between: Callable[[nn.Module, torch.optim.Optimizer, int], None] = lambda *_: None,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Trains with our optimizer and with torch's; gives what both came to."""
    results = []
    for make_optimizer in (ours, theirs):
        model = make(Switched)
        prepare(model)
        shard(world, model)
        optimizer = make_optimizer(name, params(model), **options)
        for step in range(steps):
            backward(model, world.rank, step)
            between(model, optimizer, step)
            optimizer.step()
            optimizer.zero_grad()
        results.append(bits_of(model, optimizer))
    return results[0], results[1]
