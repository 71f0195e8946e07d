"""The runtime's working memory: planned before the first step, kept to, and released between phases."""

from __future__ import annotations

import pytest
from support.bodies import (
    Stack,
    expect_gradients,
    expect_step,
    on_ranks,
    train_alone,
    twins,
    value_of,
)

import torch_mics as mics


@on_ranks()
def test_steps_keep_to_what_was_planned_before_the_first(world):
    model, _ = twins(world, Stack)
    planned = mics.memory(model)
    assert planned["full slots"] > 0
    for _ in range(3):
        value_of(model, world.rank).backward()
        assert mics.memory(model) == planned
        model.zero_grad()
    assert planned["unplanned"] == 0


@on_ranks()
def test_sums_beside_kept_gradients_are_counted_beside_the_plan(world):
    model, _ = twins(world, Stack)
    shards = sum(p.to_local().nbytes for p in model.parameters())
    value_of(model, world.rank).backward()
    assert mics.memory(model)["unplanned"] == 0
    value_of(model, world.rank).backward()
    counted = mics.memory(model)["unplanned"]
    assert counted >= shards
    value_of(model, world.rank).backward()
    assert mics.memory(model)["unplanned"] == counted


@on_ranks()
def test_units_unsharded_by_hand_are_counted_beside_the_plan(world):
    model, _ = twins(world, Stack)
    assert mics.memory(model)["unplanned"] == 0
    for layer in model.layers:
        layer.unshard()
    assert mics.memory(model)["unplanned"] > 0
    for layer in model.layers:
        layer.reshard()


@on_ranks()
def test_step_after_a_release_is_as_right_as_before(world):
    model, plain = twins(world, Stack)
    value_of(model, world.rank).backward()
    model.release_memory()
    train_alone(plain, value_of)
    expect_gradients(world, model, plain)
    model.zero_grad()
    value_of(model, world.rank).backward()
    expect_gradients(world, model, plain)


@on_ranks()
def test_memory_that_is_needed_is_not_released(world):
    model, plain = twins(world, Stack)
    with model.no_sync():
        value_of(model, world.rank).backward()
    with pytest.raises(ValueError, match="only between steps"):
        model.release_memory()
    value_of(model, world.rank).backward()
    for _ in range(2):
        train_alone(plain, value_of)
    expect_gradients(world, model, plain)
    model.unshard()
    with pytest.raises(ValueError, match="only between steps"):
        model.release_memory()


@on_ranks()
def test_reductions_in_flight_are_as_many_as_asked_for(world):
    model, _ = twins(world, Stack)
    two = mics.memory(model)["reductions"]
    for count in (1, 3):
        model, plain = twins(world, Stack)
        model.set_reduce_scatter_max_input_buffers(count)
        assert 2 * mics.memory(model)["reductions"] == count * two
        expect_step(world, model, plain)
    model.set_reduce_scatter_max_input_buffers(2)
    assert mics.memory(model)["reductions"] == two
    with pytest.raises(ValueError, match="at least one reduction"):
        model.set_reduce_scatter_max_input_buffers(0)


@on_ranks()
def test_prefetch_depths_are_as_asked_for(world):
    model, plain = twins(world, Stack, prefetch_depths=(0, 0))
    slots = {}
    for depths in (None, (2, 2), (1, 3)):
        if depths is not None:
            model.set_prefetch_depths(intra=depths[0], rail=depths[1])
        for trained in (model, plain):
            trained.zero_grad()
        value_of(model, world.rank).backward()
        train_alone(plain, value_of)
        expect_gradients(world, model, plain)
        slots[depths] = mics.memory(model)["full slots"]
    assert slots[None] < slots[1, 3] < slots[2, 2]


@on_ranks()
def test_prefetch_depths_that_cannot_be_are_refused_and_change_nothing(world):
    with pytest.raises(ValueError, match="0 <= intra <= rail"):
        twins(world, Stack, prefetch_depths=(2, 1))
    model, _ = twins(world, Stack)
    value_of(model, world.rank).backward()
    model.zero_grad()
    planned = mics.memory(model)
    with pytest.raises(ValueError, match="0 <= intra <= rail"):
        model.set_prefetch_depths(intra=-1, rail=2)
    with pytest.raises(ValueError, match="prefetch depths must be the same on every rank"):
        model.set_prefetch_depths(intra=1, rail=2 + world.rank)
    model.unshard()
    with pytest.raises(ValueError, match="only between steps"):
        model.set_prefetch_depths(intra=2, rail=2)
    model.reshard()
    value_of(model, world.rank).backward()
    assert mics.memory(model) == planned


@on_ranks()
def test_old_key_of_unplanned_memory_still_works(world):
    model, _ = twins(world, Stack)
    with pytest.warns(FutureWarning, match="unplanned"):
        assert mics.memory(model)["beside the plan"] == 0
    with pytest.raises(KeyError):
        mics.memory(model)["no such part"]
