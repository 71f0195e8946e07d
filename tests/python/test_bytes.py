"""The library's counters equal the formulas, to the byte, for the GPT of the quickstart."""

from __future__ import annotations

import pytest
import torch
from gpt.model import GPT, GPTConfig
from support.ranks import run_ranks

import torch_mics as mics
from torch_mics import _C
from torch_mics._unit import units_of

WORLD_SIZE, RANKS_PER_NODE, MICRO_STEPS = 4, 2, 2
ELEMENT = 4  # bytes of fp32


def count_step(rank: int, cases: list[tuple[int, bool]]) -> list[dict]:
    """Runs one step of every case; gives this rank's counters and the lengths of its units."""
    found = []
    for partition_size, hierarchical in cases:
        mesh = mics.init_mesh(partition_size, device_type="cpu")
        torch.manual_seed(0)
        model = GPT(GPTConfig(vocab_size=1024, layers=4, heads=4, width=128))
        mics.shard_model(model, mesh=mesh, hierarchical_gather=hierarchical)
        for micro_step in range(MICRO_STEPS):
            tokens = torch.full((1, 8), micro_step)
            with mics.microbatch(model, is_last=micro_step == MICRO_STEPS - 1):
                model(tokens, tokens).backward()
        layouts = [unit.layout() for unit in units_of(model) if unit.parameters]
        lengths = [(layout.shard_numel, layout.payload_numel) for layout in layouts]
        found.append({"traffic": mics.traffic(model), "lengths": lengths})
    return found


def cases() -> list[tuple[int, bool]]:
    sizes = _C.Topology.legal_partition_sizes(WORLD_SIZE, RANKS_PER_NODE)
    return [(size, hierarchical) for size in sizes for hierarchical in (False, True)]


@pytest.fixture(scope="module")
def counted() -> dict[tuple[int, bool], list[dict]]:
    per_rank = run_ranks(WORLD_SIZE, count_step, cases(), ranks_per_node=RANKS_PER_NODE)
    return {case: [found[i] for found in per_rank] for i, case in enumerate(cases())}


def received(counters: dict[str, int]) -> int:
    return counters["received_intra_nbytes"] + counters["received_inter_nbytes"]


def sent(counters: dict[str, int]) -> int:
    return counters["sent_intra_nbytes"] + counters["sent_inter_nbytes"]


@pytest.mark.parametrize("case", cases(), ids=str)
def test_bytes_of_a_step_equal_the_formulas(case, counted) -> None:
    p, hierarchical = case
    num_nodes = p // RANKS_PER_NODE if hierarchical and p > RANKS_PER_NODE else 1
    local = p // num_nodes
    for rank, found in enumerate(counted[case]):
        traffic = found["traffic"]
        shard_nbytes = ELEMENT * sum(shard for shard, _ in found["lengths"])
        payload_nbytes = ELEMENT * sum(payload for _, payload in found["lengths"])
        # Every unit of this model is gathered in forward and again in backward.
        rounds = {"gather": 2 * MICRO_STEPS, "reduce": MICRO_STEPS}
        for direction, times in rounds.items():
            intra = traffic[f"{direction}/intra"]
            assert received(intra) == times * num_nodes * (local - 1) * payload_nbytes
            assert sent(intra) == received(intra)
            rail = traffic.get(f"{direction}/rail")
            if num_nodes == 1:
                assert rail is None
            else:
                assert rail["received_inter_nbytes"] == times * (num_nodes - 1) * shard_nbytes
                assert rail["received_intra_nbytes"] == 0
                assert intra["received_inter_nbytes"] == 0
        replicas = WORLD_SIZE // p
        if replicas == 1:
            assert "replicate" not in traffic
        else:
            # 2 (R-1)/R of the shard, with pieces rounded up to whole elements; once per step.
            piece = sum(ELEMENT * -(-shard // replicas) for shard, _ in found["lengths"])
            assert received(traffic["replicate"]) == 2 * (replicas - 1) * piece, rank
            assert traffic["replicate"]["calls"] == len(found["lengths"])


def test_a_node_receives_p_minus_l_shards_when_hierarchical(counted) -> None:
    p = WORLD_SIZE
    ranks = counted[(p, True)][:RANKS_PER_NODE]
    shard_nbytes = ELEMENT * sum(shard for shard, _ in ranks[0]["lengths"])
    for direction, times in {"gather": 2 * MICRO_STEPS, "reduce": MICRO_STEPS}.items():
        inter = sum(
            found["traffic"][f"{direction}/{hop}"]["received_inter_nbytes"]
            for found in ranks
            for hop in ("rail", "intra")
        )
        assert inter == times * (p - RANKS_PER_NODE) * shard_nbytes


def test_hierarchical_sends_less_across_nodes_than_flat(counted) -> None:
    def across(case: tuple[int, bool]) -> int:
        return sum(
            counters["sent_inter_nbytes"]
            for found in counted[case]
            for counters in found["traffic"].values()
        )

    assert across((WORLD_SIZE, True)) < 0.7 * across((WORLD_SIZE, False))
    assert across((RANKS_PER_NODE, True)) < 0.4 * across((WORLD_SIZE, True))
