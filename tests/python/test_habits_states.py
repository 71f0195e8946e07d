"""Copies, pickles, names and checkpoints of sharded models and their optimizers, as scripts make them."""

from __future__ import annotations

import copy
import io
import pathlib
import pickle
import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from support.bodies import (
    WORLD,
    Stack,
    expect_gradients,
    expect_values,
    make,
    on_ranks,
    points,
    shard,
    train_alone,
    twins,
    value_of,
)
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import torch_mics as mics

# --- copies and pickles ---------------------------------------------------------------------------


def by_save(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "torch.save": by_save,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
}
OPTIMIZERS = {"AdamW": torch.optim.AdamW, "mics.AdamW": mics.optim.AdamW}


def step(model: Any, optimizer: Any, rank: int, number: int = 0) -> None:
    model(points(rank, number)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def expect_same(mine: Any, other: Any, *, is_other_memory: bool = True) -> None:
    """The same tree of values, in memory of its own."""
    if isinstance(mine, DTensor):
        assert isinstance(other, DTensor)
        assert mine.placements == other.placements
        assert mine.device_mesh == other.device_mesh
        expect_same(mine.to_local(), other.to_local(), is_other_memory=is_other_memory)
    elif isinstance(mine, torch.Tensor):
        assert torch.equal(mine, other)
        if is_other_memory and mine.numel():
            assert mine.data_ptr() != other.data_ptr()
    elif isinstance(mine, dict):
        assert mine.keys() == other.keys()
        for key in mine:
            expect_same(mine[key], other[key], is_other_memory=is_other_memory)
    elif isinstance(mine, list | tuple):
        for left, right in zip(mine, other, strict=True):
            expect_same(left, right, is_other_memory=is_other_memory)
    else:
        assert mine == other


@on_ranks(4, 2, 1, cases=[(c, o) for c in COPIES for o in OPTIMIZERS])
def test_states_parameters_and_meshes_can_be_copied(world, case):
    duplicate, optimizer_class = COPIES[case[0]], OPTIMIZERS[case[1]]
    model, plain = twins(world, Stack)
    optimizer = optimizer_class(model.parameters(), lr=0.01)
    plain_optimizer = torch.optim.AdamW(plain.parameters(), lr=0.01)
    step(model, optimizer, 0)
    step(plain, plain_optimizer, 0)
    model(points(0)).sum().backward()
    values = {
        "state": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "parameters": [p.detach() for p in model.parameters()],
        "data": [p.data for p in model.parameters()],
        "gradients": [p.grad for p in model.parameters()],
        "both": {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3},
    }
    for name, value in values.items():
        kept = duplicate(value)
        expect_same(value, kept)
        assert name
    parameter = model.layers[0].up.bias
    expect_same(parameter.detach(), duplicate(parameter).detach())
    mesh = duplicate(world.mesh)
    assert mesh == world.mesh
    duplicate(optimizer)
    # A copy is no part of the model: training goes on with the original.
    kept = duplicate(model.state_dict())
    model.zero_grad()
    before = copy.deepcopy(kept)
    step(model, optimizer, 0, 1)
    step(plain, plain_optimizer, 0, 1)
    expect_same(kept, before)
    with torch.no_grad():
        torch.testing.assert_close(model(points(2)), plain(points(2)))
    model.load_state_dict(kept)
    expect_same(model.state_dict(), before)


@on_ranks(4, 2)
def test_best_state_is_kept_in_memory_and_restored(world):
    """What early stopping does."""
    model, plain = twins(world, Stack)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, plain)]
    best = []
    for each, optimizer in zip((model, plain), optimizers, strict=True):
        step(each, optimizer, 0)
        best.append((copy.deepcopy(each.state_dict()), copy.deepcopy(optimizer.state_dict())))
        for number in range(2):
            step(each, optimizer, 0, number)
        each.load_state_dict(best[-1][0])
        optimizer.load_state_dict(best[-1][1])
        step(each, optimizer, 0, 5)
    for mine, right in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.full_tensor(), right)


@on_ranks(4, cases=["deepcopy", "pickle", "torch.save"])
def test_sharded_module_says_what_to_do_instead_of_a_copy(world, name):
    model, _ = twins(world, Stack)
    with pytest.raises(
        RuntimeError, match=r"must not be (copied|pickled): got .*Stack.*state_dict"
    ):
        COPIES[name](model)
    with pytest.raises(RuntimeError, match=r"must not be (copied|pickled): got .*Layer"):
        COPIES[name](model.layers[0])
    assert copy.copy(model).layers is model.layers


