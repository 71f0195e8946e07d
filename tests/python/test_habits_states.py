"""Names, first saves and failures of checkpoints, as scripts make them."""

from __future__ import annotations

import copy
import os
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from support.bodies import (
    Stack,
    expect_step,
    expect_values,
    make,
    on_ranks,
    points,
    shard,
    train_alone,
    twins,
    value_of,
)
from support.states import expect_same, step
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import torch_mics as mics

# --- names ----------------------------------------------------------------------------------------


def compile_blocks(model: Any) -> Any:
    for index, layer in enumerate(model.layers):
        model.layers[index] = torch.compile(layer, backend="eager")
    return model


def compile_in_place(model: Any) -> Any:
    for layer in model.layers:
        layer.compile(backend="eager")
    return model


def wrap_checkpoint(model: Any) -> Any:
    for index, layer in enumerate(model.layers):
        model.layers[index] = checkpoint_wrapper(layer)
    return model


def compile_wrapped(model: Any) -> Any:
    return compile_blocks(wrap_checkpoint(model))


WRAPPINGS = [compile_blocks, compile_in_place, wrap_checkpoint, compile_wrapped]


@on_ranks(4, 2, cases=[w.__name__ for w in WRAPPINGS])
def test_names_in_files_are_those_of_the_model_before_it_was_wrapped(world, name):
    wrap = next(w for w in WRAPPINGS if w.__name__ == name)
    plain = make(Stack)
    model = shard(world, wrap(make(Stack)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    value_of(model, world.rank).backward()
    train_alone(plain, value_of)
    optimizer.step()
    plain_optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    plain_optimizer.step()
    full = mics.full_state_dict(model, rank0_only=False)
    assert list(full) == list(plain.state_dict())
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(full[key], value)
    path = world.gather(tempfile.mkdtemp())[0]
    mics.checkpoint.TrainState(model, optimizer).save(path)
    mics.checkpoint.export_safetensors(model, path + "/full.safetensors")
    # Into models that are wrapped in other ways, from the file and from the full state.
    others = WRAPPINGS if "MICS_WIDE" in os.environ else [WRAPPINGS[WRAPPINGS.index(wrap) - 1]]
    for other_wrap in (lambda m: m, *others):
        other = shard(world, other_wrap(make(Stack)))
        with torch.no_grad():
            for p in other.parameters():
                p.zero_()
        mics.checkpoint.TrainState(other, torch.optim.SGD(other.parameters(), lr=0.1)).load(path)
        expect_same(mics.full_state_dict(other, rank0_only=False), full, is_other_memory=False)
        for p in other.parameters():
            p.data.zero_()
        keys = list(full)
        mics.load_full_state_dict(other, full if world.rank == 0 else {})
        assert list(full) == keys  # the caller's dict stays as it was
        expect_same(mics.full_state_dict(other, rank0_only=False), full, is_other_memory=False)
        raw = dict(zip(other.state_dict(), full.values(), strict=True))
        mics.load_full_state_dict(other, raw, broadcast=False)


EXTRA: dict[str, Any] = {
    "dict": {"a": 1, "b": [2.5, "x"]},
    "int": 7,
    "None": None,
    "bytes": b"\x00\x01",
    "tensor": torch.arange(3.0),
    "nested": {"t": torch.ones(2), "n": None},
}


class Extra(Stack):
    kind = "dict"
    got: Any = "nothing"

    def get_extra_state(self) -> Any:
        return EXTRA[self.kind]

    def set_extra_state(self, state: Any) -> None:
        self.got = state


@on_ranks(4, 2, cases=list(EXTRA))
def test_extra_state_of_any_kind_is_saved_and_loaded(world, kind):
    model, other = shard(world, make(Extra)), shard(world, make(Extra))
    model.kind = other.kind = kind
    path = world.gather(tempfile.mkdtemp())[0]
    state = mics.full_state_dict(model)
    if world.rank == 0:
        expect_same(state["_extra_state"], EXTRA[kind], is_other_memory=False)
    mics.load_full_state_dict(other, state)
    expect_same(other.got, EXTRA[kind], is_other_memory=False)
    other.got = "nothing"
    mics.checkpoint.TrainState(model).save(path)
    mics.checkpoint.TrainState(other).load(path)
    expect_same(other.got, EXTRA[kind], is_other_memory=False)
    mics.checkpoint.export_safetensors(model, path + "/full.safetensors")


@on_ranks(4)
def test_full_state_can_be_loaded_into_two_models(world):
    source = make(Stack)
    with torch.no_grad():
        for p in source.parameters():
            p.add_(1)
    state = source.state_dict()
    for broadcast in (True, False):
        for _ in range(2):
            model, _ = twins(world, Stack)
            mics.load_full_state_dict(model, state, broadcast=broadcast)
            expect_values(model, source)
    assert list(state) == list(source.state_dict())


@on_ranks(4)
def test_plain_tensors_in_load_state_dict_name_the_call_that_takes_them(world):
    model, plain = twins(world, Stack)
    for state in (plain.state_dict(), {"head.weight": plain.head.weight.detach()}):
        with pytest.raises(ValueError, match=r"load_full_state_dict\(model, state\)"):
            model.load_state_dict(state, strict=False)
    with pytest.raises(ValueError, match="load_full_state_dict"):
        model.layers[0].load_state_dict(plain.layers[0].state_dict())
    expect_values(model, plain)


# --- saves before the first step ------------------------------------------------------------------


FIRST: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, eps=1e-3, weight_decay=0.1),
    "mics.AdamW": lambda p: mics.optim.AdamW(p, lr=0.01, eps=1e-3),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.5),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01, eps=1e-3),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.5),
}


