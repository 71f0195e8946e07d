"""Training on ranks equals training in one process on the same global batch."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator

import pytest
from support.parity import (
    OPTIMIZERS,
    Case,
    Deviation,
    Reference,
    Task,
    deviation,
    run_all,
    train_alone,
)
from support.ranks import run_ranks

from torch_mics import _C

IS_WIDE = os.environ.get("MICS_WIDE") == "1"

# fp32 sums in another order than one process has: rounding only.
GRADIENT_LIMIT = 5e-7
PARAMETER_LIMIT = 2e-6


def topologies(world_size: int) -> Iterator[tuple[int, int, bool]]:
    """Every legal (ranks per node, partition size, hierarchical) that is not a repetition."""
    for ranks_per_node in range(1, world_size + 1):
        if world_size % ranks_per_node != 0:
            continue
        for size in _C.Topology.legal_partition_sizes(world_size, ranks_per_node):
            spans_nodes = size > ranks_per_node
            # Where a group is inside a node, both variants are one; nodes only matter when it is not.
            if not spans_nodes and ranks_per_node != world_size:
                continue
            for hierarchical in (False, True) if spans_nodes else (False,):
                yield ranks_per_node, size, hierarchical


def cases_of(world_size: int, tasks: list[Task]) -> list[Case]:
    return [Case(task, *topology) for task in tasks for topology in topologies(world_size)]


def run_cases(
    world_size: int, cases: list[Case] | list[Case | Task]
) -> Iterator[tuple[Case | Task, Deviation]]:
    tasks = {case if isinstance(case, Task) else case.task for case in cases}
    references: dict[Task, Reference] = {task: train_alone(task) for task in tasks}
    per_rank = run_ranks(world_size, run_all, cases, references, timeout=1500)
    for index, case in enumerate(cases):
        yield case, deviation(case, [results[index] for results in per_rank])


def all_tasks(world_size: int) -> list[Task]:
    combined = itertools.product((1, 3), (False, True), OPTIMIZERS)
    return [Task(world_size, *knobs) for knobs in combined]


def few_tasks(world_size: int) -> list[Task]:
    return [
        Task(world_size, 3, False, "sgd"),
        Task(world_size, 1, True, "momentum", tied=False),
        Task(world_size, 3, True, "adamw"),
    ]


def plan() -> list[tuple[int, list[Case]]]:
    """Without --wide: all topologies of 4 ranks, and those of 8 that span nodes, with fewer tasks.

    tests/cpp/engine_test.cc runs every legal topology up to 8 ranks, on threads.
    """
    if IS_WIDE:
        return [(n, cases_of(n, all_tasks(n))) for n in range(1, 9)]
    eight = Task(8, 3, False, "sgd")
    spanning = [Case(eight, 2, 8, True), Case(eight, 4, 8, True), Case(eight, 2, 4, True)]
    return [
        (2, cases_of(2, few_tasks(2))),
        (4, cases_of(4, few_tasks(4))),
        (8, [*spanning, Case(eight, 2, 8, False)]),
    ]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("world_size", "cases"), plan(), ids=[f"n{world_size}" for world_size, _ in plan()]
)
def test_training_equals_one_process(world_size: int, cases: list[Case]) -> None:
    ddp_runs = sorted({case.task for case in cases if case.task.optimizer == "adamw"}, key=str)
    ddp: dict[Task, float] = {}
    worst_gradient, worst_parameter, num_cases = 0.0, 0.0, 0
    for case, found in run_cases(world_size, [*ddp_runs, *cases]):
        if isinstance(case, Task):
            ddp[case] = found.parameter
            continue
        num_cases += 1
        assert found.replicas_agree, case
        assert found.gradient <= GRADIENT_LIMIT, (case, found)
        worst_gradient = max(worst_gradient, found.gradient)
        if case.task.optimizer == "adamw":
            # Near-zero gradients amplify rounding; DDP shows by how much. In a world of one it is exact.
            assert found.parameter <= max(2 * ddp[case.task], 1e-6), (case, found, ddp[case.task])
        else:
            assert found.parameter <= PARAMETER_LIMIT, (case, found)
            worst_parameter = max(worst_parameter, found.parameter)
    print(
        f"\n{num_cases} cases at n={world_size}: worst gradient {worst_gradient:.1e}, "
        f"worst parameter {worst_parameter:.1e}, AdamW under DDP {max(ddp.values(), default=0):.1e}"
    )
    assert num_cases == len(cases) > 0


def test_sums_instead_of_means_are_caught() -> None:
    task = Task(4, 1, False, "sgd")
    wrong = Case(task, 2, 4, True, divide_factor=1.0)
    right = Case(task, 2, 4, True)
    results = dict(run_cases(4, [wrong, right]))
    assert results[right].gradient <= GRADIENT_LIMIT
    assert results[wrong].gradient > 1.0
    assert results[wrong].parameter > 100 * PARAMETER_LIMIT


def test_two_runs_are_bitwise_equal() -> None:
    task = Task(4, 3, True, "momentum")
    cases = [Case(task, 2, 4, True), Case(task, 2, 4, True)]
    first, second = (found for _, found in run_cases(4, cases))
    assert first == second
    assert first.gradient > 0  # and not trivially equal