@on_ranks(4, 2)
def test_asynchronous_save_of_states_in_the_middle_of_training(world):
    model, plain = twins(world, Stack)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-3)
    plain_optimizer = torch.optim.AdamW(plain.parameters(), lr=0.01, eps=1e-3)
    step(model, optimizer, 0)
    step(plain, plain_optimizer, 0)
    saved = {n: p.detach().clone() for n, p in plain.named_parameters()}
    paths = world.gather(tempfile.mkdtemp())
    state = mics.checkpoint.TrainState(model, optimizer)
    futures = [
        dcp.async_save({"train": state}, checkpoint_id=paths[0] + "/train"),
    ]
    futures[-1].result()
    futures.append(dcp.async_save(model.state_dict(), checkpoint_id=paths[0] + "/model"))
    step(model, optimizer, 0, 1)
    step(plain, plain_optimizer, 0, 1)
    futures[-1].result()
    expect = {n: p.detach().clone() for n, p in plain.named_parameters()}
    for mine, right in zip(model.parameters(), expect.values(), strict=True):
        torch.testing.assert_close(mine.full_tensor(), right)
    read = model.state_dict()
    dcp.load(read, checkpoint_id=paths[0] + "/model")
    model.load_state_dict(read)
    for mine, right in zip(model.parameters(), saved.values(), strict=True):
        torch.testing.assert_close(mine.full_tensor(), right)
    state.load(paths[0] + "/train")
    for mine, right in zip(model.parameters(), saved.values(), strict=True):
        torch.testing.assert_close(mine.full_tensor(), right)


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
    # Into a model that is wrapped in another way, from the file and from the full state.
    for other_wrap in (lambda m: m, *WRAPPINGS):
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
    value_of(model, world.rank).backward()
    train_alone(plain, value_of)
    expect_gradients(world, model, plain)


# --- optimizer steps with a closure ---------------------------------------------------------------


def closure_of(model: Any, optimizer: Any, ranks: Any, micro_steps: int) -> Callable[[], Any]:
    """Micro-steps but the last outside, the last in the closure, as Lightning has it."""

    def closure() -> Any:
        losses = []
        for rank in ranks:
            loss = value_of(model, rank) / (len(ranks) * micro_steps)
            loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    return closure


@on_ranks(4, 2, cases=["SGD", "AdamW", "mics.SGD"])
def test_last_micro_step_may_run_in_the_closure(world, name):
    model, plain = twins(world, Stack)
    classes = {
        "SGD": (torch.optim.SGD, torch.optim.SGD),
        "AdamW": (torch.optim.AdamW, torch.optim.AdamW),
        "mics.SGD": (mics.optim.SGD, torch.optim.SGD),
    }
    mine, right = (
        cls(m.parameters(), lr=0.1) for cls, m in zip(classes[name], (model, plain), strict=True)
    )
    for number in range(2):
        with model.no_sync():
            (model(points(world.rank, number)).square().mean() / 2).backward()
        for rank in range(WORLD):
            (plain(points(rank, number)).square().mean() / (2 * WORLD)).backward()
        if number:
            mine.step(closure_of(model, mine, [world.rank], 2))
            right.step(closure_of(plain, right, range(WORLD), 2))
        else:
            mine.step(closure=closure_of(model, mine, [world.rank], 2))
            right.step(closure=closure_of(plain, right, range(WORLD), 2))
        mine.zero_grad()
        right.zero_grad()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.full_tensor(), other, rtol=1e-3, atol=1e-5)
    # A closure that leaves the accumulation open is found when it has run, before the step.
    before = copy.deepcopy(model.state_dict())

    def unfinished() -> Any:
        with model.no_sync():
            value_of(model, world.rank).backward()

    with pytest.raises(RuntimeError, match=r"in units .*outside"):
        mine.step(unfinished)
    expect_same(before, model.state_dict(), is_other_memory=False)
    assert dist.get_world_size() == WORLD


