"""join_neighbours: each element once, in an order that does not depend on addresses."""

from __future__ import annotations

import random

import torch

import torch_mics  # noqa: F401  (checks the build before _C is loaded)
from torch_mics import _C


def places(tensors: list[torch.Tensor]) -> list[tuple[int, int]]:
    return [(tensor.storage_offset(), tensor.numel()) for tensor in tensors]


def test_neighbours_become_one_in_any_order():
    flat = torch.arange(24.0)
    parts = [flat[0:6].view(2, 3), flat[6:7], flat[7:7], flat[7:20], flat[20:24].view(2, 2)]
    for seed in range(5):
        mixed = random.Random(seed).sample(parts, len(parts))
        (joined,) = _C.join_neighbours(mixed)
        assert torch.equal(joined, flat)
        assert joined.data_ptr() == flat.data_ptr()


def test_gaps_and_overlaps_separate():
    flat = torch.zeros(20)
    joined = _C.join_neighbours([flat[0:4], flat[5:8], flat[8:10], flat[9:12], flat[12:14]])
    assert places(joined) == [(0, 4), (5, 5), (9, 5)]
    twice = _C.join_neighbours([flat[0:4], flat[0:4]])
    assert places(twice) == [(0, 4), (0, 4)]


def test_storages_come_in_order_of_appearance():
    left, right = torch.zeros(8), torch.ones(8)
    for first, second in ((left, right), (right, left)):
        joined = _C.join_neighbours([first[4:8], second[0:4], first[0:4]])
        assert [tensor.data_ptr() for tensor in joined] == [first.data_ptr(), second.data_ptr()]


def test_other_dtypes_and_strides_stay_alone():
    flat = torch.zeros(16)
    half = flat[4:8].view(torch.bfloat16)  # its offset counts other elements
    square = flat[8:12].view(2, 2).t()
    joined = _C.join_neighbours([flat[0:4], half, square, flat[12:16]])
    assert len(joined) == 4
    assert sum(tensor.nbytes for tensor in joined) == flat.nbytes
    assert any(tensor is square or tensor.stride() == (1, 2) for tensor in joined)


def test_nothing_gives_nothing():
    assert _C.join_neighbours([]) == []
    assert _C.join_neighbours([torch.zeros(0), torch.zeros(3, 0)]) == []
