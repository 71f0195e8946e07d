"""torch_mics.optim: torch's numbers bit for bit, torch's state dict, a few operations per unit."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from support.bodies import Stack, World, make, on_ranks, points, shard
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, Replicate

import torch_mics as mics
from torch_mics import _C
from torch_mics.checkpoint import TrainState

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
    """torch's, in its single-tensor form."""
    return getattr(torch.optim, name)(params, foreach=False, **options)


def ours(name: str, params: Any, **options: Any) -> torch.optim.Optimizer:
    return getattr(mics.optim, name)(params, **options)


def bits_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """This rank's parameters and states, by name."""
    found = {}
    for name, parameter in model.named_parameters():
        found[name] = local(parameter.detach())
        for key, value in optimizer.state.get(parameter, {}).items():
            found[f"{name} {key}"] = local(value)
    return found


def local(value: torch.Tensor) -> torch.Tensor:
    return (value.to_local() if isinstance(value, DTensor) else value).clone()


def expect_same(found: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(right)
    for name, value in right.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), f"{name}: {found[name]} instead of {value}"


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


# --- numbers --------------------------------------------------------------------------------------


@on_ranks(1, 2, 4, cases=OPTIONS)
def test_numbers_are_those_of_torch(world: World, case: tuple[str, dict[str, Any]]):
    # Every second step leaves some parameters without a gradient, so the counts of steps differ.
    found, right = step_twins(world, *case)
    expect_same(found, right)


@on_ranks(2, cases=[OPTIONS[i] for i in (0, 2, 6)])
def test_parameter_groups_have_options_of_their_own(world: World, case: tuple[str, dict[str, Any]]):
    expect_same(*step_twins(world, *case, params=by_dimension))


@on_ranks(2, 4)
def test_double_precision(world: World):
    expect_same(*step_twins(world, "AdamW", {}, prepare=nn.Module.double))


@on_ranks(2)
def test_frozen_parameters_are_left_alone(world: World):
    def freeze(model: nn.Module) -> None:
        for layer in model.layers:
            layer.up.bias.requires_grad_(False)

    for name, options in (OPTIONS[0], OPTIONS[5]):
        expect_same(*step_twins(world, name, options, prepare=freeze))


@on_ranks(2)
def test_freezing_between_steps_keeps_the_state(world: World):
    def freeze(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        if step == 1:
            optimizer.step()
            optimizer.zero_grad()
            model.layers[1].down.weight.requires_grad_(False)
            backward(model, world.rank, 7)
        if step == 3:
            model.layers[1].down.weight.requires_grad_(True)

    expect_same(*step_twins(world, "AdamW", {}, steps=6, between=freeze))


@on_ranks(2)
def test_schedulers_and_closures(world: World):
    def results() -> Iterator[dict[str, torch.Tensor]]:
        for make_optimizer in (ours, theirs):
            model = shard(world, make(Switched))
            optimizer = make_optimizer("AdamW", by_dimension(model), lr=0.1)
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
            for step in range(3):

                def closure(
                    step: int = step, model: Any = model, optimizer: Any = optimizer
                ) -> float:
                    optimizer.zero_grad()
                    loss = model(points(world.rank, step), step).square().mean()
                    loss.backward()
                    return loss.item()

                assert isinstance(optimizer.step(closure), float)
                scheduler.step()
            yield bits_of(model, optimizer)

    expect_same(*results())


@on_ranks(2)
def test_gradients_that_the_user_put_there(world: World):
    def replace(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        for index, parameter in enumerate(model.parameters()):
            if parameter.grad is not None and (index + step) % 3 == 0:
                parameter.grad = parameter.grad * 2.0

    for name, options in (OPTIONS[0], OPTIONS[5]):
        expect_same(*step_twins(world, name, options, between=replace))


@on_ranks(2)
def test_moving_the_model_keeps_the_state(world: World):
    def move(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        if step == 1:
            optimizer.step()
            optimizer.zero_grad()
            before = [unit.shard for unit in model._units()]
            model.double().float()
            assert all(
                unit.shard is not shard for unit, shard in zip(model._units(), before, strict=True)
            )
            backward(model, world.rank, 7)

    expect_same(*step_twins(world, "AdamW", {}, between=move))


@on_ranks(2)
def test_a_parameter_outside_any_unit_is_stepped_by_torch(world: World):
    def results() -> Iterator[dict[str, torch.Tensor]]:
        for make_optimizer in (ours, theirs):
            model = make(Switched)
            alone = model.head.bias
            options = {"ignored_params": {alone}}
            shard(world, model, **options)
            optimizer = make_optimizer("AdamW", by_dimension(model), lr=0.05)
            for step in range(3):
                backward(model, world.rank, step)
                dist.all_reduce(alone.grad)
                optimizer.step()
                optimizer.zero_grad()
            assert not isinstance(alone, DTensor)
            assert optimizer.state[alone]["step"] == 3
            yield bits_of(model, optimizer)

    expect_same(*results())


@on_ranks(2)
def test_groups_added_and_parameters_moved_between_groups(world: World):
    def change(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        if step == 1:
            optimizer.add_param_group({"params": list(model.head.parameters()), "lr": 0.2})
        if step == 2:
            moved = optimizer.param_groups[0]["params"].pop(1)
            optimizer.param_groups[1]["params"].append(moved)

    def body(model: nn.Module) -> Any:
        return [p for name, p in model.named_parameters() if not name.startswith("head")]

    expect_same(*step_twins(world, "AdamW", {}, params=body, between=change))


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
        expect_same(found, results[0])


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
        expect_same(results[1], results[0])
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
    expect_same(dict(sorted(found.items())), dict(sorted(right.items())))


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


# --- cost -----------------------------------------------------------------------------------------


@on_ranks(2, 4)
def test_a_unit_is_one_run(world: World):
    model = shard(world, make(Stack))
    optimizer = ours("AdamW", model.parameters())
    for step in range(3):
        model(points(world.rank, step)).square().mean().backward()
        with mock.patch.object(_C, "adamw_step", wraps=_C.adamw_step) as kernel:
            optimizer.step()
        assert [len(call.args[0]) for call in kernel.call_args_list] == [4]
        optimizer.zero_grad()


@on_ranks(2)
def test_a_step_is_noticed_by_the_next_forward(world: World):
    # The root keeps its full parameters after backward where it may; a change must be gathered.
    model = shard(world, make(Stack), reshard_after_forward=False)
    model.set_reshard_after_backward(False)
    optimizer = ours("SGD", model.parameters(), lr=0.5)
    x = points(0)
    before = model(x)
    before.square().mean().backward()
    optimizer.step()
    assert not torch.equal(model(x), before)


# --- errors ---------------------------------------------------------------------------------------


def raised(function: Callable[[], object]) -> str:
    try:
        function()
    except ValueError as error:
        return str(error)
    raise AssertionError("nothing was raised")


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
    text = raised(optimizer.step)
    assert "the gradient and the state of a sharded parameter must be cut as it is" in text
    assert "got exp_avg of (Replicate(), Replicate()) for a parameter of shape (5, 6)" in text
    state["exp_avg"] = torch.zeros(5, 6)
    assert "got exp_avg of Tensor" in raised(optimizer.step)


@on_ranks(2)
def test_options_that_need_torchs_own_step_are_refused(world: World):
    model = shard(world, make(Stack))
    optimizer = ours("AdamW", model.parameters())
    optimizer.param_groups[0]["capturable"] = True
    assert "capturable must be False in torch_mics.optim" in raised(optimizer.step)
