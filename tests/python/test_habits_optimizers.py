"""Copies, pickles, closures and states of models and their optimizers, as scripts make them."""

from __future__ import annotations

import copy
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
    train_alone,
    twins,
    value_of,
)
from support.program_habits import by_save
from support.states import OPTIMIZERS, expect_same, step
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import torch_mics as mics


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


# --- copies and pickles ---------------------------------------------------------------------------


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "torch.save": by_save,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
}


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
    futures = [dcp.async_save({"train": state}, checkpoint_id=paths[0] + "/train")]
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
