"""First values of models as people write them: what one process computes, or names.

Each model is built in one process and on the meta device, both from the same seed.
"""

from __future__ import annotations

import copy
import logging
from typing import Any
from unittest import mock

import pytest
import torch
from support.bodies import fail_text
from support.meta_models import (
    MODELS,
    RIGHT,
    SEED,
    Base,
    GoesByNames,
    HoldsLooseTensors,
    Rotates,
    ScalesAfterwards,
    SetsValues,
    TiesHead,
    build,
    differences,
    small,
)
from support.ranks import expect_success, on_each_rank, run_ranks
from torch import nn

import torch_mics as mics
from torch_mics._standins import Slot

# --- construction ---------------------------------------------------------------------------------


each_rank = on_each_rank(expect_success, 2)


def run_recorded(rank: int, shard_size: int) -> dict[str, list[str]]:
    found = {}
    for cls in MODELS:
        torch.manual_seed(SEED + rank)
        with mics.meta_device():
            model = cls()
            if isinstance(model, GoesByNames):
                model.apply(model._init_weights)
        mics.fully_shard(model, shard_size=shard_size)
        # The random state of rank 0 where the model was built counts.
        torch.manual_seed(77)
        mics.materialize(model)
        found[cls.__name__] = differences(model, build(cls))
        if cls is Rotates:
            assert model.first.data_ptr() == model.frequencies.data_ptr()
        if cls is HoldsLooseTensors:
            assert model.angles.tolist() == [0, 1, 2, 3]
            assert model.tables[0].tolist() == [1, 1]
    return found


@pytest.mark.parametrize(("ranks", "shard_size"), [(2, 2), (4, 4), (4, 2)])
def test_recorded_construction_gives_the_bits_of_one_process(ranks: int, shard_size: int) -> None:
    nothing = {cls.__name__: [] for cls in MODELS}
    assert run_ranks(ranks, run_recorded, shard_size) == [nothing] * ranks


