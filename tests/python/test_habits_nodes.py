"""Node maps on which nothing can run in two hops are named, with what that costs."""

from __future__ import annotations

import warnings

import pytest
from support.bodies import Stack
from support.ranks import run_ranks
from torch.distributed.device_mesh import init_device_mesh

import torch_mics as mics


def _irregular(rank: int, kind: str) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mesh = init_device_mesh("cpu", (2, 2)) if kind == "mesh" else None
        sizes = {"numeric": 4, "world": "world", "in a node": 1, "two": 2}
        options = {"mesh": mesh} if mesh is not None else {"shard_size": sizes[kind]}
        mics.shard_model(Stack(), **options)
        if kind == "world":
            with pytest.raises(ValueError, match="nodes of equal size"):
                mics.shard_model(Stack(), hierarchical_gather=True, **options)
    return [str(w.message) for w in caught if "crosses nodes" in str(w.message)]


@pytest.mark.parametrize("nodes", ["abab", "abba", "aaab"])
@pytest.mark.parametrize("kind", ["numeric", "world", "mesh", "in a node"])
def test_irregular_nodes_are_named_with_their_cost(kind: str, nodes: str) -> None:
    found = run_ranks(4, _irregular, kind, nodes=list(nodes))
    crosses = kind != "in a node"
    assert bool(found[0]) == crosses, found
    if crosses:
        assert "partition_size=" in found[0][0]
        assert "of the model crosses nodes" in found[0][0]
