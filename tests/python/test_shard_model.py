"""Which units shard_model() finds, first values, full parameters and norms.

As in test_features.py, bodies run on four ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from support.bodies import (
    WORLD,
    Layer,
    Stack,
    calls,
    expect_gradients,
    expect_values,
    fail_text,
    make,
    on_ranks,
    points,
    shard,
    train_alone,
    twins,
    value_of,
)
from support.models import Block, TinyGPT, batch, loss, make_gpt
from torch import nn

import torch_mics as mics

# --- units ----------------------------------------------------------------------------------------


def units_of(model: nn.Module) -> set[frozenset[str]]:
    """The names of the modules of each unit."""
    units: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, mics.MiCSModule):
            units.setdefault(id(module._unit), []).append(name)
    return {frozenset(names) for names in units.values()}


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


def of_gpt(model: nn.Module, rank: int) -> torch.Tensor:
    return loss(model, batch(0, 0, rank))


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
    "auto, one block": (
        lambda: make_gpt(blocks=1),
        "auto",
        unit_set("tokens", "positions"),
    ),
    "set": (make_gpt, {Block}, unit_set(*GPT_BLOCKS)),
    "set of two": (
        make_gpt,
        {Block, nn.Embedding},
        unit_set(*GPT_BLOCKS, "tokens", "positions"),
    ),
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
    value = of_gpt if isinstance(model, TinyGPT) else value_of
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
    of_gpt(model, world.rank).backward()
    assert model.head.weight is model.tokens.weight
    names = [name for name, _ in model.named_parameters()]
    assert names == [name for name, _ in make_gpt(tied=True).named_parameters()]
    assert list(model.state_dict()) == list(make_gpt(tied=True).state_dict())


# --- first values ---------------------------------------------------------------------------------


class Odd(nn.Module):
    """A norm without reset_parameters()."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(6))
        self.register_buffer("table", torch.arange(4.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gain


class Initialised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.norm = Odd()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
        elif isinstance(module, Odd):
            nn.init.normal_(module.gain)
            module.table.copy_(torch.arange(4.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


def seed(number: int) -> None:
    torch.manual_seed(number)


@on_ranks(1, 2, 4, cases=[False, True])
def test_materialize_gives_the_values_of_a_single_process(world, tied):
    with torch.device("meta"):
        model = TinyGPT(tied)
    mics.shard_model(model, mesh=world.mesh)
    assert all(p.is_meta for p in model.parameters())
    # The random state of rank 0 counts.
    seed(5 + world.rank)
    mics.materialize(model)
    seed(5)
    plain = TinyGPT(tied)
    if tied:
        # Whoever builds on the meta device calls each module's initialiser, in the model's order.
        seed(5)
        for module in plain.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    expect_values(model, plain)
    of_gpt(model, world.rank).backward()
    train_alone(plain, of_gpt)
    expect_gradients(world, model, plain)


@on_ranks(1, 2, 4, cases=["_init_weights", "init_fn"])
def test_materialize_takes_the_initialiser_of_the_model(world, how):
    with torch.device("meta"):
        model = Initialised()
    shard(world, model)
    seed(5 + world.rank)
    mics.materialize(model, init_fn=model._init_weights if how == "init_fn" else None)
    plain = Initialised()
    seed(5)
    for module in plain.modules():
        # A module's own reset_parameters() comes before the model's _init_weights().
        if how == "_init_weights" and hasattr(module, "reset_parameters"):
            module.reset_parameters()
        plain._init_weights(module)
    expect_values(model, plain)
    assert torch.equal(model.norm.table, torch.arange(4.0))


@on_ranks(2)
def test_materialize_leaves_what_has_values(world):
    model, plain = make(Initialised), make(Initialised)
    model.layers[1].to("meta")
    shard(world, model)
    seed(5 + world.rank)
    mics.materialize(model)
    seed(5)
    for part in (plain.layers[1].up, plain.layers[1].down, plain.layers[1].spare):
        part.reset_parameters()
        plain._init_weights(part)
    expect_values(model, plain)


# --- unsharded ------------------------------------------------------------------------------------


@on_ranks(cases=[(when, back) for when in ("before", "after a step") for back in (True, False)])
def test_unsharded_gives_full_parameters_and_writes_back_on_request(world, case):
    when, writeback = case
    model = mics.shard_model(make_gpt(tied=True), mesh=world.mesh)
    plain = make_gpt(tied=True)
    if when == "after a step":
        of_gpt(model, world.rank).backward()
        model.zero_grad()
    sharded = dict(model.named_parameters())
    with mics.unsharded(model, writeback=writeback), torch.no_grad():
        right = dict(plain.named_parameters())
        full = dict(model.named_parameters())
        assert list(full) == list(right)
        for name, parameter in full.items():
            assert type(parameter) is nn.Parameter
            assert torch.equal(parameter, right[name])
            parameter.mul_(2)
        assert model.head.weight is model.tokens.weight
    assert all(parameter is sharded[name] for name, parameter in model.named_parameters())
    if writeback:
        with torch.no_grad():
            for parameter in plain.parameters():
                parameter.mul_(2)
    expect_values(model, plain)
    of_gpt(model, world.rank).backward()
    train_alone(plain, of_gpt)
    expect_gradients(world, model, plain)


@on_ranks()
def test_unsharded_after_an_exception_writes_nothing(world):
    model, plain = twins(world, Stack)

    class Stop(Exception):
        pass

    stopped = False
    try:
        with mics.unsharded(model, writeback=True), torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
            raise Stop
    except Stop:
        stopped = True
    assert stopped
    expect_values(model, plain)


@on_ranks()
def test_unsharded_with_writeback_is_refused_inside_an_accumulation(world):
    model, plain = twins(world, Stack)

    def write() -> None:
        with mics.unsharded(model, writeback=True):
            pass

    with mics.microbatch(model, is_last=False):
        value_of(model, world.rank).backward()
    assert "must not be written during an accumulation" in fail_text(write)
    with mics.unsharded(model):
        assert torch.equal(model.head.weight, plain.head.weight)
    value_of(model, world.rank).backward()
    for _ in range(2):
        train_alone(plain, value_of)
    expect_gradients(world, model, plain)


# --- clip_grad_norm_ ------------------------------------------------------------------------------


@on_ranks(cases=[1.0, 2.0, float("inf")])
def test_clipping_works_on_the_gradients_of_torch(world, norm_type):
    model, plain = twins(world, Stack)
    extra = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    for each, beside in zip((model, plain), extra, strict=True):
        each.layers[1].spare.requires_grad_(False)
        beside.grad = torch.tensor([1.0, -2.0, 0.5])
    value_of(model, world.rank).backward()
    train_alone(plain, value_of)
    before = {n: p.grad.clone() for n, p in plain.named_parameters() if p.grad is not None}
    # A plain parameter, the same on every rank, counts once.
    norm = mics.clip_grad_norm_([*model.parameters(), extra[0]], 0.1, norm_type)
    right = torch.nn.utils.clip_grad_norm_([*plain.parameters(), extra[1]], 0.1, norm_type)
    assert len(set(world.gather(norm.item()))) == 1
    assert right > 0.1
    # A norm of fp32 numbers summed in another order, times each gradient.
    assert abs(norm - right) <= 1e-6 * right
    expect_gradients(world, model, plain, limit=2e-6)
    torch.testing.assert_close(extra[0].grad, extra[1].grad, rtol=2e-6, atol=0)
    # A norm below the bound leaves every bit.
    kept = [p.grad.to_local().clone() for p in model.parameters() if p.grad is not None]
    mics.clip_grad_norm_(model.parameters(), 1e6, norm_type)
    now = [p.grad.to_local() for p in model.parameters() if p.grad is not None]
    assert all(torch.equal(*pair) for pair in zip(kept, now, strict=True))
    assert len(kept) == len(before)


@on_ranks()
def test_clipping_scales_a_unit_at_once_and_reduces_once(world):
    # Dimensions that 4 divides leave no gaps between the gradients of a unit.
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8)) for _ in range(3)))
    mics.shard_model(model, units=list(model), mesh=world.mesh)
    model(torch.ones(2, 8)).sum().backward()
    foreach_mul, all_reduce = torch._foreach_mul_, torch.distributed.all_reduce
    with (
        mock.patch.object(torch, "_foreach_mul_", wraps=foreach_mul) as products,
        mock.patch.object(torch.distributed, "all_reduce", wraps=all_reduce) as reductions,
    ):
        mics.clip_grad_norm_(model.parameters(), 0.1)
    assert [len(call.args[0]) for call in products.call_args_list] == [3]
    assert reductions.call_count == 1


@on_ranks(cases=[float("inf"), float("nan")])
def test_norm_that_is_not_finite_raises_on_every_rank_or_is_returned(world, bad):
    model, _ = twins(world, Stack)
    value_of(model, world.rank).backward()
    weight = model.layers[0].up.weight
    if world.rank % world.partition_size == 0:
        # In one shard of each replica.
        weight.grad.to_local()[0, 0] = bad
    before = [p.grad.to_local().clone() for p in model.parameters()]
    text = fail_text(lambda: mics.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True))
    assert "the gradient norm must be finite" in text
    for parameter, kept in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter.grad.to_local().isfinite(), kept.isfinite())
        assert torch.equal(parameter.grad.to_local().nan_to_num(), kept.nan_to_num())
    norm = mics.clip_grad_norm_(model.parameters(), 1.0)
    norms = world.gather(str(norm.item()))
    assert norms == [str(bad)] * WORLD


@on_ranks()
def test_norm_without_gradients_is_zero(world):
    model, _ = twins(world, Stack)
    assert mics.clip_grad_norm_(model.parameters(), 1.0).item() == 0.0
    model(points(world.rank))
    assert mics.clip_grad_norm_(model.parameters(), 1.0).item() == 0.0
