"""State dicts and full parameters are those of FSDP2."""

from __future__ import annotations

import pytest
import torch
from support.fsdp2 import (
    DIMS,
    WORLD,
    assert_close,
    each_rank,
    gradients,
    mesh_of,
    on_ranks,
    ours,
    theirs,
    train,
    twins,
)
from support.models import TinyGPT, batch, loss, make_gpt
from support.values import assert_same, full_values, whole
from torch import nn
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.distributed.tensor import DTensor

import torch_mics as mics


@pytest.mark.parametrize("when", ["before a forward", "after a forward", "after a step"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dims", DIMS)
@each_rank
def test_state_dict_has_the_keys_placements_and_local_shapes_of_fsdp2(
    rank: int, dims: int, tied: bool, when: str
) -> None:
    mine, right = twins(dims, tied)
    if when == "after a forward":
        # Both keep the root's full parameters now.
        for model in (mine, right):
            model(batch(0, 0, rank)[0])
    elif when == "after a step":
        for model in (mine, right):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            loss(model, batch(0, 0, rank)).backward()
            optimizer.step()
    found, expected = mine.state_dict(), right.state_dict()
    assert list(found) == list(expected)
    assert type(found) is type(expected)
    for name, value in expected.items():
        twin = found[name]
        assert type(twin) is type(value) is DTensor, name
        assert twin.placements == value.placements, name
        assert twin.device_mesh == value.device_mesh, name
        assert twin.shape == value.shape, name
        assert twin.stride() == value.stride(), name
        assert twin.dtype == value.dtype, name
        assert twin.to_local().shape == value.to_local().shape, name
        if when != "after a step":
            assert torch.equal(twin.to_local(), value.to_local()), name
    if when == "after a forward":
        return
    named, expected_named = dict(mine.named_parameters()), dict(right.named_parameters())
    assert list(named) == list(expected_named)
    for name, parameter in expected_named.items():
        assert named[name].requires_grad == parameter.requires_grad
        assert type(named[name]) is type(parameter)
        if when == "after a step":
            assert type(named[name].grad) is type(parameter.grad) is DTensor
            assert named[name].grad.placements == parameter.grad.placements
            assert named[name].grad.to_local().shape == parameter.grad.to_local().shape


@pytest.mark.parametrize("after_forward", [False, True])
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("dims", DIMS)
@each_rank
def test_state_dict_of_fsdp2_loads_and_the_other_way_round(
    rank: int, dims: int, assign: bool, after_forward: bool
) -> None:
    data = batch(0, 0, rank)
    mine = ours(dims, make_gpt(seed=1))
    right = theirs(mesh_of(dims), make_gpt(seed=2))
    if after_forward:
        for model in (mine, right):
            loss(model, data).backward()
            model.zero_grad()
            model(data[0])
    optimizer = torch.optim.SGD(mine.parameters(), lr=0.1)
    mine.load_state_dict(right.state_dict(), assign=assign)
    values = full_values(make_gpt(seed=2))
    assert_same(full_values(mine), values)
    assert loss(mine, data).item() == pytest.approx(loss(right, data).item(), rel=1e-6)
    # It is the parameters of the optimizer that were loaded.
    loss(mine, data).backward()
    optimizer.step()
    assert not torch.equal(whole(mine.head.weight), values["head.weight"])

    # The other way round.
    mine, right = ours(dims, make_gpt(seed=3)), theirs(mesh_of(dims), make_gpt(seed=4))
    if after_forward:
        for model in (mine, right):
            model(data[0])
    right.load_state_dict(mine.state_dict(), assign=assign)
    assert_same(full_values(right), full_values(make_gpt(seed=3)))
    assert loss(right, data).item() == pytest.approx(loss(mine, data).item(), rel=1e-6)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dims", DIMS)
@each_rank
def test_state_dict_of_fsdp2_is_assigned_to_a_model_on_the_meta_device(
    rank: int, dims: int, tied: bool
) -> None:
    source = theirs(mesh_of(dims), make_gpt(tied))
    with torch.device("meta"):
        model = TinyGPT(tied)
    ours(dims, model)
    model.load_state_dict(source.state_dict(), assign=True)
    optimizer = torch.optim.AdamW(model.parameters())
    assert_same(full_values(model), full_values(make_gpt(tied)))
    data = batch(0, 0, rank)
    value = loss(model, data)
    assert value.item() == pytest.approx(loss(source, data).item(), rel=1e-6)
    value.backward()
    optimizer.step()
    assert not torch.equal(whole(model.head.weight), make_gpt(tied).head.weight)
    # What forward uses is what the state dict shows.
    plain = make_gpt(tied)
    plain.load_state_dict(full_values(model))
    assert loss(model, data).item() == pytest.approx(loss(plain, data).item(), rel=1e-6)


@each_rank
def test_assigning_plain_tensors_is_refused_and_nothing_is_changed(rank: int) -> None:
    model = ours(2)
    before = full_values(model)
    with pytest.raises(ValueError, match=r"must bring DTensors .*load_full_state_dict"):
        model.load_state_dict(make_gpt(seed=1).state_dict(), assign=True)
    assert_same(full_values(model), before)
    loss(model, batch(0, 0, rank)).backward()


@each_rank
def test_load_state_dict_is_strict_about_keys(rank: int) -> None:
    model = ours(2)
    state = model.state_dict()
    state.pop("blocks.1.up.weight")
    with pytest.raises(RuntimeError, match=r"Missing key.*blocks\.1\.up\.weight"):
        model.load_state_dict(state)
    assert model.load_state_dict(state, strict=False).missing_keys == ["blocks.1.up.weight"]


# --- full parameters ------------------------------------------------------------------------------


def _is_sharded(model: nn.Module) -> dict[str, bool]:
    return {name: isinstance(p, DTensor) for name, p in model.named_parameters()}


def _count_gathers(rank: int, reshard_after_forward: bool | None) -> list[int]:
    """Gathers of units in a step, in one under another setting, and in a forward after it."""
    model = ours(2, reshard_after_forward=reshard_after_forward)
    counts: list[int] = []
    seen = 0

    def count() -> None:
        nonlocal seen
        calls = mics.traffic(model)["gather/intra"]["calls"]
        counts.append(calls - seen)
        seen = calls
        # Unlike FSDP2, modules hold the sharded parameters whenever no forward or backward runs.
        assert all(_is_sharded(model).values())

    for _ in range(2):
        value = loss(model, batch(0, 0, rank))
        assert all(_is_sharded(model).values())
        value.backward()
        count()
        model.set_reshard_after_backward(False)
    with torch.no_grad():
        loss(model, batch(0, 0, rank))
    count()
    return counts


@pytest.mark.parametrize(
    ("reshard_after_forward", "counts"),
    [
        # One per unit of four in forward and in backward; the root alone is kept for backward. After a
        # boundary every unit is gathered anew: weights may have been written in ways that nobody sees.
        (None, [7, 7, 4]),
        (True, [8, 8, 4]),
        (False, [4, 4, 4]),
    ],
)
def test_full_parameters_are_kept_where_fsdp2_keeps_them(
    reshard_after_forward: bool | None, counts: list[int]
):
    assert on_ranks(_count_gathers, reshard_after_forward) == [counts] * WORLD


@pytest.mark.parametrize("async_op", [False, True])
@each_rank
def test_unshard_registers_full_parameters_of_its_unit_until_reshard(
    rank: int, async_op: bool
) -> None:
    model, plain = ours(2), make_gpt()
    block = model.blocks[1]
    sharded = dict(block.named_parameters())

    def gather() -> None:
        handle = block.unshard(async_op=async_op)
        if not async_op:
            assert handle is None
            return
        handle.wait()
        handle.wait()

    gather()
    full = dict(block.named_parameters())
    for name, value in plain.blocks[1].named_parameters():
        assert type(full[name]) is nn.Parameter
        assert torch.equal(full[name], value)
        assert full[name].requires_grad
    # Of its own unit alone.
    assert all(isinstance(p, DTensor) for p in model.blocks[0].parameters())
    assert all(isinstance(p, DTensor) for p in (model.norm.weight, model.head.weight))
    assert torch.equal(block.up(torch.ones(1, 12)), plain.blocks[1].up(torch.ones(1, 12)))
    block.reshard()
    block.reshard()
    assert all(now is sharded[name] for name, now in block.named_parameters())
    # Gathered again after a change, not kept.
    with torch.no_grad():
        block.up.weight.mul_(2)
    gather()
    assert torch.equal(block.up.weight, plain.blocks[1].up.weight * 2)
    block.reshard()
    model.unshard()
    assert not any(isinstance(p, DTensor) for p in (model.norm.weight, model.head.weight))
    assert all(isinstance(p, DTensor) for p in block.parameters())
    model.reshard()
    loss(model, batch(0, 0, rank)).backward()
    assert all(p.grad is not None for p in model.parameters())


@each_rank
def test_prefetch_changes_no_value(rank: int) -> None:
    found = []
    for prefetches in (False, True):
        model = ours(2)
        if prefetches:
            blocks = list(model.blocks)
            model.set_modules_to_forward_prefetch(blocks[:1])
            for i in range(2):
                blocks[i].set_modules_to_forward_prefetch([blocks[i + 1]])
                blocks[i + 1].set_modules_to_backward_prefetch([blocks[i]])
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        found.append((train(rank, model, optimizer, None), full_values(model)))
    assert found[0][0] == found[1][0]
    assert_same(found[1][1], found[0][1])


@each_rank
def test_registered_forward_method_gathers_and_reduces_as_forward_does(rank: int) -> None:
    data = batch(0, 0, rank)
    found = []
    for sharded in (False, True):
        model = make_gpt()
        if sharded:
            ours(1, model)
            register_fsdp_forward_method(model, "encode")
        encoded = model.encode(data[0])
        if sharded:
            assert isinstance(model.blocks[0].up.weight, DTensor)
        encoded.square().sum().backward()
        if not sharded:
            # Every rank uses the first rank's gradient, so the mean of those is the reference.
            for parameter in model.parameters():
                if parameter.grad is not None:
                    torch.distributed.all_reduce(parameter.grad)
                    parameter.grad /= WORLD
        found.append((encoded.detach().clone(), gradients(model)))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-6, atol=1e-6)
    assert_close(found[1][1], found[0][1], rtol=1e-4, atol=1e-5)
    assert found[1][1]["head.weight"] is None
    assert found[1][1]["blocks.2.up.weight"].abs().sum() > 0
