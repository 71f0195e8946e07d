"""What happens between a forward and its backward, and who calls what: as in one process.

Parameters are frozen and unfrozen while a graph is alive, references are evaluated, children are called
without the root, parts of a unit by others than the unit.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.bodies import (
    WORLD,
    Stack,
    expect_gradients,
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

# --- requires_grad while a graph is alive ---------------------------------------------------------


@contextmanager
def frozen(parameters: Any) -> Iterator[None]:
    """As peft's disable_adapter(): requires_grad is taken away and given back."""
    chosen = [p for p in parameters if p.requires_grad]
    for p in chosen:
        p.requires_grad_(False)
    yield
    for p in chosen:
        p.requires_grad_(True)


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
    by_children(model, world.rank).backward()
    train_alone(plain, by_children)
    expect_gradients(world, model, plain)
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
    by_children(model, world.rank).backward()
    train_alone(plain, by_children)
    expect_gradients(world, model, plain)
    # And the root afterwards.
    model.zero_grad()
    plain.zero_grad()
    value_of(model, world.rank).backward()
    train_alone(plain, value_of)
    expect_gradients(world, model, plain)


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


# --- parts of a unit, called or read by others ----------------------------------------------------


class Readers(nn.Module):
    """Reads and calls parts of its children in every way but their forwards."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(7, 6)
        self.positions = nn.Embedding(5, 6)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(2))
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 7)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        x = x + self.attention(x, x, x, need_weights=False)[0]
        for layer in self.layers:
            x = x + layer[0](x)  # a child of the unit, not the unit
        x = F.layer_norm(x, (6,), self.norm.weight, self.norm.bias)
        return F.linear(x, self.head.weight, self.head.bias) + x @ self.tokens.weight.t()


def ids_of(rank: int) -> torch.Tensor:
    return torch.randint(7, (2, 4), generator=torch.Generator().manual_seed(rank))


def readers_value(model: Any, rank: int) -> torch.Tensor:
    return F.cross_entropy(model(ids_of(rank)).flatten(0, 1), ids_of(rank + 9).flatten())


UNITS: dict[str, Any] = {
    "auto": "auto",
    "linears": {nn.Linear},
    "size": 30,
    "embeddings": {nn.Embedding, nn.LayerNorm},
    "predicate": lambda module: isinstance(
        module, nn.Linear | nn.Embedding | nn.MultiheadAttention
    ),
}


@on_ranks(4, 2, cases=list(UNITS))
def test_units_whose_parameters_others_use_train_as_one_process(world, name):
    model = mics.shard_model(make(Readers), units=UNITS[name], mesh=world.mesh)
    plain = make(Readers)
    for options in ({}, {"keep": "full"}):
        if options:
            model.set_keep_between_microsteps("full")
        for micro_step in range(2):
            with mics.microbatch(model, is_last=micro_step == 1):
                (readers_value(model, world.rank) / 2).backward()
            train_alone(plain, readers_value, 2)
        expect_gradients(world, model, plain)
        for each in (model, plain):
            torch.optim.SGD(each.parameters(), lr=0.1).step()
            each.zero_grad()
        with torch.no_grad():
            torch.testing.assert_close(model(ids_of(1)), plain(ids_of(1)))


@on_ranks(4, 2)
def test_recomputed_blocks_may_read_the_parameters_of_others(world):
    class Net(Readers):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.tokens(ids)
            for layer in self.layers:

                def block(x: torch.Tensor, layer: nn.Module = layer) -> torch.Tensor:
                    return x + layer(x) @ self.head.weight.t() @ self.head.weight

                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
            return self.head(x)

    model = mics.shard_model(make(Net), mesh=world.mesh)
    plain = make(Net)
    for _ in range(2):
        readers_value(model, world.rank).backward()
        train_alone(plain, readers_value)
        expect_gradients(world, model, plain)


class Chunked(nn.Module):
    """A body, and [norm, head] that the loop may call in chunks."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.tokens = nn.Embedding(7, 6)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 7, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, ids: torch.Tensor, with_head: bool = True) -> torch.Tensor:
        x = self.tokens(ids)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.head(self.norm(x)) if with_head else x


def chunked_value(model: Any, rank: int) -> torch.Tensor:
    """The head outside of the root's forward, chunk by chunk."""
    hidden = model(ids_of(rank), with_head=False)
    targets = ids_of(rank + 9)
    losses = [
        F.cross_entropy(model.head(model.norm(part)).flatten(0, 1), target.flatten())
        for part, target in zip(hidden.split(1), targets.split(1), strict=True)
    ]
    return torch.stack(losses).mean()


def norm_without_grad(model: Any, rank: int) -> torch.Tensor:
    value = chunked_value(model, rank)
    with torch.no_grad():
        model.norm(torch.ones(1, 6))
        model.head(torch.ones(1, 6))
    return value + model(ids_of(rank)).square().mean()


