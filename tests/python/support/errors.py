"""What bad input gets: the same clear error on every rank, and nothing broken.

Functions that run on the ranks begin with an underscore; the tests say what must come of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import torch_mics as mics
from support.models import TinyGPT, make_gpt
from support.ranks import Outcome, on_each_rank, run_outcomes

WORLD = 4


def outcomes_of(function: Callable[..., Any], *args: Any, **options: Any) -> list[Outcome]:
    """Runs on four ranks."""
    return run_outcomes(WORLD, function, *args, **options)


def expect(outcomes: list[Outcome], error_type: str, *parts: str) -> None:
    """Every rank raised `error_type`, with all `parts` in its message."""
    # The core raises a ValueError of its own.
    names = {"ValueError": {"ValueError", mics._C.InvalidArgument.__name__}}
    for rank, outcome in enumerate(outcomes):
        found = outcome.error_type
        assert found in names.get(error_type, {error_type}), f"rank {rank}: {outcome}"
        for part in parts:
            assert part in str(outcome.error_text), f"rank {rank}: {outcome.error_text}"


def refused_on_each_rank(error_type: str, *parts: str) -> Callable[..., Callable[..., None]]:
    """Makes a test of `body(rank, ...)`, which must raise on every rank; see expect().

    `parts` may name arguments of the test in braces.
    """

    def check(outcomes: list[Outcome], arguments: dict[str, Any]) -> None:
        kind, *texts = (part.format(**arguments) for part in (error_type, *parts))
        expect(outcomes, kind, *texts)

    return on_each_rank(check, WORLD)


def caught(function: Callable[[], object]) -> tuple[str, str]:
    """What `function` raises: type and text; ("", "") when it returns."""
    try:
        function()
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def expect_caught(results: list[tuple[str, str]], error_type: str, *parts: str) -> None:
    """As expect(), for errors that the function caught itself."""
    expect(
        [Outcome(error_type=kind, error_text=text) for kind, text in results], error_type, *parts
    )


def sharded_gpt(shard_size: int = 2, **options: Any) -> TinyGPT:
    return mics.shard_model(make_gpt(blocks=2), shard_size=shard_size, **options)


def parameters_of(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().full_tensor().clone() for parameter in model.parameters()]
