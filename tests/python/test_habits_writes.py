"""Weights that were written are the weights of the next forward, however they were written.

Every case trains beside one process. Many writes move no version counter: foreach and fused kernels on
DTensors, `p.data`, collectives on `p.to_local()`.
"""

from __future__ import annotations

import itertools
import os
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.bodies import WORLD, Stack, expect_gradients, on_ranks, points, twins
from torch import nn
from torch.optim.swa_utils import AveragedModel

import torch_mics as mics

STEPS = 3
MICRO_STEPS = 2

RESIDENCIES: dict[str, dict[str, Any]] = {
    "default": {},
    "no reshard": {"reshard_after_forward": False},
    "full": {"keep_between_microsteps": "full"},
    "block": {"keep_between_microsteps": "block"},
    "hpZ": {"reshard_after_forward": 2},
}

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, foreach=False),
    "SGD foreach": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, eps=1e-3, foreach=False),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=0.01, eps=1e-3, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.01, eps=1e-3, fused=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05, foreach=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, eps=1e-2, foreach=True),
    "mics.AdamW": lambda p: mics.optim.AdamW(p, lr=0.01, eps=1e-3),
    "mics.SGD": lambda p: mics.optim.SGD(p, lr=0.1),
}

ZERO_ORDERS = ["after step", "before forward", "before backward", "not to None", "by hand", "late"]


def evaluate(model: nn.Module) -> None:
    with torch.no_grad():
        model(points(9))


def zero(model: nn.Module, optimizer: torch.optim.Optimizer, order: str, place: str) -> None:
    """What the script does about gradients at `place` of a step."""
    if order == "by hand" and place == "after step":
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()
    elif order == "not to None" and place == "after step":
        optimizer.zero_grad(set_to_none=False)
    elif order == "late" and place == "after step":
        evaluate(model)
        optimizer.zero_grad()
    elif order == place:
        optimizer.zero_grad()


def losses_of(model: nn.Module, optimizer: Any, order: str, inputs: Any, scale: int) -> list[float]:
    """Trains; `inputs(step, micro_step)` gives what one micro-step is made of, `scale` their number."""
    losses = []
    is_sharded = isinstance(model, mics.MiCSModule)
    for step in range(STEPS):
        zero(model, optimizer, order, "before forward")
        total = 0.0
        for micro_step in range(MICRO_STEPS):
            if is_sharded:
                model.set_requires_gradient_sync(micro_step == MICRO_STEPS - 1)
            values = [model(x).square().mean() for x in inputs(step, micro_step)]
            if micro_step == 0:
                zero(model, optimizer, order, "before backward")
            value = torch.stack(values).sum() / (scale * MICRO_STEPS)
            value.backward()
            total += value.item()
        losses.append(total)
        optimizer.step()
        zero(model, optimizer, order, "after step")
    return losses


def check_training(world: Any, optimizer: str, order: str, residency: str) -> None:
    model, plain = twins(world, Stack, **RESIDENCIES[residency])
    mine = losses_of(
        model,
        OPTIMIZERS[optimizer](model.parameters()),
        order,
        lambda step, micro_step: [points(world.rank, 10 * step + micro_step)],
        1,
    )
    right = losses_of(
        plain,
        OPTIMIZERS[optimizer](plain.parameters()),
        order,
        lambda step, micro_step: [points(r, 10 * step + micro_step) for r in range(WORLD)],
        WORLD,
    )
    mean = [sum(of_ranks) / WORLD for of_ranks in zip(*world.gather(mine), strict=True)]
    torch.testing.assert_close(torch.tensor(mean), torch.tensor(right), rtol=1e-4, atol=1e-6)
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.full_tensor(), other, rtol=1e-3, atol=1e-5)


def table(partition_size: int) -> list[tuple[str, str, str]]:
    """Every optimizer, order and residency with MICS_WIDE=1, else each with each of the others' first."""
    residencies = [r for r in RESIDENCIES if partition_size == WORLD or r not in ("block", "hpZ")]
    cases = list(itertools.product(OPTIMIZERS, ZERO_ORDERS, residencies))
    if os.environ.get("MICS_WIDE"):
        return cases
    # Each pair of an order and a residency, with an optimizer in turn.
    names = list(OPTIMIZERS)
    pairs = itertools.product(ZERO_ORDERS, residencies)
    return [(names[(i + partition_size) % len(names)], *pair) for i, pair in enumerate(pairs)]


@on_ranks(4, cases=table(4))
def test_any_optimizer_and_any_order_of_zero_grad_train_on_new_weights(world, case):
    check_training(world, *case)


@on_ranks(2, 1, cases=table(2))
def test_any_optimizer_trains_on_new_weights_with_replicas(world, case):
    check_training(world, *case)


# --- writes by hand -------------------------------------------------------------------------------


def locals_of(model: nn.Module) -> list[torch.Tensor]:
    return [p.to_local() if hasattr(p, "to_local") else p for p in model.parameters()]


