"""What must be equal bit for bit, and weights that change between uses.

The body of each test runs on four ranks, two on each of two nodes.
"""

from __future__ import annotations

from typing import Any

import torch
from support.bodies import (
    NUM_UNITS,
    RANKS_PER_NODE,
    Stack,
    calls,
    expect_gradients,
    expect_step,
    fail_text,
    make,
    on_ranks,
    points,
    shard,
    train_alone,
    twins,
    value_of,
)
from support.models import batch, loss, make_gpt
from torch import nn

import torch_mics as mics

# --- exactness ------------------------------------------------------------------------------------


@on_ranks(cases=[True, False])
def test_gathered_parameters_are_bitwise_those_before_sharding(world, hierarchical):
    def make_odd() -> Stack:
        model = make(Stack)
        with torch.no_grad():
            special = [float("nan"), float("-inf"), -0.0, 1e-42, 3.4e38]
            model.layers[1].spare.weight.view(-1)[:5] = torch.tensor(special)
            model.embed.weight.view(-1)[-5:] = torch.tensor(special)
        return model

    if hierarchical and world.partition_size <= RANKS_PER_NODE:
        hierarchical = "auto"
    plain = make_odd()
    model = shard(world, make_odd(), hierarchical_gather=hierarchical)
    seen: dict[str, torch.Tensor] = {}

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        for name, parameter in module.named_parameters(recurse=False):
            seen[f"{names[module]}.{name}"] = parameter.detach().clone()

    names = {module: name for name, module in model.named_modules()}
    for module in model.modules():
        module.register_forward_hook(keep, prepend=True)
    model(points(world.rank))
    right = dict(plain.named_parameters())
    assert set(seen) == set(right)
    for name, value in right.items():
        assert torch.equal(seen[name].view(torch.int32), value.detach().view(torch.int32)), name


class Linear(nn.Module):
    """Values and gradients are small integers: every sum of them is exact in fp32."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(2))
        self.head = nn.Linear(5, 3)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randint(-2, 3, parameter.shape))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def integers(rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(-3, 4, (4, 5), generator=generator).float()


@on_ranks()
def test_flat_and_hierarchical_gradients_are_exact_where_sums_are(world):
    plain = make(Linear)
    train_alone(plain, lambda model, rank: model(integers(rank)).sum())
    assert all(p.grad.count_nonzero() > 0 for p in plain.parameters())
    variants = (True, False) if world.partition_size > RANKS_PER_NODE else (False,)
    for hierarchical in variants:
        model = shard(world, make(Linear), hierarchical_gather=hierarchical)
        model(integers(world.rank)).sum().backward()
        # Both are the exact sum, and so bitwise equal.
        expect_gradients(world, model, plain, limit=0.0)


@on_ranks()
def test_two_runs_give_the_same_bits(world):
    runs = []
    for _ in range(2):
        model = mics.shard_model(make_gpt(tied=True), mesh=world.mesh)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses = []
        for step in range(3):
            value = loss(model, batch(step, 0, world.rank))
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(value.item())
        runs.append((losses, [p.to_local().clone() for p in model.parameters()]))
    assert runs[0][0] == runs[1][0]
    assert len(set(runs[0][0])) == 3
    assert all(torch.equal(*pair) for pair in zip(runs[0][1], runs[1][1], strict=True))


# --- changed weights and full parameters ----------------------------------------------------------


def change_by_step(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    for parameter in model.parameters():
        parameter.grad = None


@torch.no_grad()
def change_by_copy(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.copy_(parameter - 0.5)


@torch.no_grad()
def change_by_local_copy(model: nn.Module) -> None:
    for parameter in model.parameters():
        local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        local.copy_(local - 0.5)


def change_by_load(model: nn.Module) -> None:
    state = {name: value.clone() - 0.5 for name, value in model.state_dict().items()}
    model.load_state_dict(state)


@torch.no_grad()
def change_by_full_load(model: nn.Module) -> None:
    if not isinstance(model, mics.MiCSModule):
        change_by_copy(model)
        return
    state = mics.full_state_dict(model)
    mics.load_full_state_dict(model, {name: value - 0.5 for name, value in state.items()})


@torch.no_grad()
def change_by_writeback(model: nn.Module) -> None:
    if not isinstance(model, mics.MiCSModule):
        change_by_copy(model)
        return
    with mics.unsharded(model, writeback=True):
        change_by_copy(model)


CHANGES = {
    "optimizer.step": change_by_step,
    "copy_": change_by_copy,
    "to_local": change_by_local_copy,
    "load_state_dict": change_by_load,
    "load_full_state_dict": change_by_full_load,
    "unsharded": change_by_writeback,
}


@on_ranks(cases=list(CHANGES))
def test_changed_weight_is_never_missed_where_the_full_one_is_kept(world, how):
    model, plain = twins(world, Stack, reshard_after_forward=False)
    model.set_reshard_after_backward(False)
    outputs = [model(points(world.rank))]
    assert calls(model, "gather/intra") == NUM_UNITS
    # Nobody knows whether a weight was written in between.
    model(points(world.rank))
    assert calls(model, "gather/intra") == 2 * NUM_UNITS
    for _ in range(2):
        for each in (model, plain):
            CHANGES[how](each)
        outputs.append(model(points(world.rank)))
        assert torch.equal(outputs[-1], plain(points(world.rank)))
        assert not torch.equal(outputs[-1], outputs[-2])
    expect_step(world, model, plain)


@on_ranks(cases=[(kept, unit) for kept in (True, False) for unit in ("root", "layer")])
def test_backward_over_weights_changed_since_forward_raises(world, case):
    kept, unit = case
    model, plain = twins(world, Stack, reshard_after_forward=not kept)
    sharded = list(model.parameters())
    value = value_of(model, world.rank)
    weight = "head.weight" if unit == "root" else "layers.1.up.weight"
    for each in (model, plain):
        with torch.no_grad():
            each.get_parameter(weight).mul_(2)
    assert "modified by an inplace operation" in fail_text(value.backward)
    assert all(parameter.grad is None for parameter in sharded)
    # The next step is right.
    expect_step(world, model, plain)


@on_ranks()
def test_full_parameter_used_after_forward_names_its_unit(world):
    model = shard(world, make(Stack))
    kept: list[torch.Tensor] = []
    up = model.layers[1].up
    up.register_forward_hook(lambda module, args, output: kept.append(module.weight))
    value = value_of(model, world.rank)
    for use in (lambda: kept[0] + 1, lambda: kept[0].detach().clone(), lambda: up(kept[0])):
        text = fail_text(use)
        assert "unsharded" in text or "inside the unit's forward" in text
        assert '"layers.1"' in text
    assert "may only be used while their unit is unsharded" in fail_text(lambda: kept[0] + 1)
    value.backward()
    assert all(p.grad is not None for p in model.parameters())
