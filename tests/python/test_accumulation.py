"""Forwards, backwards, micro-steps and boundaries, compared with a single process."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from support.bodies import (
    NUM_UNITS,
    WORLD,
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

import torch_mics as mics

MICRO_STEPS = 3


# --- boundaries -----------------------------------------------------------------------------------


def part_of(model: nn.Module, rank: int, step: int) -> torch.Tensor:
    return model(points(rank, step)).square().mean() / MICRO_STEPS


def accumulate_alone(model: nn.Module, first: int = 0) -> None:
    for step in range(first, first + MICRO_STEPS):
        train_alone(model, functools.partial(part_of, step=step))


@contextlib.contextmanager
def micro_step(model: Any, how: str, is_last: bool) -> Iterator[None]:
    """One micro-step; only the last is a boundary, but under "plain" each is."""
    if how == "microbatch":
        with mics.microbatch(model, is_last=is_last):
            yield
    elif how == "no_sync":
        with contextlib.nullcontext() if is_last else model.no_sync():
            yield
    else:
        if how != "plain":
            getattr(model, how)(is_last)
        yield


def accumulate(model: Any, rank: int, how: str = "microbatch", first: int = 0) -> None:
    for step in range(first, first + MICRO_STEPS):
        with micro_step(model, how, step == first + MICRO_STEPS - 1):
            part_of(model, rank, step).backward()


def local_gradients(model: nn.Module) -> list[torch.Tensor | None]:
    return [None if p.grad is None else p.grad.to_local().clone() for p in model.parameters()]


def same_bits(left: list[torch.Tensor | None], right: list[torch.Tensor | None]) -> bool:
    pairs = list(zip(left, right, strict=True))
    return all(torch.equal(a, b) for a, b in pairs if a is not None and b is not None) and all(
        (a is None) == (b is None) for a, b in pairs
    )


HOW = ("microbatch", "no_sync", "set_requires_gradient_sync", "set_requires_all_reduce")


@on_ranks()
def test_ways_to_accumulate_give_the_same_bits_and_one_hop_2(world):
    plain = make(Stack)
    accumulate_alone(plain)
    found = []
    for how in HOW:
        model = shard(world, make(Stack))
        for step in range(MICRO_STEPS):
            assert all(p.grad is None for p in model.parameters()), how
            assert calls(model, "replicate") == 0, how
            with micro_step(model, how, step == MICRO_STEPS - 1):
                part_of(model, world.rank, step).backward()
        expect_gradients(world, model, plain)
        assert calls(model, "reduce/intra") == MICRO_STEPS * NUM_UNITS, how
        assert calls(model, "replicate") == (NUM_UNITS if world.partition_size < WORLD else 0), how
        found.append(local_gradients(model))
    assert all(same_bits(found[0], other) for other in found[1:])
    assert any(g.count_nonzero() > 0 for g in found[0])


@on_ranks()
def test_plain_loop_adds_up_with_a_boundary_in_every_backward(world):
    model, plain = twins(world, Stack)
    for step in range(MICRO_STEPS):
        part_of(model, world.rank, step).backward()
        assert all(p.grad is not None for p in model.parameters())
        train_alone(plain, functools.partial(part_of, step=step))
        expect_gradients(world, model, plain)
    expected = MICRO_STEPS * NUM_UNITS if world.partition_size < WORLD else 0
    assert calls(model, "replicate") == expected


@on_ranks(2, cases=[*HOW, "plain"])
def test_gradients_add_up_over_boundaries_without_zero_grad(world, how):
    model, plain = twins(world, Stack)
    accumulate(model, world.rank, how)
    accumulate_alone(plain)
    before = local_gradients(model)
    for step in (3, 4, 5):
        with micro_step(model, how, step == 5):
            part_of(model, world.rank, step).backward()
        if step < 5 and how != "plain":
            assert same_bits(local_gradients(model), before)
    accumulate_alone(plain, first=3)
    expect_gradients(world, model, plain)


@on_ranks(cases=[True, False, "optimizer"])
def test_zero_grad_begins_a_new_sum(world, set_to_none):
    model, plain = twins(world, Stack)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for first in (0, 3):
        if set_to_none == "optimizer":
            optimizer.zero_grad(set_to_none=False)
        else:
            model.zero_grad(set_to_none=set_to_none)
        if first > 0:
            assert all((p.grad is None) == (set_to_none is True) for p in model.parameters())
        accumulate(model, world.rank, first=first)
    accumulate_alone(plain, first=3)
    expect_gradients(world, model, plain)


@on_ranks()
def test_zero_grad_inside_an_accumulation_drops_it(world):
    model, plain = twins(world, Stack)
    with mics.microbatch(model, is_last=False):
        part_of(model, world.rank, 9).backward()
    model.zero_grad()
    accumulate(model, world.rank)
    accumulate_alone(plain)
    expect_gradients(world, model, plain)


@on_ranks(cases=["tensor", "tensor inside an accumulation", "some None", "in place"])
def test_gradient_that_the_user_changed_is_part_of_the_sum(world, how):
    model, plain = twins(world, Stack)

    def change(each: nn.Module) -> None:
        for i, parameter in enumerate(each.parameters()):
            if how == "in place":
                parameter.grad.mul_(2)
            elif how == "some None":
                parameter.grad = None if i % 3 == 0 else parameter.grad
            else:
                parameter.grad = parameter.grad * 3

    accumulate(model, world.rank)
    accumulate_alone(plain)
    if "inside" not in how:
        change(model)
    change(plain)
    for step in (3, 4, 5):
        with mics.microbatch(model, is_last=step == 5):
            part_of(model, world.rank, step).backward()
        if step == 3 and "inside" in how:
            change(model)
    accumulate_alone(plain, first=3)
    expect_gradients(world, model, plain)
    # And the library's own buffer is in use again after a new start.
    for each in (model, plain):
        each.zero_grad()
    accumulate(model, world.rank, first=6)
    accumulate_alone(plain, first=6)
    expect_gradients(world, model, plain)


@on_ranks(cases=HOW[:3])
def test_local_accumulation_reduces_nothing_before_the_boundary(world, how):
    model, plain = twins(world, Stack, accumulate="local")
    for step in range(MICRO_STEPS):
        assert calls(model, "reduce/intra") == 0 if step > 0 else not mics.traffic(model)
        assert all(p.grad is None for p in model.parameters())
        with micro_step(model, how, step == MICRO_STEPS - 1):
            part_of(model, world.rank, step).backward()
    accumulate_alone(plain)
    expect_gradients(world, model, plain)
    assert calls(model, "reduce/intra") == NUM_UNITS


class LayersOnRequest(Stack):
    """Runs only the layers asked for."""

    def forward(self, x: torch.Tensor, wanted: set[int]) -> torch.Tensor:
        x = self.embed(x)
        for i in sorted(wanted):
            x = self.layers[i](x)
        return self.head(x)


@on_ranks(cases=[(a, u) for a in ("two_hop", "local") for u in ("not run", "no gradient")])
def test_unit_that_the_last_micro_step_does_not_use_keeps_its_gradient(world, case):
    kind, use = case
    cls = LayersOnRequest if use == "not run" else OutputsOnRequest
    wanted = [{0, 1, 2}, {0, 2}]

    def value(model: nn.Module, rank: int, step: int) -> torch.Tensor:
        return model(points(rank, step), wanted[step]).square().mean()

    model, plain = twins(world, cls, accumulate=kind)
    for step in range(2):
        with mics.microbatch(model, is_last=step == 1):
            value(model, world.rank, step).backward()
        train_alone(plain, functools.partial(value, step=step))
    assert plain.layers[1].up.weight.grad is not None
    expect_gradients(world, model, plain)


@on_ranks()
def test_several_backwards_of_a_micro_step_are_one_boundary(world):
    model, plain = twins(world, Stack)
    values = [part_of(model, world.rank, step) for step in range(MICRO_STEPS)]
    for step, value in enumerate(values):
        model.set_is_last_backward(step == MICRO_STEPS - 1)
        assert all(p.grad is None for p in model.parameters())
        value.backward()
    accumulate_alone(plain)
    expect_gradients(world, model, plain)
    assert calls(model, "replicate") == (NUM_UNITS if world.partition_size < WORLD else 0)


@on_ranks()
def test_parameter_used_in_one_micro_step_on_one_rank_has_a_gradient(world):
    def value(model: nn.Module, rank: int, step: int) -> torch.Tensor:
        wanted = {0, 1, 2} if (rank, step) == (1, 0) else {0, 2}
        return model(points(rank, step), wanted).square().mean()

    model, plain = twins(world, OutputsOnRequest)
    for step in range(MICRO_STEPS):
        with mics.microbatch(model, is_last=step == MICRO_STEPS - 1):
            value(model, world.rank, step).backward()
        train_alone(plain, functools.partial(value, step=step))
    assert plain.layers[1].up.weight.grad is not None
    expect_gradients(world, model, plain)


# --- several forwards and backwards ---------------------------------------------------------------


@on_ranks(cases=["sum", "first first", "last first", "last first, first under no_sync"])
def test_several_forwards_before_backward_add_their_gradients(world, order):
    model, plain = twins(world, Stack)
    for _ in range(2):
        values = [model(points(world.rank, step)).square().mean() for step in range(3)]
        if order == "sum":
            sum(values).backward()
        elif order == "first first":
            for value in values:
                value.backward()
        elif order == "last first":
            for value in reversed(values):
                value.backward()
        else:
            with model.no_sync():
                values[2].backward()
                values[1].backward()
            values[0].backward()
        for step in range(3):
            train_alone(plain, lambda m, r, s=step: m(points(r, s)).square().mean())
    expect_gradients(world, model, plain)


@on_ranks()
def test_retained_graph_runs_backward_twice(world):
    model, plain = twins(world, Stack)
    value = value_of(model, world.rank)
    value.backward(retain_graph=True)
    first = model.embed.weight.grad.to_local().clone()
    value.backward()
    assert torch.equal(model.embed.weight.grad.to_local(), 2 * first)
    for _ in range(2):
        train_alone(plain, value_of)
    expect_gradients(world, model, plain)


@on_ranks(cases=["eval", "no_grad", "inference_mode"])
def test_forward_without_backward_between_forward_and_backward_changes_nothing(world, kind):
    contexts = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}

    def look(model: nn.Module) -> torch.Tensor:
        with contexts.get(kind, torch.enable_grad)():
            return model(points(world.rank, 5))

    model, plain = twins(world, Stack)
    for _ in range(2):
        value = value_of(model, world.rank)
        model.train(kind != "eval")
        assert torch.equal(look(model), look(plain))
        model.train()
        value.backward()
        train_alone(plain, value_of)
    expect_gradients(world, model, plain)


@on_ranks(cases=["no_grad", "inference_mode"])
def test_first_forward_of_all_may_be_one_without_backward(world, kind):
    model, plain = twins(world, Stack)
    with torch.no_grad() if kind == "no_grad" else torch.inference_mode():
        assert torch.equal(model(points(world.rank)), plain(points(world.rank)))
    expect_step(world, model, plain)


# --- outputs --------------------------------------------------------------------------------------


@dataclasses.dataclass
class Result:
    hidden: torch.Tensor
    extra: Any = None


Pair = collections.namedtuple("Pair", ["hidden", "extra"])
PACK: dict[str, Callable[[torch.Tensor], Any]] = {
    "dict": lambda x: {"hidden": x, "extra": None, "name": "layer"},
    "nested": lambda x: {"count": 3, "deep": [(None, [x])]},
    "dataclass": lambda x: Result(x),
    "dataclass of a tuple": lambda x: Result(torch.zeros(1), ((x,), None)),
    "tuple": lambda x: (None, x, 1.0),
    "named tuple": lambda x: Pair(x, None),
    "two tensors": lambda x: (x * 2, x * 3),
}
UNPACK: dict[str, Callable[[Any], torch.Tensor]] = {
    "dict": lambda output: output["hidden"],
    "nested": lambda output: output["deep"][0][1][0],
    "dataclass": lambda output: output.hidden,
    "dataclass of a tuple": lambda output: output.extra[0][0],
    "tuple": lambda output: output[1],
    "named tuple": lambda output: output.hidden,
    "two tensors": lambda output: output[0] - output[1],
}


class Packed(Layer):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: torch.Tensor, use_spare: bool = True) -> Any:
        return PACK[self.kind](super().forward(x))


class PackedStack(Stack):
    def __init__(self, kind: str) -> None:
        super().__init__(functools.partial(Packed, kind))
        self.kind = kind

    def run_layers(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = UNPACK[self.kind](layer(x))
        return x

    def forward(self, x: torch.Tensor) -> Any:
        return PACK[self.kind](super().forward(x))


@on_ranks(2, cases=list(PACK))
def test_outputs_in_containers_are_watched(world, kind):
    def value(model: nn.Module, rank: int) -> torch.Tensor:
        return UNPACK[kind](model(points(rank))).square().mean()

    model, plain = twins(world, PackedStack, kind)
    expect_step(world, model, plain, value)
    assert calls(model, "reduce/intra") == NUM_UNITS
    assert type(model(points(0))) is type(plain(points(0)))
