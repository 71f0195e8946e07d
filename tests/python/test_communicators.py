"""The promises of communicator.h over every backend: local (threads), shm and c10d over Gloo (processes).

Every operation, dtype, in and out of place, sizes from one element to megabytes, every group size to 8.
"""

from __future__ import annotations

import datetime
import itertools
import threading
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from support.ranks import run_outcomes, run_ranks

import torch_mics  # noqa: F401  (checks the build before _C is loaded)
from torch_mics import _C

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NUMELS = (1, 5, 4097)
LARGE_NUMEL = 1 << 20
TIMEOUT = datetime.timedelta(seconds=300)


def values(rank: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
    """Small integers that differ by rank and element: their sums are exact in every dtype."""
    return ((torch.arange(numel) * 7 + rank * 3) % 11).to(dtype)


def check_all(comm: _C.Communicator, rank: int, size: int) -> int:
    """Runs every case on one rank; returns how many."""
    num_cases = 0
    for dtype, numel, in_place in itertools.product(DTYPES, NUMELS, (False, True)):
        check_case(comm, rank, size, dtype, numel, in_place=in_place)
        num_cases += 1
    check_case(comm, rank, size, torch.float32, LARGE_NUMEL // size, in_place=True)
    check_grouped(comm, rank, size)
    check_sum_order(comm, rank, size)
    check_one_rounding(comm, rank, size)
    check_traffic(comm, rank, size)
    comm.barrier()
    return num_cases


def check_case(
    comm: _C.Communicator, rank: int, size: int, dtype: torch.dtype, numel: int, *, in_place: bool
) -> None:
    output = torch.full((size * numel,), -1, dtype=dtype)
    own = output[rank * numel : (rank + 1) * numel]
    piece = values(rank, numel, dtype)
    if in_place:
        own.copy_(piece)
        piece = own
    comm.all_gather([output], [piece])
    gathered = torch.cat([values(other, numel, dtype) for other in range(size)])
    assert torch.equal(output, gathered)

    whole = values(rank, size * numel, dtype)
    total = sum(values(other, size * numel, torch.float64) for other in range(size))
    place = slice(rank * numel, (rank + 1) * numel)
    result = whole[place] if in_place else torch.empty(numel, dtype=dtype)
    comm.reduce_scatter([result], [whole])
    assert torch.equal(result.double(), total[place])

    reduced = values(rank, numel, dtype)
    comm.all_reduce(reduced)
    assert torch.equal(
        reduced.double(), sum(values(other, numel, torch.float64) for other in range(size))
    )


def check_grouped(comm: _C.Communicator, rank: int, size: int) -> None:
    numels = (3, 0, 70)
    outputs = [torch.empty(size * numel) for numel in numels]
    inputs = [values(rank, numel, torch.float32) for numel in numels]
    comm.all_gather(outputs, inputs)
    for output, numel in zip(outputs, numels, strict=True):
        parts = [values(other, numel, torch.float32) for other in range(size)]
        assert torch.equal(output, torch.cat(parts))
    sums = [torch.empty(numel) for numel in numels]
    wholes = [values(rank, size * numel, torch.float32) for numel in numels]
    comm.reduce_scatter(sums, wholes)
    for result, numel in zip(sums, numels, strict=True):
        total = sum(values(other, size * numel, torch.float32) for other in range(size))
        assert torch.equal(result, total[rank * numel : (rank + 1) * numel])


def check_sum_order(comm: _C.Communicator, rank: int, size: int) -> None:
    """Random fp32 sums equal the sum in rank order, bitwise."""
    parts = [torch.randn(257, generator=torch.Generator().manual_seed(r)) for r in range(size)]
    expected = parts[0].clone()
    for part in parts[1:]:
        expected += part
    result = parts[rank].clone()
    comm.all_reduce(result)
    assert torch.equal(result, expected)
    scattered = torch.empty(257)
    comm.reduce_scatter([scattered], [parts[rank].repeat(size)])
    assert torch.equal(scattered, expected)


def check_one_rounding(comm: _C.Communicator, rank: int, size: int) -> None:
    """In bf16 256 + 1 is 256: a sum that is rounded at every step would stay there."""
    tensor = torch.full((1,), 256.0 if rank == 0 else 1.0, dtype=torch.bfloat16)
    comm.all_reduce(tensor)
    assert tensor.item() == torch.tensor(255.0 + size).bfloat16().item()


def check_traffic(comm: _C.Communicator, rank: int, size: int) -> None:
    before = comm.traffic
    comm.all_gather([torch.empty(size * 10)], [torch.ones(10)])
    comm.reduce_scatter([torch.empty(10)], [torch.ones(size * 10)])
    after = comm.traffic
    assert after.calls - before.calls == 2
    for direction in ("sent", "received"):
        names = [f"{direction}_{tier}_nbytes" for tier in ("intra", "inter")]
        moved = sum(getattr(after, name) - getattr(before, name) for name in names)
        assert moved == 2 * (size - 1) * 40


def gloo_rank(rank: int, size: int) -> int:
    comm = make_c10d(dist.group.WORLD, size, rank)
    return check_all(comm, rank, size)


def make_c10d(group: object, size: int, rank: int) -> _C.Communicator:
    return _C.make_c10d_communicator(
        group,
        name="test",
        world_ranks=list(range(size)),
        nodes=[member // 2 for member in range(size)],
        rank=rank,
        timeout=TIMEOUT,
    )


def gloo_subgroups(rank: int, world_size: int) -> int:
    """Every group size up to the world's, in one launch: the first `size` ranks form the group."""
    num_cases = 0
    for size in range(1, world_size + 1):
        group = dist.new_group(list(range(size)))
        if rank < size:
            num_cases += check_all(make_c10d(group, size, rank), rank, size)
    return num_cases


def shm_subgroups(rank: int, world_size: int, names: list[str]) -> int:
    """As gloo_subgroups, over shared memory; a group of one has no segment."""
    num_cases = 0
    for size in range(2, world_size + 1):
        if rank < size:
            group = _C.ShmGroup(
                names[size],
                creates=rank == 0,
                name="test",
                world_ranks=list(range(size)),
                nodes=[member // 2 for member in range(size)],
                rank=rank,
                timeout=TIMEOUT,
            )
            comm = group.make_communicator()
            num_cases += check_all(comm, rank, size)
    return num_cases


def run_threads(size: int, body: Callable[[int, _C.Communicator], int]) -> list[int]:
    world = _C.LocalWorld(size, timeout=TIMEOUT)
    results: list[int] = [0] * size
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        comm = world.make_communicator(
            name="test",
            world_ranks=list(range(size)),
            nodes=[member // 2 for member in range(size)],
            rank=rank,
        )
        try:
            results[rank] = body(rank, comm)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


@pytest.mark.parametrize("size", range(1, 9))
def test_local_backend_keeps_every_promise(size: int) -> None:
    results = run_threads(size, lambda rank, comm: check_all(comm, rank, size))
    assert results == [len(DTYPES) * len(NUMELS) * 2] * size


def test_c10d_backend_keeps_every_promise_for_group_sizes_up_to_8() -> None:
    per_group = len(DTYPES) * len(NUMELS) * 2
    assert run_ranks(8, gloo_subgroups, 8)[0] == 8 * per_group


def test_shm_backend_keeps_every_promise_for_group_sizes_up_to_8() -> None:
    per_group = len(DTYPES) * len(NUMELS) * 2
    names = [_C.make_shm_segment_name() for _ in range(9)]
    assert run_ranks(8, shm_subgroups, 8, names)[0] == 7 * per_group


def bytes_on_wire(rank: int, size: int) -> tuple[int, int]:
    """What the kernel counts on loopback while reduce_scatter runs, and what was counted here."""
    comm = make_c10d(dist.group.WORLD, size, rank)
    whole = torch.ones(size * LARGE_NUMEL)
    comm.barrier()
    before = loopback_nbytes()
    comm.barrier()
    for _ in range(4):
        comm.reduce_scatter([torch.empty(LARGE_NUMEL)], [whole])
    comm.barrier()
    return (
        loopback_nbytes() - before,
        comm.traffic.sent_intra_nbytes + comm.traffic.sent_inter_nbytes,
    )


def loopback_nbytes() -> int:
    with open("/proc/net/dev") as stream:
        line = next(line for line in stream if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[8])


def test_c10d_reduce_scatter_moves_no_more_than_it_counts() -> None:
    size = 4
    results = run_ranks(size, bytes_on_wire, size)
    counted = sum(sent for _, sent in results)
    assert counted == 4 * size * (size - 1) * LARGE_NUMEL * 4
    measured = min(on_wire for on_wire, _ in results)
    # Headers and acknowledgements; a full all-reduce would be twice as much.
    assert 0.9 * counted < measured < 1.3 * counted


def peer_that_ends(rank: int, size: int) -> None:
    comm = make_c10d(dist.group.WORLD, size, rank)
    if rank == 1:
        dist.destroy_process_group()
        return
    comm.all_reduce(torch.ones(4))


def test_c10d_peer_that_has_ended_is_a_comm_error_that_names_the_group() -> None:
    outcomes = run_outcomes(2, peer_that_ends, 2)
    assert outcomes[0].error_type in ("CommError", "TimeoutError")
    assert "reduce_scatter failed: operation 1 of group test [world ranks 0 1]" in str(
        outcomes[0].error_text
    )
