"""The state of torch_mics.optim is torch's: saved, loaded, copied and changed alike."""

from __future__ import annotations

import copy
import tempfile
from typing import Any

import torch
import torch.distributed as dist
from support.bodies import Stack, World, fail_text, make, on_ranks, points, shard
from support.optimizers import (
    OPTIONS,
    Switched,
    backward,
    bits_of,
    by_dimension,
    ours,
    step_twins,
    theirs,
)
from support.values import assert_same, local
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, Replicate

from torch_mics.checkpoint import TrainState

# --- state ----------------------------------------------------------------------------------------


@on_ranks(2, 4)
def test_state_has_torchs_form(world: World):
    for name, options in OPTIONS:
        entries = []
        for make_optimizer in (ours, theirs):
            model = shard(world, make(Switched))
            optimizer = make_optimizer(name, model.parameters(), **options)
            backward(model, world.rank, 1)
            optimizer.step()
            state = optimizer.state_dict()
            described = {
                index: {key: describe(value) for key, value in entry.items()}
                for index, entry in state["state"].items()
            }
            groups = [{k: v for k, v in g.items() if k != "foreach"} for g in state["param_groups"]]
            entries.append((described, groups))
        assert entries[0] == entries[1]


def describe(value: torch.Tensor) -> tuple[object, ...]:
    mesh = value.device_mesh if isinstance(value, DTensor) else None
    placements = value.placements if isinstance(value, DTensor) else None
    return type(value), value.dtype, value.shape, value.stride(), mesh, placements


def _continue(world: World, name: str, options: dict[str, Any], load: Any) -> None:
    """Four steps of which the last two are another optimizer's, from the state of the first."""
    results = []
    for first, second in ((theirs, theirs), (theirs, ours), (ours, theirs)):
        model = shard(world, make(Switched))
        optimizer = first(name, by_dimension(model), **options)
        for step in range(4):
            if step == 2:
                following = second(name, by_dimension(model), **options)
                load(model, optimizer, following)
                optimizer = following
            backward(model, world.rank, step)
            optimizer.step()
            optimizer.zero_grad()
        results.append(bits_of(model, optimizer))
    for found in results[1:]:
        assert_same(found, results[0])


@on_ranks(2, cases=[OPTIONS[i] for i in (0, 2, 5)])
def test_load_state_dict_both_ways(world: World, case: tuple[str, dict[str, Any]]):
    def load(model: nn.Module, old: torch.optim.Optimizer, new: torch.optim.Optimizer) -> None:
        state = old.state_dict()
        kept = {k: {n: local(v) for n, v in e.items()} for k, e in state["state"].items()}
        new.load_state_dict(state)
        # The old optimizer must not feel what the new one does.
        for index, entry in old.state_dict()["state"].items():
            for key, value in entry.items():
                assert torch.equal(local(value), kept[index][key])

    _continue(world, *case, load)


@on_ranks(4, cases=[OPTIONS[i] for i in (0, 5)])
def test_optimizer_state_dict_functions_both_ways(world: World, case: tuple[str, dict[str, Any]]):
    for options in (None, StateDictOptions(full_state_dict=True)):

        def load(
            model: nn.Module,
            old: torch.optim.Optimizer,
            new: torch.optim.Optimizer,
            options: StateDictOptions | None = options,
        ) -> None:
            state = get_optimizer_state_dict(model, old, options=options)
            set_optimizer_state_dict(model, new, copy.copy(state), options=options)

        _continue(world, *case, load)


@on_ranks(2, cases=[OPTIONS[i] for i in (2, 5)])
def test_checkpoints_both_ways(world: World, case: tuple[str, dict[str, Any]]):
    with tempfile.TemporaryDirectory() as directory:
        path = world.gather(directory)[0]
        number = iter(range(10))

        def load(model: nn.Module, old: torch.optim.Optimizer, new: torch.optim.Optimizer) -> None:
            place = f"{path}/{next(number)}"
            TrainState(model, old).save(place)
            TrainState(model, new).load(place)

        _continue(world, *case, load)
        dist.barrier()


@on_ranks(2)
def test_a_checkpoint_loads_into_an_optimizer_that_has_stepped(world: World):
    with tempfile.TemporaryDirectory() as directory:
        path = world.gather(directory)[0] + "/checkpoint"
        model = shard(world, make(Switched))
        optimizer = ours("AdamW", model.parameters())
        results = []
        # Ours to ours, and the second time over a state of its own.
        for attempt in range(2):
            if attempt == 0:
                backward(model, world.rank, 0)
                optimizer.step()
                optimizer.zero_grad()
                TrainState(model, optimizer).save(path)
            else:
                TrainState(model, optimizer).load(path)
            for step in (1, 2):
                backward(model, world.rank, step)
                optimizer.step()
                optimizer.zero_grad()
            results.append(bits_of(model, optimizer))
        assert_same(results[1], results[0])
        dist.barrier()


@on_ranks(2)
def test_state_that_the_user_changes_is_used(world: World):
    def change(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        weight, bias = model.head.weight, model.head.bias
        if step == 1:
            optimizer.state[weight]["exp_avg"] = torch.zeros_like(weight)
            optimizer.state[bias]["exp_avg_sq"].mul_(4.0)
        if step == 2:
            del optimizer.state[weight]
            optimizer.state[bias] = {}
            optimizer.state[model.embed.bias]["step"].fill_(9.0)

    found, right = step_twins(world, "AdamW", {}, steps=4, between=change)
    assert right["embed.bias step"] == 11
    assert_same(dict(sorted(found.items())), dict(sorted(right.items())))


@on_ranks(2)
def test_a_copy_trains_on_alike(world: World):
    model = shard(world, make(Switched))
    optimizer = ours("SGD", model.parameters(), lr=0.1, momentum=0.9)
    backward(model, world.rank, 0)
    optimizer.step()
    other = ours("SGD", model.parameters(), lr=0.1, momentum=0.9)
    other.__setstate__(optimizer.__getstate__())
    assert other.state is optimizer.state
    other.step()
    assert set(other.state[model.head.weight]) == {"momentum_buffer"}


# --- errors ---------------------------------------------------------------------------------------


@on_ranks(2)
def test_state_that_is_cut_otherwise_is_refused(world: World):
    model = shard(world, make(Stack))
    optimizer = ours("AdamW", model.parameters())
    for step in range(2):
        model(points(world.rank, step)).square().mean().backward()
        if step == 0:
            optimizer.step()
    weight = model.head.weight
    state = optimizer.state[weight]
    state["exp_avg"] = state["exp_avg"].redistribute(placements=[Replicate(), Replicate()])
    text = fail_text(optimizer.step, ValueError)
    assert "the gradient and the state of a sharded parameter must be cut as it is" in text
    assert "got exp_avg of (Replicate(), Replicate()) for a parameter of shape (5, 6)" in text
    state["exp_avg"] = torch.zeros(5, 6)
    assert "got exp_avg of Tensor" in fail_text(optimizer.step, ValueError)


@on_ranks(2)
def test_options_that_need_torchs_own_step_are_refused(world: World):
    model = shard(world, make(Stack))
    optimizer = ours("AdamW", model.parameters())
    optimizer.param_groups[0]["capturable"] = True
    assert "capturable must be False in torch_mics.optim" in fail_text(optimizer.step, ValueError)
