"""Recomputation and parameters without a gradient, compared with a single process."""

from __future__ import annotations

import functools

import torch
from support.bodies import (
    NUM_UNITS,
    Layer,
    OutputsOnRequest,
    Stack,
    calls,
    expect_gradients,
    expect_step,
    make,
    on_ranks,
    points,
    shard,
    train_alone,
    twins,
    value_of,
)
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    checkpoint_wrapper,
)
from torch.utils.checkpoint import checkpoint

import torch_mics as mics


@on_ranks()
def test_comparison_with_one_process_catches_wrong_gradients(world):
    model, plain = twins(world, Stack)
    expect_step(world, model, plain)

    def is_caught() -> bool:
        try:
            expect_gradients(world, model, plain)
        except AssertionError:
            return True
        return False

    weight, right = model.layers[1].up.weight, plain.layers[1].up.weight
    kept = weight.grad, right.grad
    if world.rank == 2:
        weight.grad = kept[0] * (1 + 1e-5)
    assert is_caught()
    weight.grad = None if world.rank == 1 else kept[0]
    assert is_caught()
    weight.grad, right.grad = kept[0], None
    assert is_caught()
    right.grad = kept[1]
    expect_gradients(world, model, plain)


# --- activation checkpointing ---------------------------------------------------------------------


