"""Groups that cannot be made, and models that differ between ranks, are refused on every rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.errors import WORLD, expect, outcomes_of, refused_on_each_rank, sharded_gpt
from support.models import batch, loss, make_gpt
from support.ranks import run_ranks
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

import torch_mics as mics

# --- groups ---------------------------------------------------------------------------------------


def _make_mesh(rank: int, shard_size: Any) -> None:
    mics.init_mesh(shard_size)


def test_shard_size_that_does_not_divide_the_world_lists_the_legal_ones():
    expect(
        outcomes_of(_make_mesh, 3),
        "ValueError",
        "partition_size must divide world_size",
        "partition_size=3, world_size=4",
        "Use 1, 2 or 4",
    )


@pytest.mark.parametrize("shard_size", [0, -2])
def test_shard_size_below_one_lists_the_legal_ones(shard_size: int):
    expect(
        outcomes_of(_make_mesh, shard_size),
        "ValueError",
        "partition_size must be at least 1",
        f"partition_size={shard_size}",
        "Use 1, 2 or 4",
    )


def test_shard_size_that_does_not_fit_the_nodes_lists_the_legal_ones():
    # Every divisor of four fits nodes of equal size; the topology is where sizes are judged.
    with pytest.raises(
        ValueError, match="must divide the ranks per node or be a multiple"
    ) as error:
        mics._C.Topology(node_of_rank=list("aaabbb"), partition_size=2)
    assert "partition_size=2, ranks_per_node=3, world_size=6" in str(error.value)
    assert "Use 1, 3 or 6" in str(error.value)


@pytest.mark.parametrize(
    ("shard_size", "error_type"), [("nodes", "ValueError"), (True, "TypeError"), (2.0, "TypeError")]
)
def test_shard_size_of_another_kind_is_refused(shard_size: Any, error_type: str):
    expect(
        outcomes_of(_make_mesh, shard_size),
        error_type,
        'shard_size must be an int, "node" or "world"',
        f"got {shard_size!r}",
    )


@refused_on_each_rank(
    "ValueError", "gpus_per_node must divide the world size", "gpus_per_node=3, world_size=4"
)
def test_gpus_per_node_that_does_not_divide_the_world_is_refused(rank: int) -> None:
    mics.init_mesh(2, gpus_per_node=3)


@refused_on_each_rank(
    "ValueError",
    "must be the same on every rank",
    "shard_size = 2 on world_rank 0 and 4 on world_rank 3",
)
def test_shard_size_that_differs_between_ranks_is_named(rank: int) -> None:
    sharded_gpt(shard_size=4 if rank == 3 else 2)


def _shard_size_of_own_after_another_model(rank: int) -> None:
    sharded_gpt(shard_size=2)
    model = sharded_gpt(shard_size=4 if rank == 3 else 2)
    loss(model, batch(0, 0, rank)).backward()


def test_shard_size_that_differs_is_named_when_some_ranks_have_that_mesh_already():
    outcomes = outcomes_of(_shard_size_of_own_after_another_model)
    assert {outcome.error_type for outcome in outcomes} == {"ValueError"}
    for outcome in outcomes:
        assert "must be the same on every rank" in str(outcome.error_text)


SCATTERED = ["a", "b", "a", "b"]


def _shard_on_scattered_nodes(rank: int, shard_size: Any, hierarchical: Any) -> float:
    model = mics.shard_model(
        make_gpt(blocks=1), shard_size=shard_size, hierarchical_gather=hierarchical
    )
    value = loss(model, batch(0, 0, rank))
    value.backward()
    return value.item()


@pytest.mark.parametrize(("shard_size", "hierarchical"), [(4, True), (2, True), ("node", "auto")])
def test_nodes_whose_ranks_are_not_consecutive_are_shown_as_a_map(
    shard_size: Any, hierarchical: Any
):
    expect(
        outcomes_of(_shard_on_scattered_nodes, shard_size, hierarchical, nodes=SCATTERED),
        "ValueError",
        "nodes of equal size whose ranks are consecutive",
        "4 ranks on 2 nodes",
        "node 0 (a) [r0 r2]",
        "node 1 (b) [r1 r3]",
        "Start the ranks node by node",
    )


def test_nodes_whose_ranks_are_not_consecutive_work_when_flat():
    scattered = [
        run_ranks(WORLD, _shard_on_scattered_nodes, 4, hierarchical, nodes=SCATTERED)
        for hierarchical in ("auto", False)
    ]
    together = run_ranks(WORLD, _shard_on_scattered_nodes, 4, False)
    assert scattered == [together, together]


def _mesh_of(rank: int, ranks: list[Any]) -> None:
    mesh = DeviceMesh("cpu", ranks)
    mics.fully_shard(make_gpt(blocks=1), mesh=mesh)


@pytest.mark.parametrize("ranks", [[[0, 2], [1, 3]], [3, 2, 1, 0], [0, 1]])
def test_mesh_that_is_permuted_or_partial_is_refused(ranks: list[Any]):
    flat = [rank for row in ranks for rank in (row if isinstance(row, list) else [row])]
    expect(
        outcomes_of(_mesh_of, ranks),
        "ValueError",
        "the mesh must hold all ranks in natural order",
        f"got {flat} in a world of 4",
        "torch_mics.init_mesh(shard_size)",
    )


def test_mesh_of_three_dimensions_is_refused():
    expect(outcomes_of(_mesh_of, [[[0, 1]], [[2, 3]]]), "ValueError", "1-D", "2-D", "got 3 dim")


def _without_process_group(rank: int, call: str) -> None:
    if call == "init_mesh":
        mics.init_mesh(2)
    elif call == "shard_model":
        mics.shard_model(make_gpt(blocks=1))
    else:
        mics.fully_shard(make_gpt(blocks=1))


@pytest.mark.parametrize("call", ["init_mesh", "shard_model", "fully_shard"])
def test_world_without_process_group_says_what_to_call(call: str):
    expect(
        outcomes_of(_without_process_group, call, initialise=False),
        "RuntimeError",
        "torch.distributed must be initialised before sharding",
        "WORLD_SIZE=4",
        "init_process_group()",
    )


# --- what differs between ranks -------------------------------------------------------------------


def _differ(rank: int, what: str) -> None:
    odd = rank == 2
    options: dict[str, Any] = {"shard_size": 2}
    model = make_gpt(blocks=2)
    if what == "shape" and odd:
        model.blocks[1].up = nn.Linear(12, 27)
        model.blocks[1].down = nn.Linear(27, 12)
    elif what == "name" and odd:
        model.blocks[0].norm3 = nn.LayerNorm(12)
    elif what == "dtype" and odd:
        model.blocks[1].to(torch.float64)
    elif what == "requires_grad" and odd:
        model.blocks[0].up.weight.requires_grad_(False)
    elif what == "order":
        blocks = list(model.blocks)
        options["units"] = blocks if not odd else blocks[1:] + [blocks[0].up]
    elif what == "number":
        options["units"] = list(model.blocks)[: 1 if odd else 2]
    elif what == "policy":
        options["mp_policy"] = "bf16" if odd else None
    elif what == "reshard_after_forward":
        options["reshard_after_forward"] = not odd
    elif what == "accumulate":
        options["accumulate"] = "local" if odd else "two_hop"
    mics.shard_model(model, **options)
    model(batch(0, 0, rank)[0])


@pytest.mark.parametrize(
    ("what", "path"),
    [
        ("shape", "blocks.1 / parameters / up.weight / shape / 0 = 26 on world_rank 0 and 27"),
        ("name", "blocks.0 / parameters / norm3.weight = nothing on world_rank 0 and "),
        ("dtype", "blocks.1 / dtype = torch.float32 on world_rank 0 and torch.float64"),
        (
            "requires_grad",
            "blocks.0 / parameters / up.weight / requires_grad = True on world_rank 0 and False",
        ),
        ("order", "order of units / 1 = blocks.0 on world_rank 0 and blocks.0.up"),
        ("number", "order of units = "),
        ("policy", "param_dtype = torch.float32 on world_rank 0 and torch.bfloat16"),
        ("reshard_after_forward", "reshard_after_forward = True on world_rank 0 and False"),
        ("accumulate", "accumulate = two_hop on world_rank 0 and local"),
    ],
)
def test_model_that_differs_between_ranks_is_named_with_both_values(what: str, path: str):
    expect(
        outcomes_of(_differ, what),
        "ValueError",
        "the sharded model must be the same on every rank",
        path,
        "on world_rank 2",
        "Build the model with the same code and arguments on every rank",
    )


def _replicas_with_different_values(rank: int, difference: float) -> None:
    model = make_gpt(blocks=2)
    if rank >= 2:
        with torch.no_grad():
            model.blocks[1].up.weight[-1, -1] += difference
    mics.shard_model(model, shard_size=2)
    model(batch(0, 0, rank)[0])


def test_replicas_with_different_values_name_the_unit_and_both_ranks():
    # Row 25 of 26 is on the second rank of each partition group.
    expect(
        outcomes_of(_replicas_with_different_values, 0.5),
        "ValueError",
        "replicas must start from the same values",
        'unit "blocks.1" differs between world_rank 1 and 3',
        "torch.manual_seed",
    )


@pytest.mark.parametrize("case", ["tiny", "sign of zero", "beside infinity"])
@refused_on_each_rank(
    "ValueError",
    "replicas must start from the same values",
    'unit "blocks.0" differs between world_rank 0 and 2',
)
def test_replicas_that_differ_in_few_bits_are_found(rank: int, case: str) -> None:
    model = make_gpt(blocks=2)
    weight = model.blocks[0].up.weight
    with torch.no_grad():
        if case == "tiny":
            weight[0, 0] = 1e-30 if rank < 2 else 2e-30
        elif case == "sign of zero":
            weight[0, 0] = 0.0 if rank < 2 else -0.0
        elif case == "beside infinity":
            weight[0, 0] = float("inf")
            weight[0, 1] = 1.0 if rank < 2 else 2.0
    mics.shard_model(model, shard_size=2)
    model(batch(0, 0, rank)[0])
