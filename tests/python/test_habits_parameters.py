"""Hooks on parameters, parameters outside units, wrapped models, and gathers that nothing needs."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from support.bodies import (
    WORLD,
    Layer,
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
from torch.distributed._composable.replicate import replicate
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, share_comm_ctx
from torch.distributed.tensor import DTensor

import torch_mics as mics

# --- parameters and modules outside units ---------------------------------------------------------


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4))


@on_ranks(4, 2, cases=["alone", "replicate"])
def test_unit_inside_a_plain_model_trains_as_in_fsdp2(world, around):
    ours, theirs = make(net), make(net)
    mics.fully_shard(ours[2], mesh=world.mesh)
    fully_shard(theirs[2], mesh=init_device_mesh("cpu", (WORLD,)))
    if around == "replicate":
        for model in (ours, theirs):
            replicate(model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (ours, theirs)]
    for _ in range(2):
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            model(points(world.rank)).square().mean().backward()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                optimizer.step()
            if model is ours and around == "alone" and not _seen:
                assert any("is in no unit" in str(w.message) for w in caught)
                _seen.append(1)
            optimizer.zero_grad()
        _seen.append(1)
    _seen.clear()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in (mine, other)]
        torch.testing.assert_close(*whole)


_seen: list[int] = []


class Empty(Layer):
    """With parameters that hold nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(0, 5))
        self.thin = nn.Parameter(torch.zeros(4, 0))


@on_ranks(4, 2)
def test_parameters_without_elements_need_no_use(world):
    model, plain = twins(world, Stack, Empty)
    for _ in range(2):
        expect_step(world, model, plain)
        optimizers = [mics.optim.AdamW(model.parameters(), lr=0.0)]
        optimizers.append(torch.optim.AdamW(model.parameters(), lr=0.0, foreach=True))
        for optimizer in optimizers:
            optimizer.step()
        mics.clip_grad_norm_(model.parameters(), 1e9)
    copy.deepcopy(model.state_dict())
    assert mics.full_state_dict(model, rank0_only=False)["layers.0.nothing"].shape == (0, 5)


@on_ranks(4)
def test_streams_of_models_are_shared_already(world):
    models = [twins(world, Stack)[0] for _ in range(2)]
    share_comm_ctx(models)
    total = sum(value_of(model, world.rank) for model in models)
    total.backward()


