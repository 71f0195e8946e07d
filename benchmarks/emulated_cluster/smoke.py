"""Checks that training moves the bytes that the formulas say, over links that count them.

    python benchmarks/emulated_cluster --nodes 2 --ranks-per-node 2 -- \\
        python benchmarks/emulated_cluster/smoke.py

Trains a small model with partition groups of one node and of all nodes, flat and in two hops. Fails when
losses or parameters differ from one process, when the library's counters differ from the formulas, or
when a link carried more than the counters by over 1.5%.

Per node and step over its link, with M bytes of parameters, s micro-steps, n ranks of which k per node:

    p = k                  2 (n/k - 1)/(n/k) M             the all-reduce over replicas at the boundary
    p = n, hierarchical    s 3 (n-k)/n M                   two gathers and a reduction per micro-step
    p = n, flat            s (2 (n-1)/n + k (n-k)/n) M     gathers around a ring, reductions directly
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import nn

import torch_mics as mics

WIDTH, NUM_LAYERS, ROWS = 512, 8, 4
NUM_STEPS, NUM_MICRO_STEPS = 3, 4
OVERHEAD = 0.015  # headers and acknowledgements
CONTROL_NBYTES = 20_000  # for barriers and agreements
INTER = "sent_inter_nbytes"


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(NUM_LAYERS)]
    return nn.Sequential(*(nn.Sequential(layer, nn.Tanh()) for layer in layers))


def loss_of(model: nn.Module, step: int, micro_step: int, rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step * 1000 + micro_step * 100 + rank)
    return model(torch.rand(ROWS, WIDTH, generator=generator)).square().mean()


def one_process(world_size: int) -> tuple[list[float], list[torch.Tensor]]:
    """Trains in one process on the data of all ranks. Gives mean losses by step, and final parameters."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for step in range(NUM_STEPS):
        total = 0.0
        for micro_step in range(NUM_MICRO_STEPS):
            for rank in range(world_size):
                loss = loss_of(model, step, micro_step, rank) / world_size / NUM_MICRO_STEPS
                loss.backward()
                total += loss.item()
        losses.append(total)
        optimizer.step()
        optimizer.zero_grad()
    return losses, [parameter.detach() for parameter in model.parameters()]


def link_nbytes() -> int:
    """Gives the bytes that this node has sent over its link."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == "e0":
            return int(counters.split()[8])
    raise RuntimeError("smoke.py runs on an emulated cluster: got no interface e0.")


def counted_nbytes(model: nn.Module) -> int:
    """Gives the bytes that this rank's counters have to other nodes, without small agreements."""
    return sum(c[INTER] for name, c in mics.traffic(model).items() if name != "control")


def train(shard_size: int, hierarchical: bool) -> tuple[list[float], list[torch.Tensor], int, int]:
    """Gives losses, parameters, and the last step's bytes over this node's link: counted, and seen."""
    mesh = mics.init_mesh(shard_size, device_type="cpu")
    plain = make_model()
    model = mics.shard_model(plain, units=list(plain), mesh=mesh, hierarchical_gather=hierarchical)
    optimizer = mics.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    counted = seen = 0
    for step in range(NUM_STEPS):
        dist.barrier()
        counted, seen = counted_nbytes(model), link_nbytes()
        total = torch.zeros(())
        for micro_step in range(NUM_MICRO_STEPS):
            with mics.microbatch(model, is_last=micro_step == NUM_MICRO_STEPS - 1):
                loss = loss_of(model, step, micro_step, dist.get_rank()) / NUM_MICRO_STEPS
                loss.backward()
            total += loss.detach()
        counted = counted_nbytes(model) - counted
        dist.barrier()
        seen = link_nbytes() - seen
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(total)
        losses.append(total.item() / dist.get_world_size())
    full = mics.full_state_dict(model)
    parameters = [full[name] for name in make_model().state_dict()] if full else []
    return losses, parameters, counted, seen


def expected_nbytes(shard_size: int, hierarchical: bool, ranks_per_node: int) -> float:
    """Gives the bytes over a node's link in one step; see the top of this file."""
    n, k = dist.get_world_size(), ranks_per_node
    nbytes = 4 * WIDTH * WIDTH * NUM_LAYERS
    if shard_size == k:
        return 2 * (n // k - 1) / (n // k) * nbytes
    if hierarchical:
        return NUM_MICRO_STEPS * 3 * (n - k) / n * nbytes
    return NUM_MICRO_STEPS * (2 * (n - 1) / n + k * (n - k) / n) * nbytes


def sum_over_node(counted: int, ranks_per_node: int) -> int:
    """Adds up a number of this rank over the ranks of its node."""
    everyone: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(everyone, counted)
    first = dist.get_rank() // ranks_per_node * ranks_per_node
    return sum(everyone[first : first + ranks_per_node])


def main() -> None:
    """Checks every setting; an assertion names what differs."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    ranks_per_node = int(os.environ["LOCAL_WORLD_SIZE"])
    losses, parameters = one_process(world_size)
    table = Table(title=f"bytes of a node's link per step, {world_size} ranks")
    for column in ("setting", "formula MB", "counted MB", "link MB"):
        table.add_column(column, justify="left" if column == "setting" else "right")
    settings = {
        f"p = {ranks_per_node}": (ranks_per_node, False),
        f"p = {world_size}, hierarchical": (world_size, True),
        f"p = {world_size}, flat": (world_size, False),
    }
    for name, (shard_size, hierarchical) in settings.items():
        ours, trained, counted, seen = train(shard_size, hierarchical)
        torch.testing.assert_close(ours, losses, rtol=1e-5, atol=1e-5, msg=f"losses differ: {name}")
        for mine, reference in zip(trained, parameters if rank == 0 else [], strict=True):
            torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-5)
        expected = expected_nbytes(shard_size, hierarchical, ranks_per_node)
        counted = sum_over_node(counted, ranks_per_node)
        table.add_row(name, *(f"{nbytes / 1e6:.3f}" for nbytes in (expected, counted, seen)))
        assert counted == expected, f"{name}: counted {counted} bytes, the formula says {expected}"
        assert counted <= seen <= counted * (1 + OVERHEAD) + CONTROL_NBYTES, (
            f"{name}: the link of rank {rank} carried {seen} bytes, counted were {counted}"
        )
    if rank == 0:
        Console().print(table)
        print("all bytes and losses are as they should be.")
    mics.exit_rank()


if __name__ == "__main__":
    main()