def write_data_mul(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data.mul_(0.5)


def write_data_copy(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data.copy_(parameter.data * 0.25)


def write_foreach(model: nn.Module) -> None:
    torch._foreach_mul_([p.detach() for p in model.parameters()], 0.5)


def write_foreach_parameters(model: nn.Module) -> None:
    with torch.no_grad():
        torch._foreach_add_(list(model.parameters()), 0.125)


def write_local_data(model: nn.Module) -> None:
    for local in locals_of(model):
        local.data.mul_(0.5)


def write_collective(model: nn.Module) -> None:
    with torch.no_grad():
        for local in locals_of(model):
            # Ranks hold different rows: only the sum over a group of one's own leaves them in place.
            if isinstance(model, mics.MiCSModule):
                dist.all_reduce(local, group=_alone())
            local.data.mul_(2)


def write_clamp(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data.clamp_(-0.1, 0.1)


def write_in_place(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)


def write_set_data(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data.lerp_(torch.zeros_like(parameter.data), 0.5)


_groups: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def _alone() -> Any:
    key = dist.group.WORLD
    if key not in _groups:
        made = [dist.new_group([rank]) for rank in range(WORLD)]
        _groups[key] = made[dist.get_rank()]
    return _groups[key]


WRITES = [
    write_data_mul,
    write_data_copy,
    write_foreach,
    write_foreach_parameters,
    write_local_data,
    write_collective,
    write_clamp,
    write_in_place,
    write_set_data,
]

BEFORE: dict[str, Callable[[nn.Module], object]] = {
    "nothing": lambda model: None,
    "evaluation": evaluate,
    "a forward without backward": lambda model: model(points(3)),
    "inference": lambda model: torch.inference_mode()(model)(points(9)),
    "a step": lambda model: model(points(3)).sum().backward(),
}


@on_ranks(4, 2, cases=list(BEFORE))
def test_writes_by_hand_are_seen_by_the_next_forward(world, before):
    residencies = ["default", "full"] + ["block"] * (world.partition_size == 4)
    number = list(BEFORE).index(before)
    cases = [
        (write, residency)
        for i, write in enumerate(WRITES)
        for j, residency in enumerate(residencies)
        # Else every two of the three meet.
        if "MICS_WIDE" in os.environ or (i + j + number) % len(residencies) == 0
    ]
    for write, residency in cases:
        model, plain = twins(world, Stack, **RESIDENCIES[residency])
        for each in (model, plain):
            BEFORE[before](each)
            each.zero_grad()
            evaluate(each)
            write(each)
        with torch.no_grad():
            torch.testing.assert_close(model(points(5)), plain(points(5)), msg=write.__name__)
        for each in (model, plain):
            write(each)
        torch.testing.assert_close(model(points(5)), plain(points(5)), msg=write.__name__)


@on_ranks(4, 2)
def test_teacher_that_follows_by_data_is_evaluated_as_it_is(world):
    """A teacher's update, an average of weights, the clipping of weights."""
    student, plain_student = twins(world, Stack)
    teacher, plain_teacher = twins(world, Stack)
    for step in range(3):
        for learning, following in ((student, teacher), (plain_student, plain_teacher)):
            ranks = [world.rank] if learning is student else range(WORLD)
            for rank in ranks:
                x = points(rank, step)
                with torch.no_grad():
                    target = following(x)
                loss = (learning(x) - target - 1).square().mean() / len(ranks)
                loss.backward()
        expect_gradients(world, student, plain_student)
        for learning, following in ((student, teacher), (plain_student, plain_teacher)):
            with torch.no_grad():
                for p in learning.parameters():
                    p.data.sub_(0.1 * p.grad)
                    p.data.clamp_(-0.5, 0.5)
            learning.zero_grad()
            for p, q in zip(learning.parameters(), following.parameters(), strict=True):
                q.data.mul_(0.5).add_(p.data, alpha=0.5)
    with torch.no_grad():
        torch.testing.assert_close(teacher(points(1)), plain_teacher(points(1)))


@on_ranks(4, 2)
def test_averaged_weights_are_evaluated(world):
    model, plain = twins(world, Stack)
    shown, _ = twins(world, Stack)
    average = AveragedModel(plain, use_buffers=False)
    for step in range(3):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(points(0, step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        plain_optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
        plain(points(0, step)).square().mean().backward()
        plain_optimizer.step()
        plain_optimizer.zero_grad()
        average.update_parameters(plain)
        evaluate(shown)
        # What AveragedModel does, on the sharded model's own copy.
        with torch.no_grad():
            mine = [p.detach() for p in shown.parameters()]
            new = [p.detach() for p in model.parameters()]
            torch._foreach_lerp_(mine, new, 1.0 / (step + 1))
    with torch.no_grad():
        torch.testing.assert_close(shown(points(5)), average.module(points(5)))


@on_ranks(4, 2)
def test_what_is_unsharded_by_hand_is_gathered_when_it_is_asked_for(world):
    """unshard() is a gather of the weights as they are, and spares the forward one of its own."""
    model, plain = twins(world, Stack)
    for each in (model, plain):
        evaluate(each)
        write_data_mul(each)
    model.unshard()
    before = mics.traffic(model)["gather/intra"]["calls"]
    with torch.no_grad():
        torch.testing.assert_close(model(points(5)), plain(points(5)))
    layers = len(model.layers)
    assert mics.traffic(model)["gather/intra"]["calls"] == before + layers
    model.reshard()


@on_ranks(4)
def test_kept_weights_are_gathered_once_per_accumulation(world):
    """The rule costs nothing in a training loop: one gather per unit and step."""
    model, _ = twins(world, Stack, keep_between_microsteps="full")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, foreach=True)
    for step in range(3):
        before = mics.traffic(model).get("gather/intra", {"calls": 0})["calls"]
        for micro_step in range(3):
            with mics.microbatch(model, is_last=micro_step == 2):
                model(points(world.rank, step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert mics.traffic(model)["gather/intra"]["calls"] == before + 4


@on_ranks(4, 2)
def test_backward_over_weights_that_an_optimizer_changed_is_refused_as_in_one_process(world):
    model, plain = twins(world, Stack)
    for each in (model, plain):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1, foreach=True)
        first, second = each(points(1)).square().mean(), each(points(2)).square().mean()
        first.backward()
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            second.backward()
        if each is model:
            model.reset()
