"""torch_mics.optim: torch's numbers bit for bit, with a few operations per unit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from support.bodies import Stack, World, make, on_ranks, points, shard
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
from support.races import watched
from support.values import assert_same
from torch import nn
from torch.distributed.tensor import DTensor

from torch_mics import _C
from torch_mics._unit import units_of

# --- numbers --------------------------------------------------------------------------------------


@on_ranks(1, 2, 4, cases=OPTIONS)
def test_numbers_are_those_of_torch(world: World, case: tuple[str, dict[str, Any]]):
    # Every second step leaves some parameters without a gradient, so the counts of steps differ.
    found, right = step_twins(world, *case)
    assert_same(found, right)


@on_ranks(2, cases=[OPTIONS[i] for i in (0, 2, 6)])
def test_parameter_groups_have_options_of_their_own(world: World, case: tuple[str, dict[str, Any]]):
    assert_same(*step_twins(world, *case, params=by_dimension))


@on_ranks(2, 4)
def test_double_precision(world: World):
    assert_same(*step_twins(world, "AdamW", {}, prepare=nn.Module.double))


@on_ranks(1, 2, cases=[{}, {"weight_decay": 0.3, "amsgrad": True, "maximize": True}])
def test_fused_numbers_are_those_of_torchs_fused_kernel(world: World, options: dict[str, Any]):
    # The kernel rounds an element by where it lies in a vector register, so the last bits may differ.
    found, right = step_twins(world, "AdamW", {"fused": True, **options}, params=by_dimension)
    assert found.keys() == right.keys()
    for name, value in right.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-8, check_dtype=True)
    unfused, _ = step_twins(world, "AdamW", {"fused": False, **options}, params=by_dimension)
    for name, value in unfused.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


@on_ranks(2)
def test_fused_step_is_one_launch_and_leaves_the_scaler_its_work(world: World):
    model = shard(world, make(Stack))
    optimizer = ours("AdamW", model.parameters(), fused=True)
    model(points(world.rank, 0)).square().mean().backward()
    optimizer.step()  # makes the state
    with watched() as detector:
        optimizer.step()
    moved = detector.moved_nbytes
    assert "aten::_fused_adamw_" in moved
    assert moved["aten::_fused_adamw_"] > 4 * (sum(moved.values()) - moved["aten::_fused_adamw_"])
    nbytes = sum(parameter.to_local().nbytes for parameter in model.parameters())
    aligned = sum(unit.shard.nbytes for unit in units_of(model))
    # Parameter, gradient and two states; what is written was counted when it was read.
    assert 4 * nbytes <= moved["aten::_fused_adamw_"] <= 4 * aligned
    assert not getattr(optimizer, "_step_supports_amp_scaling", False)


@on_ranks(2)
def test_frozen_parameters_are_left_alone(world: World):
    def freeze(model: nn.Module) -> None:
        for layer in model.layers:
            layer.up.bias.requires_grad_(False)

    for name, options in (OPTIONS[0], OPTIONS[5]):
        assert_same(*step_twins(world, name, options, prepare=freeze))


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

    assert_same(*step_twins(world, "AdamW", {}, steps=6, between=freeze))


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

    assert_same(*results())


@on_ranks(2)
def test_gradients_that_the_user_put_there(world: World):
    def replace(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        for index, parameter in enumerate(model.parameters()):
            if parameter.grad is not None and (index + step) % 3 == 0:
                parameter.grad = parameter.grad * 2.0

    for name, options in (OPTIONS[0], OPTIONS[5]):
        assert_same(*step_twins(world, name, options, between=replace))


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

    assert_same(*step_twins(world, "AdamW", {}, between=move))


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

    assert_same(*results())


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

    assert_same(*step_twins(world, "AdamW", {}, params=body, between=change))


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