@on_ranks(4, 2, cases=["new name", "new values", "same values"])
def test_parameter_that_is_set_after_sharding_is_taken_or_named(world, kind):
    """A new one is the script's own; one in place of a sharded one must be a sharded one."""
    model, plain = twins(world, Stack)
    if kind == "new name":

        def forward(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
            return output * module.gain

        for each in (model, plain):
            each.gain = nn.Parameter(torch.full((5,), 2.0))
            each.register_forward_hook(forward)
        value_of(model, world.rank).backward()
        train_alone(plain, value_of)
        grad = model.gain.grad.clone()
        torch.distributed.all_reduce(grad)
        torch.testing.assert_close(grad / WORLD, plain.gain.grad)
        return
    value = torch.ones(5, 6) if kind == "new values" else plain.head.weight.detach().clone()
    model.head.weight = nn.Parameter(value)
    with pytest.raises(ValueError, match="must not be replaced: got another tensor in place of"):
        model(points(0))


@on_ranks(4, 2, cases=["before the forward", "inside the forward"])
def test_module_is_never_half_swapped(world, when):
    model, plain = twins(world, Stack)
    sharded = model.head.weight
    others = [torch.ones(5, 6)]

    def put_another(*_: Any) -> None:
        if others:
            model.head.weight = nn.Parameter(others.pop())

    handle = model.head.register_forward_pre_hook(put_another)
    if when == "before the forward":
        put_another()
    with pytest.raises(ValueError, match="must not be replaced: got another tensor in place of"):
        model(points(0))
    handle.remove()
    ours = [p for name, p in model.named_parameters() if name != "head.weight"]
    assert all(isinstance(parameter, DTensor) for parameter in ours)
    model.head.weight = sharded
    model.reset()
    value_of(model, world.rank).backward()
    train_alone(plain, value_of)
    expect_gradients(world, model, plain)


# --- what wraps a model ---------------------------------------------------------------------------


@on_ranks(4, 2)
def test_calls_take_a_model_that_torch_compile_has_wrapped(world):
    model, plain = twins(world, Stack)
    compiled: Any = torch.compile(model, backend="eager")
    for micro_step in range(2):
        with mics.microbatch(compiled, is_last=micro_step == 1):
            (value_of(compiled, world.rank) / 2).backward()
        train_alone(plain, value_of, 2)
    expect_gradients(world, model, plain)
    assert mics.traffic(compiled) == mics.traffic(model)
    assert mics.memory(compiled) == mics.memory(model)
    assert mics.describe(compiled) == mics.describe(model)
    assert list(mics.full_state_dict(compiled, rank0_only=False)) == list(plain.state_dict())
    with mics.unsharded(compiled):
        assert not isinstance(model.head.weight, DTensor)
    mics.load_full_state_dict(compiled, plain.state_dict())


@on_ranks(4)
def test_class_of_a_sharded_module_keeps_its_name(world):
    model, plain = twins(world, Stack)
    assert type(model).__name__ == "Stack"
    assert type(model).__qualname__ == type(plain).__qualname__
    assert type(model).__module__ == type(plain).__module__
    assert isinstance(model, Stack | mics.MiCSModule)
    assert type(model) is not type(plain)
    assert "mics:" in repr(model)


# --- waste ----------------------------------------------------------------------------------------


@on_ranks(4, 2, cases=["shard", "full"])
def test_unit_that_backward_does_not_need_is_gathered_once_per_micro_step(world, keep):
    """An embedding's backward needs no weight: set_unshard_in_backward(False)."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(7, 6)
            self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.embed(ids)
            for layer in self.layers:
                x = torch.tanh(layer(x))
            return x

    model = make(Net)
    mics.fully_shard(model.embed, mesh=world.mesh, keep_between_microsteps=keep)
    for layer in model.layers:
        mics.fully_shard(layer, mesh=world.mesh)
    mics.fully_shard(model, mesh=world.mesh)
    model.embed.set_unshard_in_backward(False)
    plain = make(Net)

    def value(each: Any, rank: int) -> torch.Tensor:
        ids = torch.randint(7, (2, 4), generator=torch.Generator().manual_seed(rank))
        return each(ids).square().mean()

    counts = []
    for _ in range(3):
        before = mics.traffic(model).get("gather/intra", {"calls": 0})["calls"]
        for micro_step in range(3):
            with mics.microbatch(model, is_last=micro_step == 2):
                (value(model, world.rank) / 3).backward()
            train_alone(plain, value, 3)
        expect_gradients(world, model, plain)
        model.zero_grad()
        plain.zero_grad()
        counts.append(mics.traffic(model)["gather/intra"]["calls"] - before)
    # Layers twice per micro-step; the embedding once, or once per step where it is kept.
    expected = 3 * 2 * 2 + (1 if keep == "full" else 3)
    assert counts == [expected] * 3, counts


# --- hooks on parameters --------------------------------------------------------------------------


@on_ranks(4, 2)
def test_post_accumulate_hooks_run_once_per_parameter_and_boundary_in_one_order(world):
    model, plain = twins(world, Stack)
    seen: list[str] = []
    for name, parameter in model.named_parameters():

        def hook(p: torch.Tensor, name: str = name, parameter: Any = parameter) -> None:
            assert p is parameter
            assert p.grad is not None
            seen.append(name)

        parameter.register_post_accumulate_grad_hook(hook)
    for micro_step in range(3):
        with mics.microbatch(model, is_last=micro_step == 2):
            (value_of(model, world.rank) / 3).backward()
        train_alone(plain, value_of, 3)
        if micro_step < 2:
            assert seen == []
    assert sorted(seen) == sorted(name for name, _ in plain.named_parameters())
    assert all(each == seen for each in world.gather(seen))
    expect_gradients(world, model, plain)


@on_ranks(4, 2, cases=["AdamW", "SGD", "mics.AdamW", "removed", "clip"])
def test_optimizer_in_backward_trains_as_in_one_process(world, kind):
    model, plain = twins(world, Stack)
    classes: dict[str, Any] = {"SGD": torch.optim.SGD, "mics.AdamW": mics.optim.AdamW}
    handles = []
    for each in (model, plain):
        for parameter in each.parameters():
            cls = classes.get(kind, torch.optim.AdamW)
            cls = torch.optim.AdamW if each is plain and kind == "mics.AdamW" else cls
            optimizer = cls([parameter], lr=0.01)

            def hook(p: torch.Tensor, optimizer: Any = optimizer) -> None:
                if kind == "clip":
                    p.grad.mul_(0.5)
                optimizer.step()
                optimizer.zero_grad()

            handles.append(parameter.register_post_accumulate_grad_hook(hook))
    if kind == "removed":
        for handle in handles:
            handle.remove()
    for step in range(3):
        model(points(world.rank, step)).square().mean().backward()
        values = [plain(points(rank, step)).square().mean() for rank in range(WORLD)]
        torch.stack(values).mean().backward()
        if kind == "removed":
            expect_gradients(world, model, plain)
        else:
            assert all(p.grad is None for p in model.parameters())
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.full_tensor(), other, rtol=2e-3, atol=1e-5)


@on_ranks(4, 2)
def test_unused_parameter_has_no_hook_call(world):
    class Half(Stack):
        def run_layers(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers[0](x, False)

    model, _ = twins(world, Half)
    seen: list[str] = []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: seen.append(name))
    value_of(model, world.rank).backward()
    assert not any("spare" in name or "layers.1" in name for name in seen)
    assert "layers.0.up.weight" in seen


@on_ranks(4, 2)
def test_exception_in_a_hook_comes_out_of_backward_and_leaves_the_gradients(world):
    model, plain = twins(world, Stack)

    def fail(_: torch.Tensor) -> None:
        raise ArithmeticError("on purpose")

    handle = model.head.bias.register_post_accumulate_grad_hook(fail)
    with pytest.raises(ArithmeticError, match="on purpose"):
        value_of(model, world.rank).backward()
    handle.remove()
    train_alone(plain, value_of)
    expect_gradients(world, model, plain)


@on_ranks(4, cases=["before the first forward", "after a step", "between forward and backward"])
def test_register_hook_on_a_sharded_parameter_is_refused_by_name(world, when):
    model, plain = twins(world, Stack)
    if when == "after a step":
        value_of(model, world.rank).backward()
        model.zero_grad()
    value = value_of(model, world.rank) if when == "between forward and backward" else None
    handle = model.layers[1].up.weight.register_hook(lambda grad: grad)
    with pytest.raises(RuntimeError, match=r'register_hook on "up\.weight" of unit "layers\.1"'):
        value_of(model, world.rank) if value is None else value.backward()
    handle.remove()
    model.reset()
    model.zero_grad()
    expect_step(world, model, plain)


@on_ranks(4, cases=["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_on_parameters_that_are_about_to_be_replaced_are_refused(world, method):
    model = make(Stack)
    getattr(model.layers[1].up.weight, method)(lambda grad: None)
    with pytest.raises(ValueError, match=r'no gradient hooks.* for "up.weight"'):
        mics.fully_shard(model.layers[1], mesh=world.mesh)
    assert not isinstance(model.layers[1].up.weight, DTensor)


@on_ranks(4)
def test_attributes_of_parameters_are_kept(world):
    """Frameworks mark parameters for their optimizers."""
    model = make(Stack)
    for name, parameter in model.named_parameters():
        parameter.no_weight_decay = name.endswith("bias")  # type: ignore[attr-defined]
    model = shard(world, model)
    value_of(model, world.rank).backward()
    for name, parameter in model.named_parameters():
        assert parameter.no_weight_decay == name.endswith("bias")
    model.layers[0].unshard()
    assert model.layers[0].up.bias.no_weight_decay
    model.layers[0].reshard()
