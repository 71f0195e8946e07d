"""The runtime's working memory: planned before the first step, kept to, and released between phases."""

from __future__ import annotations

import pytest
from support.bodies import Stack, expect_gradients, on_ranks, train_alone, twins, value_of

import torch_mics as mics


@on_ranks()
def test_steps_keep_to_what_was_planned_before_the_first(world):
    model, _ = twins(world, Stack)
    planned = mics.memory(model)
    assert planned["full slots"] > 0
    for _ in range(3):
        value_of(model, world.rank).backward()
        assert mics.memory(model) == planned
    assert planned["beside the plan"] == 0


@on_ranks()
def test_units_unsharded_by_hand_are_counted_beside_the_plan(world):
    model, _ = twins(world, Stack)
    assert mics.memory(model)["beside the plan"] == 0
    for layer in model.layers:
        layer.unshard()
    assert mics.memory(model)["beside the plan"] > 0
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
    with pytest.raises(ValueError, match="between steps"):
        model.release_memory()
    value_of(model, world.rank).backward()
    for _ in range(2):
        train_alone(plain, value_of)
    expect_gradients(world, model, plain)
    model.unshard()
    with pytest.raises(ValueError, match="between steps"):
        model.release_memory()


@on_ranks()
def test_reductions_in_flight_are_as_many_as_asked_for(world):
    model, _ = twins(world, Stack)
    two = mics.memory(model)["reductions"]
    for count in (1, 3):
        model, plain = twins(world, Stack)
        model.set_reduce_scatter_max_input_buffers(count)
        assert 2 * mics.memory(model)["reductions"] == count * two
        value_of(model, world.rank).backward()
        train_alone(plain, value_of)
        expect_gradients(world, model, plain)
    with pytest.raises(RuntimeError, match="before the first forward"):
        model.set_reduce_scatter_max_input_buffers(2)
    with pytest.raises(ValueError, match="at least one reduction"):
        model.set_reduce_scatter_max_input_buffers(0)
