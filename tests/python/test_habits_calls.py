"""Who calls and reads what, what comes out, and backward inside forward: as in one process."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
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
from torch import nn

import torch_mics as mics

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
        expect_step(world, model, plain, readers_value)


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
        expect_step(world, model, plain, limit=2e-6)
    model, _ = twins(world, Penalised)
    with pytest.raises(RuntimeError, match='got a use of unit "layers'):
        value_of(model, world.rank).backward()
    model.reset()
