"""What FSDP2 promises holds here too, shown by running torch's fully_shard beside ours.

Functions that run on the ranks begin with an underscore; the tests say what must come of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed.fsdp as fsdp
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import torch_mics as mics
from support.models import TinyGPT, batch, loss, make_gpt
from support.ranks import expect_success, on_each_rank, run_ranks
from support.values import whole

WORLD = 4
DIMS = [1, 2]


def on_ranks(function: Callable[..., Any], *args: Any) -> list[Any]:
    return run_ranks(WORLD, function, *args, ranks_per_node=2)


each_rank = on_each_rank(expect_success, WORLD, ranks_per_node=2)


def mesh_of(dims: int) -> DeviceMesh:
    if dims == 1:
        return init_device_mesh("cpu", (WORLD,), mesh_dim_names=("dp_shard",))
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_replicate", "dp_shard"))


def shard_with(fully_shard: Callable[..., Any], model: TinyGPT, **options: Any) -> Any:
    """As FSDP2's tutorials: each block, then the root."""
    for block in model.blocks:
        fully_shard(block, **options)
    fully_shard(model, **options)
    return model


def ours(dims: int, model: TinyGPT | None = None, **options: Any) -> Any:
    return shard_with(mics.fully_shard, model or make_gpt(), mesh=mesh_of(dims), **options)


def theirs(mesh: DeviceMesh, model: TinyGPT | None = None, **options: Any) -> Any:
    return shard_with(fsdp.fully_shard, model or make_gpt(), mesh=mesh, **options)


def twins(dims: int, tied: bool = False, **options: Any) -> tuple[Any, Any]:
    """The same model, sharded by both on one mesh."""
    mesh = mesh_of(dims)
    mine = shard_with(mics.fully_shard, make_gpt(tied), mesh=mesh, **options)
    return mine, theirs(mesh, make_gpt(tied), **options)


def gradients(model: nn.Module) -> dict[str, torch.Tensor | None]:
    return {n: None if p.grad is None else whole(p.grad) for n, p in model.named_parameters()}


def assert_close(
    found: dict[str, Any], right: dict[str, Any], rtol: float = 1e-5, atol: float = 1e-7
) -> None:
    assert list(found) == list(right)
    for name, value in right.items():
        assert (found[name] is None) == (value is None), name
        if value is not None:
            torch.testing.assert_close(found[name], value, rtol=rtol, atol=atol)


def train(
    rank: int, model: Any, optimizer: torch.optim.Optimizer, max_norm: float | None
) -> list[float]:
    losses = []
    for step in range(3):
        for micro_step in range(2):
            model.set_requires_gradient_sync(micro_step == 1)
            value = loss(model, batch(step, micro_step, rank)) / 2
            value.backward()
            losses.append(value.item())
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        optimizer.zero_grad()
    return losses
