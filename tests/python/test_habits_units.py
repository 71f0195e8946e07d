"""Which units shard_model() makes of models whose parts share parameters, and what finding them costs.

Each model trains as one process does. As in test_features.py, bodies run on four ranks.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import architectures
from support.bodies import (
    Layer,
    Stack,
    expect_gradients,
    expect_values,
    make,
    on_ranks,
    points,
    train_alone,
    value_of,
)
from support.models import TinyGPT
from support.ranks import RankFailure, run_ranks
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
        (
            *LAYERS,
            *but(PARTS, "layers.0.up", "layers.2.up"),
            "layers.0.up layers.2.up",
            *OTHERS,
        ),
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
        (
            "layers.2",
            *but(PARTS, "layers.0.up", "layers.1.up"),
            *OTHERS,
        ),
        ("left to the root",),
    ),
    "size": (layers_share_a_weight, 49, ("layers.0.up layers.2.up", "layers.1.up"), ()),
}


def units_of(model: nn.Module) -> set[frozenset[str]]:
    units: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        if name and isinstance(module, mics.MiCSModule):
            units.setdefault(id(module._unit), []).append(name)
    return {frozenset(names) for names in units.values()}


@on_ranks(2, cases=list(CASES))
def test_parameters_in_several_places_train_as_one_process(world, name):
    tie, units, right, notes = CASES[name]
    model, plain = make(Tied, tie), make(Tied, tie)
    mics.shard_model(model, units=units, mesh=world.mesh)
    assert units_of(model) == {frozenset(unit.split()) for unit in right}
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
    assert units_of(model) == {frozenset(unit.split()) for unit in (*LAYERS, TAIL)}
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
    assert units_of(model) == {frozenset([name]) for name in (*LAYERS, "head")}


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
    assert 'lent: "head", used by others than their own forwards' in mics.describe(model)


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


# --- architectures of transformers ----------------------------------------------------------------

RANKS = 2
STEPS = 2
MICRO_STEPS = 2
MAX_SIZE = 5_000_000

# One of each kind of sharing and calling; with MICS_WIDE=1 all that transformers has.
ARCHITECTURES = (
    ("causal", "roberta"),  # a head of several modules, of which one is tied to an embedding
    ("masked", "albert"),  # one layer, run several times, and a tied head
    ("masked", "ibert"),  # its modules return pairs
    ("masked", "neomme"),  # a tied head inside the model
    ("masked", "funnel"),  # lists in a list
    ("causal", "prophetnet"),  # only children of some units are called
    ("masked", "modernvbert"),  # an embedding that others read
    ("masked", "squeezebert"),  # layers with other layers in them
    ("causal", "gpt2"),
    ("causal", "llama"),
    ("causal", "bart"),
    ("causal", "mamba"),
    ("causal", "mixtral"),
)


def train(model: Any, data: Callable[[int], list[dict[str, torch.Tensor]]], micro: Any) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(STEPS):
        for micro_step in range(MICRO_STEPS):
            parts = data(micro_step)
            with micro(micro_step):
                for part in parts:
                    loss = architectures.loss_of(model, part)
                    (loss / (MICRO_STEPS * len(parts))).backward()
        optimizer.step()
        optimizer.zero_grad()


def check_training(rank: int, kind: str, name: str, folder: str | None) -> str | None:
    """Trains, generates, saves and loads as one process; gives why one process cannot, or None."""
    try:
        if architectures.size(kind, name) > MAX_SIZE:
            return "its configuration has parts that cannot be shrunk"
        plain = architectures.build(kind, name)
        start = {key: p.detach().clone() for key, p in plain.named_parameters()}
        written = architectures.generate(plain) if kind == "causal" and folder else None
        train(
            plain,
            lambda i: [architectures.inputs(r, i) for r in range(RANKS)],
            lambda i: contextlib.nullcontext(),
        )
        if not all(p.isfinite().all() for p in plain.parameters()):
            return "it diverges"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    model = architectures.build(kind, name)
    mics.shard_model(model, shard_size=RANKS)
    if written is not None:
        # Before any training, so that every bit is the same.
        assert torch.equal(architectures.generate(model), written)
    train(
        model,
        lambda i: [architectures.inputs(rank, i)],
        lambda i: mics.microbatch(model, is_last=i == MICRO_STEPS - 1),
    )
    full = {key: p.detach().full_tensor() for key, p in model.named_parameters()}
    compare(full, plain, start)
    if folder is not None:
        check_saving(rank, model, plain, folder)
    return None


def check_saving(rank: int, model: Any, plain: Any, folder: str) -> None:
    state = mics.full_state_dict(model)  # empty on the other rank
    if rank != 0:
        return
    model.save_pretrained(f"{folder}/sharded", state_dict=dict(state))
    plain.save_pretrained(f"{folder}/plain")
    mine, right = (type(plain).from_pretrained(f"{folder}/{each}") for each in ("sharded", "plain"))
    assert mine.config.architectures == [type(plain).__name__]
    before = dict(plain.named_parameters())
    for (name, p), q in zip(mine.named_parameters(), right.parameters(), strict=True):
        if torch.equal(q, before[name]):
            assert torch.equal(p, state[name]), name
        else:  # Funnel's rows of padding become zero
            torch.testing.assert_close(p, q, msg=name)


def compare(found: dict[str, Any], plain: Any, start: dict[str, torch.Tensor]) -> None:
    """Parameters only: buffers of statistics (I-BERT's ranges) are those of each rank's data."""
    right = {key: p.detach() for key, p in plain.named_parameters()}
    assert list(found) == list(right)
    movement = max(float((p - start[key]).abs().max()) for key, p in right.items())
    assert movement > 0
    for key, p in right.items():
        # fp32 sums in another order; the nearly unused parameters of some move by little else.
        error = float((found[key].detach() - p).abs().max())
        assert error <= 2e-3 * movement, f"{key}: {error / movement:.1e} of the movement"


@pytest.mark.parametrize(("kind", "name"), ARCHITECTURES)
def test_architecture_trains_generates_and_saves_as_one_process(kind, name, tmp_path):
    pytest.importorskip("transformers")
    assert run_ranks(RANKS, check_training, kind, name, str(tmp_path)) == [None, None]


@pytest.mark.skipif("MICS_WIDE" not in os.environ, reason="every architecture takes minutes")
@pytest.mark.parametrize("kind", ["causal", "masked"])
def test_every_architecture_trains_as_one_process_or_not_at_all(kind):
    pytest.importorskip("transformers")
    trained, failed = [], {}
    for name in architectures.names(kind):
        try:
            if run_ranks(RANKS, check_training, kind, name, None, timeout=300) == [None, None]:
                trained.append(name)
        except RankFailure as error:
            failed[name] = str(error)[-300:]
    # The rest cannot be built small, or need other inputs, in one process either.
    assert not failed, failed
    assert len(trained) >= {"causal": 140, "masked": 34}[kind], trained
