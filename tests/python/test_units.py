"""Which units shard_model() finds, and that they train as one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from support.bodies import (
    WORLD,
    Layer,
    Stack,
    calls,
    expect_gradients,
    make,
    on_ranks,
    train_alone,
    units_of,
    value_of,
)
from support.models import Block, TinyGPT, first_loss, make_gpt
from torch import nn

import torch_mics as mics


def unit_set(*units: str) -> set[frozenset[str]]:
    """Each unit is written as its names, with spaces between; the root is added."""
    return {frozenset(unit.split()) for unit in units} | {frozenset([""])}


class HuggingFaceLike(Stack):
    """Its largest ModuleList is not what it says must not be split."""

    _no_split_modules = ("Small",)

    def __init__(self) -> None:
        super().__init__()
        self.small = nn.ModuleList(make(Small) for _ in range(2))

    def run_layers(self, x: torch.Tensor) -> torch.Tensor:
        x = super().run_layers(x)
        for small in self.small:
            x = small(x)
        return x


class TiedToTheRoot(Stack):
    """A layer shares a weight with what is in no unit."""

    def __init__(self) -> None:
        super().__init__()
        layers = self._modules.pop("layers")
        self.before = nn.Linear(6, 7)
        self.before.weight = layers[1].up.weight
        self.layers = layers

    def run_layers(self, x: torch.Tensor) -> torch.Tensor:
        return super().run_layers(x + self.before(x)[..., :6])


class Nested(Stack):
    """Its layers are in lists of a list."""

    def __init__(self) -> None:
        super().__init__()
        self.groups = nn.ModuleList(nn.ModuleList(Layer() for _ in range(2)) for _ in range(2))

    def run_layers(self, x: torch.Tensor) -> torch.Tensor:
        for group in self.groups:
            for layer in group:
                x = layer(x)
        return super().run_layers(x)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x * self.weight)


def make_sequential() -> nn.Sequential:
    layers = [Layer() for _ in range(3)]
    return nn.Sequential(nn.Linear(3, 6), *layers, nn.Linear(6, 5), nn.LayerNorm(5))


GPT_BLOCKS = ("blocks.0", "blocks.1", "blocks.2")
STACK_LAYERS = ("layers.0", "layers.1", "layers.2")
UNITS: dict[str, tuple[Callable[[], Any], Any, set[frozenset[str]]]] = {
    "auto": (make_gpt, "auto", unit_set(*GPT_BLOCKS, "tokens", "positions", "norm head")),
    # The head shares its weight with the embedding: one unit, with the norm that goes with it.
    "auto, tied": (
        lambda: make_gpt(tied=True),
        "auto",
        unit_set(*GPT_BLOCKS, "positions", "tokens norm head"),
    ),
    "auto, _no_split_modules": (
        lambda: make(HuggingFaceLike),
        "auto",
        unit_set("small.0", "small.1"),
    ),
    "auto, tied to the root": (
        lambda: make(TiedToTheRoot),
        "auto",
        unit_set("layers.0", "layers.2"),
    ),
    "auto, nested lists": (
        lambda: make(Nested),
        "auto",
        unit_set(*(f"groups.{i}.{j}" for i in range(2) for j in range(2))),
    ),
    "auto, Sequential": (lambda: make(make_sequential), "auto", unit_set("1", "2", "3", "4 5")),
    "auto, one block": (lambda: make_gpt(blocks=1), "auto", unit_set("tokens", "positions")),
    "set": (make_gpt, {Block}, unit_set(*GPT_BLOCKS)),
    "set of two": (make_gpt, {Block, nn.Embedding}, unit_set(*GPT_BLOCKS, "tokens", "positions")),
    "set, nested": (
        lambda: make(Stack),
        {Layer, nn.Linear},
        unit_set(
            *STACK_LAYERS,
            *(f"layers.{i}.{part}" for i in range(3) for part in ("up", "down", "spare")),
            "embed",
            "head",
        ),
    ),
    # A tied parameter of which one module alone is a unit belongs to that unit.
    "set, tied": (lambda: make_gpt(tied=True), {Block}, unit_set(*GPT_BLOCKS)),
    "predicate": (
        lambda: make(Stack),
        lambda module: isinstance(module, nn.Linear) and module.out_features == 7,
        unit_set(*(f"{layer}.up" for layer in STACK_LAYERS)),
    ),
    # 49 parameters are an up, 48 a down, 42 a spare, 35 the head, 24 the projection.
    "int": (
        lambda: make(Stack),
        45,
        unit_set(*(f"{layer}.{part}" for layer in STACK_LAYERS for part in ("up", "down"))),
    ),
    "int, large": (lambda: make(Stack), 100, unit_set(*STACK_LAYERS)),
    "int, too large": (lambda: make(Stack), 10**6, unit_set()),
    "list": (make_gpt, "blocks and head", unit_set("blocks.0", "blocks.2", "head")),
}


@on_ranks(2, cases=list(UNITS))
def test_units_are_found_and_trained(world, name):
    build, units, right = UNITS[name]
    model, plain = build(), build()
    if name == "list":
        units = [model.blocks[0], model.blocks[2], model.head]
    assert mics.shard_model(model, units=units, mesh=world.mesh) is model
    assert units_of(model) == right, units_of(model)
    value = first_loss if isinstance(model, TinyGPT) else value_of
    for _ in range(2):
        value(model, world.rank).backward()
        train_alone(plain, value)
    expect_gradients(world, model, plain)
    # Each unit with parameters of its own is reduced once per backward.
    owners = {id(m._unit): m._unit for m in model.modules() if isinstance(m, mics.MiCSModule)}
    num_units = sum(1 for unit in owners.values() if unit.parameters)
    assert calls(model, "reduce/intra") == 2 * num_units


@on_ranks(2)
def test_units_are_the_same_on_every_rank_when_several_classes_are_repeated(world):
    # Classes of one name hash by their address, which differs between processes.
    classes = [type("Each", (Small,), {}) for _ in range(12)]
    model = nn.Sequential(*(cls() for cls in classes for _ in range(2)))
    mics.shard_model(model, mesh=world.mesh)
    found = world.gather(sorted(sorted(names) for names in units_of(model)))
    assert found == [found[0]] * WORLD


@on_ranks(2)
def test_tied_parameters_stay_one_parameter(world):
    model = mics.shard_model(make_gpt(tied=True), mesh=world.mesh)
    first_loss(model, world.rank).backward()
    assert model.head.weight is model.tokens.weight
    names = [name for name, _ in model.named_parameters()]
    assert names == [name for name, _ in make_gpt(tied=True).named_parameters()]
    assert list(model.state_dict()) == list(make_gpt(tied=True).state_dict())
