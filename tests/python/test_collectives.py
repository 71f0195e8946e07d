"""GroupCollectives: natural order, sums, one hop and two, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from support.ranks import run_outcomes, run_ranks
from torch._C import _distributed_c10d

import torch_mics as mics
from torch_mics.collectives import GroupCollectives

NUMEL = 5


def _both(rank: int, shard_size: int, hierarchical: bool) -> tuple[bool, list[float], list[float]]:
    mesh = mics.init_mesh(shard_size, device_type="cpu", gpus_per_node=2)
    groups = GroupCollectives(mesh, hierarchical=hierarchical)
    full = torch.empty(groups.size * NUMEL)
    groups.all_gather(full, torch.arange(NUMEL) + 100.0 * rank)
    piece = torch.empty(NUMEL)
    groups.reduce_scatter(piece, torch.arange(groups.size * NUMEL) * (rank + 1.0))
    return groups.is_hierarchical, full.tolist(), piece.tolist()


@pytest.mark.parametrize(
    ("shard_size", "hierarchical"), [(2, False), (2, True), (4, False), (4, True)]
)
def test_pieces_come_in_rank_order_and_sums_go_to_their_rank(shard_size: int, hierarchical: bool):
    for rank, found in enumerate(run_ranks(4, _both, shard_size, hierarchical)):
        is_hierarchical, full, piece = found
        assert is_hierarchical == (hierarchical and shard_size == 4)
        first = rank // shard_size * shard_size
        members = range(first, first + shard_size)
        assert full == [100.0 * member + i for member in members for i in range(NUMEL)]
        factor = sum(member + 1.0 for member in members)
        assert piece == [factor * ((rank - first) * NUMEL + i) for i in range(NUMEL)]


def _counted(rank: int) -> tuple[dict, dict]:
    mesh = mics.init_mesh(4, device_type="cpu", gpus_per_node=2)
    groups = GroupCollectives(mesh)
    groups.all_gather(torch.empty(4 * NUMEL), torch.ones(NUMEL))
    return groups.traffic(), groups.backends()


def test_traffic_and_backends_are_told_by_hop():
    for traffic, backends in run_ranks(4, _counted):
        assert traffic["gather/rail"]["sent_inter_nbytes"] == 4 * NUMEL
        assert traffic["gather/intra"]["sent_intra_nbytes"] == 2 * 4 * NUMEL
        assert traffic["reduce/intra"]["calls"] == 0
        assert backends["gather/intra"] == "shm"
        assert backends["gather/rail"].startswith("c10d")


def _refused(rank: int, numel: int) -> None:
    groups = GroupCollectives(mics.init_mesh(2, device_type="cpu"))
    groups.all_gather(torch.empty(numel), torch.empty(NUMEL))


def test_sizes_that_do_not_fit_are_refused():
    for outcome in run_outcomes(2, _refused, 3 * NUMEL):
        assert outcome.error_type == "ValueError"
        assert "one size times the other: got size=2, 15 elements" in str(outcome.error_text)


def _groups_that_a_step_adds(rank: int) -> set[str]:
    def known() -> set[str]:
        return set(json.loads(_distributed_c10d._dump_fr_trace_json())["pg_status"])

    torch.manual_seed(0)
    model = mics.shard_model(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)))
    mics.memory(model)  # makes the communicators
    before = known()
    assert before, "torch's recorder is off, or says so in another way"
    model(torch.ones(2, 8)).sum().backward()
    return known() - before


def test_stream_threads_find_their_groups_in_the_recorder_of_torch():
    """It would be changed by two of them at once, without a lock: see C10d in _backend.py."""
    assert run_ranks(4, _groups_that_a_step_adds, ranks_per_node=2) == [set()] * 4
