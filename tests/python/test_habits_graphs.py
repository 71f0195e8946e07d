"""What happens between a forward and its backward: as in one process.

Parameters are frozen and unfrozen while a graph is alive, references are evaluated, children are called
without the root.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.bodies import (
    WORLD,
    Stack,
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
from support.program_habits import frozen
from torch import nn

import torch_mics as mics

# --- requires_grad while a graph is alive ---------------------------------------------------------


def reference_without_grad(model: Any) -> None:
    with frozen(model.layers.parameters()), torch.no_grad():
        model(points(5))


def reference_with_grad_mode(model: Any) -> None:
    with frozen(model.parameters()):
        assert not model(points(5)).requires_grad


def toggle_alone(model: Any) -> None:
    with frozen(model.layers[1].parameters()):
        pass


def partly_frozen_forward(model: Any) -> None:
    with frozen(model.layers[0].parameters()):
        model(points(6))


def inference(model: Any) -> None:
    with torch.inference_mode(), frozen(model.head.parameters()):
        model(points(7))


def call_child(model: Any) -> None:
    with torch.no_grad(), frozen(model.layers[2].parameters()):
        model.layers[2](torch.ones(2, 6))


BETWEEN = {
    each.__name__: each
    for each in (
        reference_without_grad,
        reference_with_grad_mode,
        toggle_alone,
        partly_frozen_forward,
        inference,
        call_child,
    )
}
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "local": {"accumulate": "local"},
    "block": {"accumulate": "block"},
    "full": {"keep_between_microsteps": "full"},
}


@on_ranks(4, 2, cases=list(BETWEEN))
def test_graph_survives_what_happens_before_its_backward(world, name):
    between = BETWEEN[name]
    for options in OPTIONS.values():
        if "block" in options.values() and world.partition_size == 2:
            continue
        model, plain = twins(world, Stack, **options)
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, plain)]
        for step in range(2):
            # Two micro-steps: the second time inside an accumulation.
            for micro_step in range(2):
                x = points(world.rank, 10 * step + micro_step)
                with mics.microbatch(model, is_last=micro_step == 1):
                    loss = model(x).square().mean()
                    between(model)
                    (loss / 2).backward()
                losses = [
                    plain(points(r, 10 * step + micro_step)).square().mean() for r in range(WORLD)
                ]
                between(plain)
                (torch.stack(losses).sum() / (2 * WORLD)).backward()
            expect_gradients(world, model, plain, 5e-6)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    with torch.no_grad():
        torch.testing.assert_close(model(points(1)), plain(points(1)))


@on_ranks(4, 2, cases=list(OPTIONS))
def test_parameters_may_be_frozen_for_good_during_an_accumulation(world, name):
    """What was accumulated before the freeze is in the gradient, what comes later is not."""
    if name == "block" and world.partition_size == 2:
        return
    model, plain = twins(world, Stack, **OPTIONS[name])
    for micro_step, change in enumerate(("nothing", "freeze", "thaw")):
        for each in (model, plain):
            if change != "nothing":
                each.layers[1].requires_grad_(change == "thaw")
                each.embed.bias.requires_grad_(change == "thaw")
        with mics.microbatch(model, is_last=micro_step == 2):
            (value_of(model, world.rank) / 3).backward()
        train_alone(plain, value_of, 3)
    expect_gradients(world, model, plain)


@on_ranks(4, 2)
def test_parameters_thaw_while_a_graph_is_alive(world):
    """Frozen from the start, and unfrozen between two forwards of one loss."""
    model, plain = make(Stack), make(Stack)
    for each in (model, plain):
        each.layers.requires_grad_(False)
    model = shard(world, model)
    first = value_of(model, world.rank)
    model.layers.requires_grad_(True)
    (first + value_of(model, world.rank)).backward()
    values = [value_of(plain, rank) for rank in range(WORLD)]
    plain.layers.requires_grad_(True)
    values += [value_of(plain, rank) for rank in range(WORLD)]
    (torch.stack(values).sum() / WORLD).backward()
    expect_gradients(world, model, plain)


@on_ranks(4, 2)
def test_generator_and_discriminator_take_turns(world):
    """The discriminator is frozen in the generator's step, as every GAN script does."""
    pairs = [twins(world, Stack) for _ in range(2)]
    for step in range(3):
        for which in (0, 1):
            generator, critic = pairs[0][which], pairs[1][which]
            ranks = [world.rank] if which == 0 else range(WORLD)
            critic.requires_grad_(False)
            for rank in ranks:
                loss = critic(generator(points(rank, step))[:, :3]).square().mean()
                (loss / len(ranks)).backward()
            critic.requires_grad_(True)
            for rank in ranks:
                with torch.no_grad():
                    fake = generator(points(rank, step + 50))[:, :3]
                loss = (critic(fake) - critic(points(rank, step))).square().mean()
                (loss / len(ranks)).backward()
        for model, plain in pairs:
            expect_gradients(world, model, plain, 5e-6)
            for each in (model, plain):
                torch.optim.SGD(each.parameters(), lr=0.05).step()
                each.zero_grad()