def run_unrecorded(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for cls, expected in MODELS.items():
        if not expected:
            continue
        with torch.device("meta"):
            model = cls()
        for child in model.children():
            if type(child) is nn.Linear:
                mics.fully_shard(child, shard_size="world")
        mics.fully_shard(model, shard_size="world")
        torch.manual_seed(SEED + rank)
        try:
            mics.materialize(model)
            found[cls.__name__] = differences(model, build(cls))
        except ValueError as error:
            found[cls.__name__] = str(error)
            assert all(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    return found


@pytest.mark.parametrize("ranks", [2, 4])
def test_unrecorded_construction_is_right_or_named(ranks: int) -> None:
    for found in run_ranks(ranks, run_unrecorded):
        for cls, (verdict, *names) in ((c, e) for c, e in MODELS.items() if e):
            outcome = found[cls.__name__]
            if verdict == RIGHT:
                assert outcome == [], cls.__name__
            else:
                assert "torch_mics.meta_device()" in outcome, (cls.__name__, outcome)
                assert all(name in outcome for name in names), (cls.__name__, outcome)


# --- more than one random stream ------------------------------------------------------------------


class SeedsItself(Base):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.second = nn.Linear(4, 4)
        self.third = nn.Linear(4, 4)
        self.noise = torch.randn(2, device="cpu").shape[0]
        self.fourth = nn.Linear(4, 4)


@each_rank
def test_random_stream_goes_on_where_one_process_would(rank: int) -> None:
    torch.manual_seed(SEED)
    with mics.meta_device():
        first = SeedsItself()
    with mics.meta_device():
        second = nn.Linear(4, 4)
    model = nn.Sequential(first, second)
    mics.fully_shard(model, shard_size="world")
    mics.materialize(model)
    plain = build(lambda: nn.Sequential(SeedsItself(), nn.Linear(4, 4)))
    assert differences(model, plain) == []


# --- tensors outside the meta device --------------------------------------------------------------


class Mixed(Base):
    """Some of its tensors are made outside the meta device, whatever the caller says."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 6)
        self.gain = nn.Parameter(torch.full((6,), 2.0, device="cpu"))
        self.table = nn.Parameter(torch.arange(20.0, device="cpu").view(5, 4))
        self.linear.bias = nn.Parameter(torch.full((6,), -1.0, device="cpu"))
        self.register_buffer("count", torch.full((2,), 7, device="cpu"))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.gain)
        self.count.zero_()


def mixed(recorded: bool) -> nn.Module:
    with mics.meta_device() if recorded else torch.device("meta"):
        return Mixed()


def run_mixed(rank: int) -> None:
    for recorded in (False, True):
        torch.manual_seed(SEED)
        model = mics.fully_shard(mixed(recorded), shard_size="world")
        mics.materialize(model)
        assert differences(model, build(Mixed)) == []
        model(torch.ones(1, 4))
    for strict in (True, False):
        model = mics.fully_shard(mixed(False), shard_size="world")
        plain = build(Mixed)
        if strict:
            with torch.no_grad():
                plain.table.add_(1)
        source = mics.fully_shard(copy.deepcopy(plain), shard_size="world").state_dict()
        if not strict:
            source = {"linear.weight": source["linear.weight"]}
        model.load_state_dict(source, assign=True, strict=strict)
        assert differences(model, plain) == []
        assert all(not parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("recorded", [False, True])
@each_rank
def test_parameters_that_were_loaded_before_keep_their_values(rank: int, recorded: bool) -> None:
    with mics.meta_device() if recorded else torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5))
    plain = build(lambda: nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5)))
    with torch.no_grad():
        plain[0].weight.fill_(3)
        plain[0].bias.fill_(4)
    for child in model:
        mics.fully_shard(child, shard_size="world")
    mics.fully_shard(model, shard_size="world")
    source = mics.fully_shard(copy.deepcopy(plain)[0], shard_size="world").state_dict()
    model[0].load_state_dict(source, assign=True)
    torch.manual_seed(SEED)
    mics.materialize(model)
    assert differences(model[0], plain[0]) == []
    assert 0 < model[1].weight.full_tensor().std() < 1


@pytest.mark.parametrize("ranks", [2, 4])
def test_parameters_outside_the_meta_device_keep_their_values(ranks: int) -> None:
    run_ranks(ranks, run_mixed)


# --- what init_fn leaves, and a second try --------------------------------------------------------


def fill_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        with torch.no_grad():
            module.weight.data.fill_(0.5)
            module.bias = nn.Parameter(torch.full_like(module.bias, 0.25))


def fill_all(module: nn.Module) -> None:
    for parameter in module.parameters(recurse=False):
        nn.init.constant_(parameter, 0.5)


def run_init_fn(rank: int) -> str:
    with torch.device("meta"):
        model = ScalesAfterwards()
    mics.fully_shard(model, shard_size="world")
    mics.materialize(model, init_fn=fill_linear)
    values = mics.full_state_dict(model, rank0_only=False)
    assert (values["up.weight"] == 0.5).all()
    assert (values["down.bias"] == 0.25).all()
    assert (values["norm.weight"] == 1).all()
    assert (values["norm.bias"] == 0).all()

    with torch.device("meta"):
        model = SetsValues()
    mics.fully_shard(model, shard_size="world")
    text = fail_text(lambda: mics.materialize(model, init_fn=fill_linear), ValueError)
    mics.materialize(model, init_fn=fill_all)
    assert all((value == 0.5).all() for value in mics.full_state_dict(model).values())
    return text


@pytest.mark.parametrize("ranks", [2, 4])
def test_init_fn_is_asked_first_and_may_be_tried_again(ranks: int) -> None:
    for text in run_ranks(ranks, run_init_fn):
        assert "needs an initialiser" in text
        assert "ramp" in text


def partly(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.weight[:1])
        nn.init.zeros_(module.bias)


@on_each_rank(expect_success, 4)
def test_parameter_written_in_part_is_named_on_every_rank(rank: int) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 3))
    mics.fully_shard(model, shard_size="world")
    text = fail_text(lambda: mics.materialize(model, init_fn=partly), ValueError)
    assert "0.weight, 1.weight" in text


def run_fails(rank: int) -> str:
    def fails(module: nn.Module) -> None:
        raise RuntimeError("no luck")

    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 8))
    mics.fully_shard(model, shard_size="world")
    text = fail_text(lambda: mics.materialize(model, init_fn=fails), ValueError)
    assert all(parameter.is_meta for parameter in model.parameters())
    return text


def run_ignored(rank: int) -> str:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 3))
    mics.fully_shard(model, shard_size="world", ignored_params={model[0].bias})
    return fail_text(lambda: mics.materialize(model), ValueError)


def test_initialiser_that_raises_and_ignored_parameter_are_named() -> None:
    for text in run_ranks(2, run_fails):
        assert "RuntimeError: no luck (0)" in text
        assert "Pass init_fn" in text
    for text in run_ranks(2, run_ignored):
        assert "got 0.bias on the meta device" in text


def run_tied(rank: int) -> list[str]:
    with torch.device("meta"):
        model = TiesHead()
    mics.fully_shard(model, shard_size="world")
    texts: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: texts.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("torch_mics").addHandler(handler)
    mics.materialize(model)
    logging.getLogger("torch_mics").removeHandler(handler)
    return texts


def test_tie_of_two_initialisers_is_told_of() -> None:
    first, second = run_ranks(2, run_tied)
    assert "tokens.weight" in first[0]
    assert "torch_mics.meta_device()" in first[0]
    assert second == []


# --- memory ---------------------------------------------------------------------------------------


class Deep(Base):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(8))

    def _init_weights(self, module: nn.Module) -> None:
        if module is self:
            for parameter in self.parameters():
                nn.init.normal_(parameter.data)


def run_memory(rank: int, recorded: bool) -> tuple[int, int]:
    """The most bytes of full parameters at once, and those of the largest unit."""
    most = 0
    hold = Slot._hold

    def watched(slot: Slot) -> None:
        nonlocal most
        hold(slot)
        most = max(most, sum(other.nbytes for other in slot.values.held.values()))

    with mics.meta_device() if recorded else torch.device("meta"):
        model = Deep()
        if recorded:
            model.apply(small)
    mics.shard_model(model, units={nn.Linear}, shard_size="world")
    with mock.patch.object(Slot, "_hold", watched):
        mics.materialize(model)
    return most, 4 * (32 * 32 + 32)


@pytest.mark.parametrize("recorded", [False, True])
def test_full_parameters_take_no_more_than_the_largest_unit(recorded: bool) -> None:
    for most, largest in run_ranks(2, run_memory, recorded):
        assert 0 < most <= largest