@on_ranks(4, cases=[(o, g) for o in FIRST for g in ("no gradients", "gradients")])
def test_save_before_the_first_step_changes_nothing(world, case):
    name, when = case
    models = [shard(world, make(Stack)) for _ in range(3)]
    optimizers = [FIRST[name](m.parameters()) for m in models]
    steps: list[int] = []
    optimizers[1].register_step_post_hook(lambda *_: steps.append(1))
    path = world.gather(tempfile.mkdtemp())[0]
    if when == "gradients":
        for model in models:
            value_of(model, world.rank).backward()
    state = mics.checkpoint.TrainState(models[1], optimizers[1])
    state.save(path + "/first")
    assert steps == []
    if name != "Adagrad":  # its state is made with it
        assert not optimizers[1].state
    # The third goes on from the file, after a step of its own that must be forgotten.
    step(models[2], optimizers[2], world.rank, 77)
    mics.checkpoint.TrainState(models[2], optimizers[2]).load(path + "/first")
    for model, optimizer in zip(models, optimizers, strict=True):
        if when == "gradients" and model is models[2]:
            value_of(model, world.rank).backward()
        for number in range(3):
            if number or when == "no gradients":
                model(points(world.rank, number)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    for other in models[1:]:
        expect_same(models[0].state_dict(), other.state_dict(), is_other_memory=False)


@on_ranks(4)
def test_checkpoint_without_the_mark_of_a_first_step_still_loads(world):
    """As those of earlier versions."""
    model, _ = twins(world, Stack)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    step(model, optimizer, world.rank)
    path = world.gather(tempfile.mkdtemp())[0]
    state = mics.checkpoint.TrainState(model, optimizer)
    old = {k: v for k, v in state.state_dict().items() if k != "optimizer has stepped"}
    dcp.save({"train": old}, checkpoint_id=path)
    right = copy.deepcopy(model.state_dict())
    step(model, optimizer, world.rank)
    state.load(path)
    expect_same(right, model.state_dict(), is_other_memory=False)


# --- failures and absence -------------------------------------------------------------------------


def save_to_a_file(model: Any, rank: int) -> None:
    path = "/dev/null/inside" if rank == 0 else tempfile.mkdtemp()
    mics.checkpoint.TrainState(model).save(path)


def export_to_nowhere(model: Any, rank: int) -> None:
    mics.checkpoint.export_safetensors(model, "/nonexistent/folder/file.safetensors")


def load_from_nowhere(model: Any, rank: int) -> None:
    path = pathlib.Path(tempfile.mkdtemp())
    if rank != 0:
        (path / ".metadata").write_bytes(b"no pickle")
    mics.checkpoint.TrainState(model).load(path)


def load_torn_file(model: Any, rank: int) -> None:
    path = pathlib.Path(tempfile.mkdtemp())
    if rank == 2:
        (path / ".metadata").write_bytes(b"")
    mics.checkpoint.TrainState(model).load(path)


def load_other_shapes(model: Any, rank: int) -> None:
    state = make(Stack).state_dict()
    if rank == 0:
        state["head.weight"] = torch.ones(1)
    mics.load_full_state_dict(model, state if rank == 0 else {})


FAILURES = [save_to_a_file, export_to_nowhere, load_from_nowhere, load_torn_file, load_other_shapes]


@on_ranks(4, 2, cases=[f.__name__ for f in FAILURES])
def test_failure_of_one_rank_raises_on_all(world, name):
    fail = next(f for f in FAILURES if f.__name__ == name)
    model, plain = twins(world, Stack)
    text = ""
    try:
        fail(model, world.rank)
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
    texts = world.gather(text)
    assert all(texts), texts
    assert all(len(each) < 1000 for each in texts), texts
    # And the model trains on.
    expect_step(world, model, plain)
