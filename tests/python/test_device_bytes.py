"""Bytes that a step moves beside the model's own operators: each is read once and written once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.races import watched
from support.ranks import run_ranks
from torch import nn

import torch_mics as mics

STEPS = 3
MICRO_STEPS = 2
WIDTH = 64
LAYERS = 4
BF16 = mics.MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
# Operators that only the engine uses, in a model of linear layers.
OF_ENGINE = ("aten::_foreach_copy_", "aten::_foreach_add_.List", "aten::_foreach_zero_")
OF_ENGINE += ("aten::copy_", "aten::add_.Tensor", "aten::mul_.Tensor", "aten::zero_")


def _count(rank: int, options: dict[str, Any]) -> tuple[dict[str, int], int]:
    """Gives the bytes of one step by operator, and the number of parameters."""
    with watched() as detector:
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
        numel = sum(parameter.numel() for parameter in model.parameters())
        mics.shard_model(model, units=list(model), shard_size=1, **options)
        for _ in range(STEPS):
            before = detector.moved_nbytes
            for micro_step in range(MICRO_STEPS):
                with mics.microbatch(model, is_last=micro_step == MICRO_STEPS - 1):
                    model(torch.ones(1, WIDTH)).sum().backward()
            model.zero_grad()
        after = detector.moved_nbytes
        assert detector.races == []
    return {name: after[name] - before.get(name, 0) for name in after}, numel


@pytest.mark.parametrize(
    ("options", "gathers"),
    [({"mp_policy": BF16}, 2), ({"mp_policy": BF16, "reshard_after_forward": False}, 1)],
)
def test_one_rank_in_bf16_casts_each_byte_once(options: dict[str, Any], gathers: int) -> None:
    moved, numel = run_ranks(1, _count, options)[0]
    found = sum(moved.get(name, 0) for name in OF_ENGINE)
    casts = MICRO_STEPS * gathers * (4 + 2) * numel  # the shard is read, full parameters written
    first = (2 + 4) * numel  # the gradient is read, its sum written
    later = (MICRO_STEPS - 1) * (2 + 4) * numel  # what is added to counts once
    assert casts + first + later <= found <= 1.1 * (casts + first + later)
