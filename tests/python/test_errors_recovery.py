"""What an exception leaves behind, and calls that differ between ranks."""

from __future__ import annotations

import pytest
import torch
from support.errors import WORLD, outcomes_of, parameters_of, sharded_gpt
from support.models import Block, batch, loss, make_gpt
from support.ranks import run_ranks
from torch import nn

import torch_mics as mics

# --- after an exception ---------------------------------------------------------------------------


class Trap(nn.Module):
    """Stands behind a block and raises when it is told to."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block
        self.raises_in = ""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.block(x)
        if self.raises_in == "forward":
            raise ArithmeticError("the user's own")
        if self.raises_in == "backward" and x.requires_grad:
            x.register_hook(self._fail)
        return x

    def _fail(self, gradient: torch.Tensor) -> None:
        raise ArithmeticError("the user's own")


def _train_past_an_exception(
    rank: int, raises_in: str, remedy: str, shard_size: int, micro_step: bool
) -> tuple[list[float], list[torch.Tensor]]:
    model = make_gpt()
    trap = model.blocks[1] = Trap(model.blocks[1])
    mics.shard_model(model, units={Block, nn.Embedding}, shard_size=shard_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(4):
        if step == 2 and raises_in:
            trap.raises_in = raises_in
            with mics.microbatch(model, is_last=not micro_step), pytest.raises(ArithmeticError):
                loss(model, batch(7, 7, rank)).backward()
            trap.raises_in = ""
            if remedy == "reset":
                model.reset()
            elif remedy == "zero_grad":
                optimizer.zero_grad()
        value = loss(model, batch(step, 0, rank))
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
    return losses, parameters_of(model)


@pytest.fixture(scope="module")
def never_failed() -> dict[int, list[tuple[list[float], list[torch.Tensor]]]]:
    return {
        p: run_ranks(WORLD, _train_past_an_exception, "", "", p, False, ranks_per_node=2)
        for p in (2, 4)
    }


@pytest.mark.parametrize("shard_size", [2, 4])
@pytest.mark.parametrize(
    ("raises_in", "remedy", "micro_step"),
    [
        ("forward", "", False),
        ("forward", "reset", False),
        ("forward", "", True),
        ("backward", "reset", False),
        ("backward", "reset", True),
    ],
)
def test_exception_on_all_ranks_leaves_the_next_step_bitwise_right(
    raises_in: str,
    remedy: str,
    micro_step: bool,
    shard_size: int,
    never_failed: dict[int, list[tuple[list[float], list[torch.Tensor]]]],
):
    results = run_ranks(
        WORLD, _train_past_an_exception, raises_in, remedy, shard_size, micro_step, ranks_per_node=2
    )
    for (losses, parameters), (right_losses, right) in zip(
        results, never_failed[shard_size], strict=True
    ):
        assert losses == right_losses
        assert all(torch.equal(a, b) for a, b in zip(parameters, right, strict=True))


def _state_after_an_exception(rank: int, raises_in: str) -> dict[str, bool]:
    model = make_gpt()
    trap = model.blocks[1] = Trap(model.blocks[1])
    mics.shard_model(model, units={Block, nn.Embedding}, shard_size=2)
    loss(model, batch(0, 0, rank)).backward()
    gradients = [p.grad.full_tensor().clone() for p in model.parameters()]
    before = parameters_of(model)
    trap.raises_in = raises_in
    with pytest.raises(ArithmeticError):
        loss(model, batch(1, 0, rank)).backward()
    model.reset()
    after = [parameter.grad for parameter in model.parameters()]
    return {
        "no block holds full parameters": not any(
            p.shape == p.detach().to_local().shape
            for p in trap.block.parameters()
            if p.shape[0] > 1
        ),
        "parameters are as they were": all(map(torch.equal, before, parameters_of(model))),
        "gradients are as they were": all(
            now is not None and torch.equal(now.full_tensor(), then)
            for now, then in zip(after, gradients, strict=True)
        ),
    }


@pytest.mark.parametrize("raises_in", ["forward", "backward"])
def test_reset_after_an_exception_leaves_shards_and_visible_gradients(raises_in: str):
    results = run_ranks(WORLD, _state_after_an_exception, raises_in)
    for facts in results:
        assert all(facts.values()), facts


# --- calls that do not match ----------------------------------------------------------------------


def _make_different_calls(rank: int) -> None:
    model = sharded_gpt()
    if rank == 1:
        mics.load_full_state_dict(model, make_gpt(blocks=2).state_dict())
    else:
        model(batch(0, 0, rank)[0])


def test_different_calls_on_different_ranks_end_within_seconds():
    outcomes = outcomes_of(_make_different_calls)
    for outcome in outcomes:
        assert outcome.error_type is not None
        assert "a call of load_full_state_dict" in str(outcome.error_text)
        assert "the sharded model" in str(outcome.error_text)