@on_ranks(4, 2, cases=[(tied, v) for tied in (False, True) for v in ("chunked", "no_grad")])
def test_modules_of_a_group_may_run_alone_outside_the_root(world, case):
    tied, which = case
    value: Callable[[Any, int], torch.Tensor] = {
        "chunked": chunked_value,
        "no_grad": norm_without_grad,
    }[which]
    model = mics.shard_model(make(Chunked, tied), mesh=world.mesh)
    plain = make(Chunked, tied)
    for _ in range(2):
        for micro_step in range(2):
            with mics.microbatch(model, is_last=micro_step == 1):
                (value(model, world.rank) / 2).backward()
            train_alone(plain, value, 2)
        expect_gradients(world, model, plain)
        for each in (model, plain):
            torch.optim.SGD(each.parameters(), lr=0.1).step()
            each.zero_grad()


@on_ranks(2)
def test_part_of_a_unit_outside_of_any_forward_is_refused_by_name(world):
    model, _ = twins(world, Stack)
    model(points(0))
    with pytest.raises(RuntimeError, match=r'got a call of Linear while its unit "layers\.0" is'):
        model.layers[0].up(torch.ones(1, 6))


# --- outputs, and backward inside forward ---------------------------------------------------------


class Hidden:
    """An object in which nobody would look for a tensor."""

    __slots__ = ("get",)

    def __init__(self, value: torch.Tensor) -> None:
        self.get = lambda: value


class Plain:
    def __init__(self, value: torch.Tensor) -> None:
        self.inner = {"value": value}


OUTPUTS: dict[str, tuple[Callable[[torch.Tensor], Any], Callable[[Any], torch.Tensor]]] = {
    "namespace": (lambda x: types.SimpleNamespace(value=x), lambda out: out.value),
    "object": (Plain, lambda out: out.inner["value"]),
    "closure": (Hidden, lambda out: out.get()),
    "nested": (lambda x: [{"a": (Plain(x),)}], lambda out: out[0]["a"][0].inner["value"]),
    "generator": (lambda x: iter([x]), lambda out: next(out)),
}


class Opaque(Stack):
    kind = "namespace"

    def forward(self, x: torch.Tensor) -> Any:
        return OUTPUTS[self.kind][0](super().forward(x))


def opaque_value(model: Any, rank: int) -> torch.Tensor:
    return OUTPUTS[model.kind][1](model(points(rank))).square().mean()


@on_ranks(4, 2, cases=list(OUTPUTS))
def test_outputs_of_any_kind_lead_to_gradients(world, kind):
    for has_units in (True, False):
        model, plain = make(Opaque), make(Opaque)
        model = shard(world, model) if has_units else mics.fully_shard(model, mesh=world.mesh)
        model.kind = plain.kind = kind
        for _ in range(2):
            for micro_step in range(2):
                with mics.microbatch(model, is_last=micro_step == 1):
                    (opaque_value(model, world.rank) / 2).backward()
                train_alone(plain, opaque_value, 2)
            expect_gradients(world, model, plain)
            for each in (model, plain):
                torch.optim.SGD(each.parameters(), lr=0.1).step()
                each.zero_grad()


class SelfTraining(Stack):
    """Runs backward in its own forward, and goes on with its parameters."""

    returns = "nothing"
    scale = 1.0

    def forward(self, x: torch.Tensor) -> Any:
        loss = super().forward(x).square().mean() * self.scale
        loss.backward()
        with torch.no_grad():
            after = self.head(self.run_layers(self.embed(x)))
        if self.returns == "nothing":
            return None
        return loss if self.returns == "loss" else after


@on_ranks(4, 2, cases=["nothing", "loss", "output"])
def test_backward_may_run_inside_the_forward_of_the_root(world, returns):
    model, plain = twins(world, SelfTraining)
    plain.scale = 1 / WORLD
    model.returns = plain.returns = returns
    for _ in range(3):
        outputs = [model(points(world.rank))]
        right = [plain(points(rank)) for rank in range(WORLD)]
        if returns == "output":
            torch.testing.assert_close(outputs[0], right[world.rank])
        expect_gradients(world, model, plain)
        for each in (model, plain):
            torch.optim.SGD(each.parameters(), lr=0.1).step()
            each.zero_grad()


@on_ranks(4, 2)
def test_gradient_penalty_needs_parameters_that_stay(world):
    """A gradient of a gradient uses weights outside of any backward of their unit."""

    class Penalised(Stack):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.requires_grad_(True)
            out = super().forward(x)
            (by_input,) = torch.autograd.grad(out.sum(), x, create_graph=True)
            return out + by_input.square().sum()

    kept = {"reshard_after_forward": False, "keep_between_microsteps": "full"}
    model, plain = twins(world, Penalised, **kept)
    for _ in range(2):
        value_of(model, world.rank).backward()
        train_alone(plain, value_of)
        expect_gradients(world, model, plain, 2e-6)
    model, _ = twins(world, Penalised)
    with pytest.raises(RuntimeError, match='got a use of unit "layers'):
        value_of(model, world.rank).backward()
    model.reset()
