"""Training on GPUs: bash tests/gpu.sh. Each body runs on CPUs too, so that it is right when a GPU comes."""

from __future__ import annotations

import os
from typing import Any
from unittest import mock

import pytest
import torch
from support.models import TinyGPT, batch, loss, make_gpt
from support.ranks import run_ranks

import torch_mics as mics

STEPS = 3
MICRO_STEPS = 2

gpu = pytest.param(
    "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here")
)
devices = pytest.mark.parametrize("device", ["cpu", gpu])

Trained = tuple[list[float], dict[str, torch.Tensor], dict[str, str]]


def use_device(rank: int, device: str, world_size: int) -> None:
    """Gives the rank a GPU: its own where there are enough, else all ranks the first one.

    NCCL refuses two ranks of one host on one GPU; with a host name each they are two hosts to it, and
    talk over sockets.
    """
    if device == "cpu":
        return
    if world_size <= torch.cuda.device_count():
        torch.cuda.set_device(rank)
        return
    torch.cuda.set_device(0)
    os.environ.update(
        NCCL_HOSTID=f"rank{rank}",
        NCCL_NET="Socket",
        NCCL_SOCKET_IFNAME="lo",
        NCCL_P2P_DISABLE="1",
        NCCL_SHM_DISABLE="1",
    )


def to_device(data: Any, device: str) -> Any:
    return tuple(part.to(device) for part in data)


def _train(rank: int, device: str, world_size: int, shard_size: int) -> Trained:
    use_device(rank, device, world_size)
    model: TinyGPT = make_gpt().to(device)
    model = mics.shard_model(model, mesh=mics.init_mesh(shard_size, device_type=device))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-1)
    losses = []
    for step in range(STEPS):
        total = 0.0
        for micro_step in range(MICRO_STEPS):
            with mics.microbatch(model, is_last=micro_step == MICRO_STEPS - 1):
                value = loss(model, to_device(batch(step, micro_step, rank), device))
                (value / MICRO_STEPS).backward()
            total += value.item()
        losses.append(total)
        optimizer.step()
        optimizer.zero_grad()
    values = {name: p.full_tensor().detach().cpu() for name, p in model.named_parameters()}
    return losses, values, mics.backends(model)


def train_alone(world_size: int) -> tuple[list[list[float]], dict[str, torch.Tensor]]:
    """One process on the CPU: each rank's losses, and the parameters."""
    model = make_gpt()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-1)
    losses: list[list[float]] = [[] for _ in range(world_size)]
    for step in range(STEPS):
        totals = [0.0] * world_size
        for micro_step in range(MICRO_STEPS):
            for rank in range(world_size):
                value = loss(model, batch(step, micro_step, rank))
                (value / MICRO_STEPS / world_size).backward()
                totals[rank] += value.item()
        for rank, total in enumerate(totals):
            losses[rank].append(total)
        optimizer.step()
        optimizer.zero_grad()
    return losses, {name: p.detach() for name, p in model.named_parameters()}


def expect_equal(results: list[Trained], world_size: int) -> None:
    losses, values = train_alone(world_size)
    for rank, (mine, parameters, _) in enumerate(results):
        assert mine == pytest.approx(losses[rank], abs=1e-4)
        for name, value in values.items():
            torch.testing.assert_close(parameters[name], value, rtol=1e-4, atol=1e-5)


def _train_asking(rank: int, asked: dict[str, str], *arguments: Any) -> Trained:
    with mock.patch.dict(os.environ, asked):
        return _train(rank, *arguments)


@devices
def test_one_rank_trains_as_one_process(device: str):
    expect_equal(run_ranks(1, _train, device, 1, 1), 1)


@devices
@pytest.mark.parametrize("shard_size", [1, 2])
def test_two_ranks_train_as_one_process(device: str, shard_size: int):
    results = run_ranks(2, _train, device, 2, shard_size)
    expect_equal(results, 2)
    if device == "cuda":
        assert all(text.startswith("nccl") for text in results[0][2].values())


@devices
@pytest.mark.parametrize(
    "asked",
    [
        {"MICS_NCCL_REGISTRATION": "buffers"},
        {"MICS_NCCL_REGISTRATION": "windows"},
        {"MICS_NCCL_REGISTRATION": "windows", "MICS_NCCL_COPY_ENGINE": "1"},
    ],
    ids=["buffers", "windows", "copy-engine"],
)
def test_registered_memory_trains_the_same(device: str, asked: dict[str, str]):
    expect_equal(run_ranks(2, _train_asking, asked, device, 2, 2), 2)
