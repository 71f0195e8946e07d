"""Which units shard_model() makes of models whose parts share parameters, and what finding them costs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.bodies import (
    Layer,
    Stack,
    expect_gradients,
    expect_values,
    make,
    on_ranks,
    points,
    train_alone,
    units_of,
    value_of,
)
from support.models import TinyGPT
from torch import nn

import torch_mics as mics
from torch_mics._find_units import find_units

# --- parameters in several places -----------------------------------------------------------------


class Tied(Stack):
    """A Stack; `tie` gives parts of it to other parts."""

    def __init__(self, tie: Callable[[Any], None]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(5)
        tie(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(super().forward(x))


def layers_share_a_weight(model: Any) -> None:
    model.layers[2].up.weight = model.layers[0].up.weight


def layers_share_a_module(model: Any) -> None:
    model.layers[2].spare = model.layers[0].spare


def layers_share_a_chain(model: Any) -> None:
    model.layers[1].up.weight = model.layers[0].up.weight
    model.layers[2].down = model.layers[1].down


def layers_share_what_has_no_parameters(model: Any) -> None:
    for layer in model.layers:
        layer.extra = model.layers[0].down.__dict__.setdefault("_shared", nn.Tanh())
    del model.layers[0].down.__dict__["_shared"]


def head_is_tied_to_the_root(model: Any) -> None:
    """embed stands before the layers and is no Embedding: it is the root's."""
    model.head = nn.Linear(3, 6)
    model.head.weight = model.embed.weight
    model.head.forward = lambda x: x[..., :5] + 0 * model.head.weight.sum()


def layer_is_tied_to_itself(model: Any) -> None:
    layer = model.layers[1]
    layer.gate = nn.Linear(6, 6)
    layer.gate.weight = layer.spare.weight


def whole_layer_is_used_twice(model: Any) -> None:
    model.layers[2] = model.layers[0]


def own_parameter_is_that_of_a_child(model: Any) -> None:
    layer = model.layers[1]
    layer.weight = layer.up.weight


def circle(model: Any) -> None:
    """A part of layer 0 with a part of layer 1 itself, and the other way round."""
    first, second = model.layers[0], model.layers[1]
    second.extra = first.up.weight
    first.extra = second.up.weight


LAYERS = ("layers.0", "layers.1", "layers.2")
TAIL = "head norm"
PARTS = tuple(f"{layer}.{part}" for layer in LAYERS for part in ("up", "down", "spare"))
OTHERS = ("embed", "head")


def but(names: tuple[str, ...], *without: str) -> tuple[str, ...]:
    return tuple(name for name in names if name not in without)


CASES: dict[str, tuple[Callable[[Any], None], Any, tuple[str, ...], tuple[str, ...]]] = {
    # tie, units, the units found, what the report says of them
    "weight of layers": (
        layers_share_a_weight,
        "auto",
        ("layers.0 layers.2", "layers.1", TAIL),
        ('tied: "layers.0", "layers.2" are one unit; shared are "layers.2.up.weight"',),
    ),
    "module of layers": (
        layers_share_a_module,
        "auto",
        ("layers.0 layers.2", "layers.1", TAIL),
        ('are one unit; shared are "layers.0.spare"',),
    ),
    "chain of layers": (
        layers_share_a_chain,
        "auto",
        ("layers.0 layers.1 layers.2", TAIL),
        ('shared are "layers.1.up.weight", "layers.1.down"',),
    ),
    "no parameters": (layers_share_what_has_no_parameters, "auto", (*LAYERS, TAIL), ()),
    "layer used twice": (whole_layer_is_used_twice, "auto", ("layers.0", "layers.1", TAIL), ()),
    # The rest of the tail is a unit all the same.
    "head and root": (
        head_is_tied_to_the_root,
        "auto",
        (*LAYERS, "norm"),
        ('tied: "head" left to the root; shared are "head.weight"',),
    ),
    "head and root, set": (
        head_is_tied_to_the_root,
        {Layer, nn.LayerNorm, nn.Linear},
        (*LAYERS, *PARTS, "embed head", "norm"),
        ('"embed", "head" are one unit',),
    ),
    "head and root, predicate": (
        head_is_tied_to_the_root,
        lambda module: isinstance(module, Layer),
        LAYERS,
        (),
    ),
    "parts of a layer": (
        layer_is_tied_to_itself,
        {Layer, nn.Linear},
        (*LAYERS, *but(PARTS, "layers.1.spare"), "layers.1.spare layers.1.gate", *OTHERS),
        ('"layers.1.spare", "layers.1.gate" are one unit',),
    ),
    "parts of two layers": (
        layers_share_a_weight,
        {Layer, nn.Linear},
        (*LAYERS, *but(PARTS, "layers.0.up", "layers.2.up"), "layers.0.up layers.2.up", *OTHERS),
        ("are one unit",),
    ),
    "layer and its part": (
        own_parameter_is_that_of_a_child,
        {Layer, nn.Linear},
        (*LAYERS, *but(PARTS, "layers.1.up"), *OTHERS),
        ('tied: "layers.1", "layers.1.up" are one unit',),
    ),
    "circle": (
        circle,
        {Layer, nn.Linear},
        ("layers.2", *but(PARTS, "layers.0.up", "layers.1.up"), *OTHERS),
        ("left to the root",),
    ),
    "size": (layers_share_a_weight, 49, ("layers.0.up layers.2.up", "layers.1.up"), ()),
}


