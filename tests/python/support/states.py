"""Steps, and trees of states that are compared."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor

import torch_mics as mics
from support.bodies import points

OPTIMIZERS = {"AdamW": torch.optim.AdamW, "mics.AdamW": mics.optim.AdamW}


def step(model: Any, optimizer: Any, rank: int, number: int = 0) -> None:
    model(points(rank, number)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def expect_same(mine: Any, other: Any, *, is_other_memory: bool = True) -> None:
    """The same tree of values, in memory of its own."""
    if isinstance(mine, DTensor):
        assert isinstance(other, DTensor)
        assert mine.placements == other.placements
        assert mine.device_mesh == other.device_mesh
        expect_same(mine.to_local(), other.to_local(), is_other_memory=is_other_memory)
    elif isinstance(mine, torch.Tensor):
        assert torch.equal(mine, other)
        if is_other_memory and mine.numel():
            assert mine.data_ptr() != other.data_ptr()
    elif isinstance(mine, dict):
        assert mine.keys() == other.keys()
        for key in mine:
            expect_same(mine[key], other[key], is_other_memory=is_other_memory)
    elif isinstance(mine, list | tuple):
        for left, right in zip(mine, other, strict=True):
            expect_same(left, right, is_other_memory=is_other_memory)
    else:
        assert mine == other