@on_ranks(4)
def test_ranks_that_freeze_differently_are_told(world):
    model, _ = twins(world, Stack)
    value_of(model, world.rank).backward()
    model.zero_grad()
    model.layers[int(world.rank == 0)].requires_grad_(False)
    with pytest.raises(ValueError, match="which parameters require gradients must be the same"):
        model(points(0))


# --- children without the root --------------------------------------------------------------------


def by_children(model: Any, rank: int, step: int = 0) -> torch.Tensor:
    """The root's forward, by hand; its own parameters are a unit of each child here."""
    x = model.embed(points(rank, step))
    for layer in model.layers:
        x = layer(x)
    return model.head(x).square().mean()


def shard_children(world: Any) -> Any:
    model = make(Stack)
    for child in (model.embed, *model.layers, model.head):
        mics.fully_shard(child, mesh=world.mesh)
    return mics.fully_shard(model, mesh=world.mesh)


@on_ranks(4, 2)
def test_calls_on_the_root_reach_children_that_run_without_it(world):
    model, plain = shard_children(world), make(Stack)
    with model.no_sync():
        by_children(model, world.rank, 1).backward()
    model.zero_grad()  # the micro-step above is dropped
    expect_step(world, model, plain, by_children)
    assert sum(c["calls"] for c in mics.traffic(model).values()) > 0
    assert mics.backends(model)
    assert "layers.0" not in mics.describe(model)  # each child is the root of its own report
    assert len(mics.exposed(model)) >= 2
    assert mics.memory(model)
    with model.no_sync():
        by_children(model, world.rank, 1).backward()
    model.reset()
    model.zero_grad()
    plain.zero_grad()
    model.release_memory()
    expect_step(world, model, plain, by_children)
    # And the root afterwards.
    model.zero_grad()
    plain.zero_grad()
    expect_step(world, model, plain)


class Wrapper(nn.Module):
    """Another root over the same units."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner
        self.gain = nn.Linear(5, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gain(self.inner(x))


@on_ranks(4, 2, cases=["child first", "two roots", "alternating", "local"])
def test_another_root_over_the_same_units_lets_graphs_live(world, how):
    options = {"accumulate": "local"} if how == "local" else {}
    model, plain = twins(world, Stack, **options)
    wrapped = [make(Wrapper, each) for each in (model, plain)]
    others = [make(Wrapper, each) for each in (model, plain)]
    mics.fully_shard(wrapped[0], mesh=world.mesh, **options)
    mics.fully_shard(others[0], mesh=world.mesh, **options)

    def values(which: int, rank: int) -> list[torch.Tensor]:
        inner, outer, other = (model, plain)[which], wrapped[which], others[which]
        x = points(rank)
        if how == "child first":
            return [
                inner.layers[0](torch.ones(2, 6)).square().mean(),
                inner(x).sum(),
                outer(x).sum(),
            ]
        if how == "two roots":
            return [outer(x).sum(), other(x).square().sum()]
        return [inner(x).sum(), outer(x).square().sum(), other(x).sum(), outer(x + 1).sum()]

    for _ in range(2):
        # An accumulation under one root goes on under the next.
        for each in (model, wrapped[0], others[0]):
            each.set_requires_gradient_sync(False)
        (model(points(world.rank, 7)).square().mean() / 2).backward()
        for each in (model, wrapped[0], others[0]):
            each.set_requires_gradient_sync(True)
        (torch.stack(values(0, world.rank)).sum() / 2).backward()
        for rank in range(WORLD):
            (plain(points(rank, 7)).square().mean() / (2 * WORLD)).backward()
            (torch.stack(values(1, rank)).sum() / (2 * WORLD)).backward()
        for pair in (wrapped, others):
            expect_gradients(world, pair[0], pair[1], 2e-6)
            for each in pair:
                torch.optim.SGD(each.parameters(), lr=0.01).step()
            for each in pair:
                each.zero_grad()
        with torch.no_grad():
            torch.testing.assert_close(wrapped[0](points(3)), wrapped[1](points(3)))