def named_units_of(model: nn.Module) -> set[frozenset[str]]:
    """Without the root, which has no name."""
    return {unit - {""} for unit in units_of(model)} - {frozenset()}


@on_ranks(2, cases=list(CASES))
def test_parameters_in_several_places_train_as_one_process(world, name):
    tie, units, right, notes = CASES[name]
    model, plain = make(Tied, tie), make(Tied, tie)
    mics.shard_model(model, units=units, mesh=world.mesh)
    assert named_units_of(model) == {frozenset(unit.split()) for unit in right}
    for _ in range(2):
        for micro_step in range(2):
            with mics.microbatch(model, is_last=micro_step == 1):
                (value_of(model, world.rank) / 2).backward()
            train_alone(plain, value_of, 2)
        expect_gradients(world, model, plain, 5e-6)
        for each in (model, plain):
            torch.optim.SGD(each.parameters(), lr=0.1).step()
            each.zero_grad()
    report = mics.describe(model)
    assert all(note in report for note in notes), report
    assert "lent: " not in report  # each runs in its own forward
    assert ("tied: " in report) == bool(notes) or units == 49, report


@on_ranks(2)
def test_ignored_parameters_tie_nothing(world):
    model = make(Tied, layers_share_a_weight)
    shared = model.layers[0].up.weight
    mics.shard_model(model, mesh=world.mesh, ignored_params={shared})
    assert named_units_of(model) == {frozenset(unit.split()) for unit in (*LAYERS, TAIL)}
    assert model.layers[2].up.weight is shared
    value_of(model, world.rank).backward()
    assert shared.grad.shape == shared.shape


@on_ranks(2)
def test_modules_named_one_by_one_are_not_left_to_the_root(world):
    model = make(Tied, head_is_tied_to_the_root)
    with pytest.raises(ValueError, match=r"a parameter may be in one unit: got .*fully_shard\(\[a"):
        mics.shard_model(model, units=[*model.layers, model.head], mesh=world.mesh)


@on_ranks(2)
def test_names_of_blocks_that_match_nothing_hide_no_list(world):
    model = make(Stack)
    model._no_split_modules = ["Absent"]
    mics.shard_model(model, mesh=world.mesh)
    assert named_units_of(model) == {frozenset([name]) for name in (*LAYERS, "head")}


@on_ranks(2)
def test_tied_parameters_are_one_tensor_of_the_full_state(world):
    model, plain = make(Tied, layers_share_a_weight), make(Tied, layers_share_a_weight)
    mics.shard_model(model, mesh=world.mesh)
    state = mics.full_state_dict(model, rank0_only=False)
    assert list(state) == list(plain.state_dict())
    assert state["layers.2.up.weight"] is state["layers.0.up.weight"]
    other = mics.shard_model(make(Tied, layers_share_a_weight), mesh=world.mesh)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    mics.load_full_state_dict(other, state)
    expect_values(other, plain)


# --- parts used by others -------------------------------------------------------------------------


class Reader(Stack):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.run_layers(self.embed(x)) @ self.head.weight.t()


@on_ranks(2)
def test_report_names_lent_units(world):
    model = mics.shard_model(make(Reader), mesh=world.mesh)
    assert "lent: " not in mics.describe(model)
    model(points(world.rank))
    assert 'lent: "head", used outside of their own forwards' in mics.describe(model)


# --- cost -----------------------------------------------------------------------------------------


def num_calls(function: Callable[[], object]) -> int:
    count = 0

    def on_event(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(on_event)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "units", ["auto", {nn.Linear, nn.Embedding}, 50, lambda m: bool(m._parameters)]
)
def test_finding_units_takes_time_in_proportion_to_the_model(units, tied):
    def tie(model: Any) -> Any:
        if tied:
            for first, second in zip(model.blocks[::2], model.blocks[1::2], strict=True):
                second.norm1 = first.norm1
                second.up.weight = first.up.weight
        return model

    small, large = (tie(TinyGPT(tied, blocks=blocks)) for blocks in (50, 200))
    counts = [num_calls(lambda model=model: find_units(model, units)) for model in (small, large)]
    assert counts[1] < 4.1 * counts[0], counts


@on_ranks(2)
def test_sharding_takes_time_in_proportion_to_the_model(world):
    models = [TinyGPT(True, blocks=blocks) for blocks in (10, 20, 80)]
    counts = [
        num_calls(lambda model=model: mics.shard_model(model, mesh=world.mesh)) for model in models
    ]
    assert counts[2] < 4.1 * counts[1], counts  # the first pays for what is made once