@on_ranks(4, 2)
def test_lbfgs_calls_its_closure_several_times(world):
    models = [make(nn.Linear, 3, 4) for _ in range(3)]
    ours, theirs, plain = models
    mics.fully_shard(ours, mesh=world.mesh)
    fully_shard(theirs, mesh=init_device_mesh("cpu", (WORLD,)))
    for model in models:
        ranks = range(WORLD) if model is plain else [world.rank]
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=4)
        calls = []

        def closure(
            model: Any = model, ranks: Any = ranks, optimizer: Any = optimizer, calls: Any = calls
        ) -> Any:
            optimizer.zero_grad()
            loss = torch.stack([(value_of(model, r) - 1).square() for r in ranks]).mean()
            loss.backward()
            calls.append(1)
            loss = loss.detach()
            if model is not plain:
                dist.all_reduce(loss)
                loss /= WORLD
            return loss

        optimizer.step(closure)
        assert len(calls) > 1
    for mine, other, right in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(mine.full_tensor(), other.full_tensor(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(mine.full_tensor(), right, rtol=1e-4, atol=1e-6)


@on_ranks(4, 2)
def test_a_save_between_forward_and_backward_changes_nothing(world):
    """Also before the first step, for which torch makes the optimizer's state by a step of its own."""
    model, plain = twins(world, Stack)
    state = mics.checkpoint.TrainState(model, torch.optim.AdamW(model.parameters()))
    path = world.gather(tempfile.mkdtemp())[0]
    loss = value_of(model, world.rank)
    state.save(path)
    loss.backward()
    train_alone(plain, value_of)
    expect_gradients(world, model, plain)
    expect_values(model, plain)


class Partial(Stack):
    """Its layers use their spare parts only when asked to."""

    uses_spare = False

    def run_layers(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x, self.uses_spare)
        return x


@on_ranks(4, 2, cases=["AdamW", "SGD", "mics.AdamW"])
def test_optimizer_states_of_some_parameters_are_saved_and_loaded(world, kind):
    """A parameter has none before its first gradient, and keeps it when it is frozen."""

    def make_optimizer(model: Any) -> Any:
        if kind == "SGD":
            return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        is_ours = kind == "mics.AdamW" and isinstance(model, mics.MiCSModule)
        return (mics.optim if is_ours else torch.optim).AdamW(model.parameters(), lr=0.01, eps=1e-3)

    path = world.gather(tempfile.mkdtemp())[0]
    both = twins(world, Partial)
    optimizers = [make_optimizer(each) for each in both]
    for each, optimizer in zip(both, optimizers, strict=True):
        step(each, optimizer, 0)
        each.embed.requires_grad_(False)
    mics.checkpoint.TrainState(both[0], optimizers[0]).save(path)
    saved = copy.deepcopy([both[1].state_dict(), optimizers[1].state_dict()])
    for is_fresh in (False, True):
        for which, each in enumerate(both):
            each.uses_spare = True
            if is_fresh:
                optimizers[which] = make_optimizer(each)
            else:
                step(each, optimizers[which], 0, 1)
        mics.checkpoint.TrainState(both[0], optimizers[0]).load(path)
        both[1].load_state_dict(saved[0])
        optimizers[1].load_state_dict(copy.deepcopy(saved[1]))
        counts = [
            [len(o.state.get(p, {})) for p in each.parameters()]
            for each, o in zip(both, optimizers, strict=True)
        ]
        assert counts[0] == counts[1]
        assert not any(p.requires_grad for p in both[0].embed.parameters())
        for number in range(2):
            for each, optimizer in zip(both, optimizers, strict=True):
                step(each, optimizer, 0, 3 + number)
                each.embed.requires_grad_(number == 0)
        for mine, right in zip(both[0].parameters(), both[1].parameters(), strict=True):
            torch.testing.assert_close(mine.full_tensor(), right)


@on_ranks(4, 2, cases=["AdamW", "mics.AdamW"])
def test_fresh_optimizer_has_the_loaded_state(world, kind):
    model, _ = twins(world, Stack)
    path = world.gather(tempfile.mkdtemp())[0]
    optimizer = OPTIMIZERS[kind](model.parameters(), lr=0.01)
    step(model, optimizer, world.rank)
    mics.checkpoint.TrainState(model, optimizer).save(path)
    saved = optimizer.state_dict()
    other = OPTIMIZERS[kind](model.parameters(), lr=0.01)
    mics.checkpoint.TrainState(model, other).load(path)
    expect_same(saved["state"], other.state_dict()["state"])
    assert any(s["exp_avg"].to_local().any() for s in saved["state"].values())