class CheckpointedInside(Layer):
    """Recomputes what lies inside a unit."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant

    def forward(self, x: torch.Tensor, use_spare: bool = True) -> torch.Tensor:
        return checkpoint(super().forward, x, use_spare, use_reentrant=self.use_reentrant)


class CheckpointedAround(Stack):
    """Recomputes whole units, `size` of them at a time."""

    def __init__(self, size: int, use_reentrant: bool) -> None:
        super().__init__()
        self.size = size
        self.use_reentrant = use_reentrant

    def run_layers(self, x: torch.Tensor) -> torch.Tensor:
        for first in range(0, len(self.layers), self.size):
            run = nn.Sequential(*self.layers[first : first + self.size])
            x = checkpoint(run, x, use_reentrant=self.use_reentrant)
        return x


def make_checkpointed(where: str, use_reentrant: bool) -> Stack:
    if where == "inside":
        return make(Stack, functools.partial(CheckpointedInside, use_reentrant))
    sizes = {"one": 1, "two": 2, "all": 3}
    return make(CheckpointedAround, sizes[where], use_reentrant)


def count_calls(model: nn.Module, rank: int) -> tuple[int, int]:
    """Gathers and reductions of one forward and backward."""
    before = calls(model, "gather/intra"), calls(model, "reduce/intra")
    value_of(model, rank).backward()
    return calls(model, "gather/intra") - before[0], calls(model, "reduce/intra") - before[1]


@on_ranks(cases=[(w, r) for w in ("one", "two", "all", "inside") for r in (True, False)])
def test_checkpointing_keeps_gradients_and_reduces_each_unit_once(world, case):
    model = shard(world, make_checkpointed(*case))
    plain = make(Stack)
    model.train()
    expect_step(world, model, plain)
    # A second step on other weights.
    with torch.no_grad():
        for parameter in [*model.parameters(), *plain.parameters()]:
            parameter.mul_(1.5)
    model.zero_grad()
    plain.zero_grad()
    gathers, reductions = count_calls(model, world.rank)
    train_alone(plain, value_of)
    expect_gradients(world, model, plain)
    assert reductions == NUM_UNITS
    # As without checkpoints: each in forward, each layer again in backward.
    assert gathers == NUM_UNITS + 3, gathers


@on_ranks(4, cases=[(i, u) for i in CheckpointImpl for u in ("wrapper", "wrapped")])
def test_checkpoint_wrapper_before_sharding_keeps_gradients(world, case):
    impl, unit = case
    model, plain = make(Stack), make(Stack)
    for each in (model, plain):
        for i, layer in enumerate(each.layers):
            each.layers[i] = checkpoint_wrapper(layer, checkpoint_impl=impl)
    for wrapper in model.layers:
        mics.fully_shard(
            wrapper if unit == "wrapper" else wrapper._checkpoint_wrapped_module, mesh=world.mesh
        )
    mics.fully_shard(model, mesh=world.mesh)
    for _ in range(2):
        counts = count_calls(model, world.rank)
        train_alone(plain, value_of)
    expect_gradients(world, model, plain)
    assert counts == (NUM_UNITS + 3, NUM_UNITS)
    assert list(model.state_dict()) == list(make(Stack).state_dict())


@on_ranks(cases=[True, False])
def test_checkpointing_under_accumulation_keeps_gradients(world, use_reentrant):
    model, plain = shard(world, make_checkpointed("two", use_reentrant)), make(Stack)
    for micro_step in range(3):
        with mics.microbatch(model, is_last=micro_step == 2):
            value = model(points(world.rank, micro_step)).square().mean() / 3
            value.backward()
        train_alone(plain, lambda m, r, s=micro_step: m(points(r, s)).square().mean(), 3)
    expect_gradients(world, model, plain)
    assert calls(model, "reduce/intra") == 3 * NUM_UNITS


# --- parameters without a gradient ----------------------------------------------------------------


SOME_RANKS = [[], [0], [3], [1, 2], [0, 1, 2, 3]]


class SpareOnRequest(Stack):
    def forward(self, x: torch.Tensor, use_spare: bool) -> torch.Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x, use_spare=use_spare)
        return self.head(x)


@on_ranks(cases=SOME_RANKS)
def test_parameter_used_on_some_ranks_has_a_gradient_on_all_and_on_none_has_none(world, used_on):
    def value(model: nn.Module, rank: int) -> torch.Tensor:
        return model(points(rank), rank in used_on).square().mean()

    model, plain = twins(world, SpareOnRequest)
    for _ in range(2):
        model.zero_grad()
        value(model, world.rank).backward()
    train_alone(plain, value)
    assert (plain.layers[0].spare.weight.grad is None) == (not used_on)
    expect_gradients(world, model, plain)


@on_ranks(cases=[(0, [2]), (1, []), (1, [2]), (2, [0, 3])])
def test_unit_whose_output_is_used_on_some_ranks_is_reduced_on_all(world, case):
    layer, used_on = case

    def value(model: nn.Module, rank: int) -> torch.Tensor:
        wanted = {0, 1, 2} - (set() if rank in used_on else {layer})
        return model(points(rank), wanted).square().mean()

    model, plain = twins(world, OutputsOnRequest)
    expect_step(world, model, plain, value)
    # Every rank joins the reduction, whether it has a gradient or not.
    assert calls(model, "reduce/intra") == NUM_UNITS


@on_ranks()
def test_rank_that_uses_no_layer_at_all_joins_the_others(world):
    def value(model: nn.Module, rank: int) -> torch.Tensor:
        return model(points(rank), range(3) if rank == 1 else ()).square().mean()

    model, plain = twins(world, OutputsOnRequest)
    for _ in range(2):
        value(model, world.rank).backward()
        train_alone(plain, value)
    expect_gradients(world, model, plain)


class CalledTwice(Stack):
    def run_layers(self, x: torch.Tensor) -> torch.Tensor:
        for i in (0, 1, 0, 2, 2, 1):
            x = self.layers[i](x)
        return x


@on_ranks()
def test_unit_called_twice_is_reduced_once(world):
    model, plain = twins(world, CalledTwice)
    for _ in range(2):
        counts = count_calls(model, world.rank)
        train_alone(plain, value_of)
    expect_gradients(world, model, plain)
    assert counts[1] == NUM_UNITS


def frozen_names(model: Stack, what: str) -> list[str]:
    names = [name for name, _ in model.named_parameters()]
    chosen = {
        "all but a part of each unit": lambda n: "spare" not in n,
        "the first unit": lambda n: "layers.0" in n,
        "the unit between": lambda n: "layers.1" in n,
        "the last unit": lambda n: "layers.2" in n,
        "the root": lambda n: "layers" not in n,
        "all before the last": lambda n: "layers.2" not in n and "head" not in n,
        "all but one": lambda n: n != "layers.1.down.bias",
        "all but one of the root": lambda n: n != "head.bias",
    }[what]
    return [name for name in names if chosen(name)]


FROZEN = {
    # Units with a trainable parameter.
    "all but a part of each unit": 3,
    "the first unit": 3,
    "the unit between": 3,
    "the last unit": 3,
    "the root": 3,
    "all before the last": 2,
    "all but one": 1,
    "all but one of the root": 1,
}


@on_ranks(4, cases=list(FROZEN))
def test_frozen_parameters_have_no_gradient_and_the_others_have_theirs(world, what):
    model, plain = make(Stack), make(Stack)
    for each in (model, plain):
        for name in frozen_names(each, what):
            each.get_parameter(name).requires_grad_(False)
    shard(world, model)
    for _ in range(2):
        _, reductions = count_calls(model, world.rank)
        train_alone(plain, value_of)
    expect_gradients(world, model, plain)
    assert reductions == FROZEN[what]


@on_ranks(cases=[True, False])
def test_freezing_and_unfreezing_between_steps_is_followed(world, zeroes):
    model, plain = twins(world, Stack)
    for what in ("nothing", "the unit between", "all but a part of each unit", "nothing"):
        for each in (model, plain):
            frozen = [] if what == "nothing" else frozen_names(each, what)
            for name, parameter in each.named_parameters():
                parameter.requires_grad_(name not in frozen)
            if zeroes:
                each.zero_grad()
        expect_step(world, model, plain)


@on_ranks()
def test_input_of_the_first_unit_gets_its_gradient_and_needs_none(world):
    class Layers(Stack):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.run_layers(x)

    def value(model: nn.Module, rank: int) -> torch.Tensor:
        return model(points(rank).repeat(1, 2)).square().mean()

    model, plain = twins(world, Layers)
    expect_step(world, model, plain, value)
    inputs = [points(world.rank).repeat(1, 2).requires_grad_() for _ in range(2)]
    for each, x in zip((model, plain), inputs, strict=True):
        each(x).square().mean().backward()
    assert torch.equal(inputs[0].grad, inputs[1].grad)
