"""Bytes that cross nodes per step: torch_mics beside FSDP2, on the same model and data.

    MICS_RANKS_PER_NODE=2 torchrun --nproc-per-node 4 examples/compare_traffic.py

FSDP2's collectives are recorded, and its bytes are what Gloo's algorithms move for them: a ring for an
all-gather, and a whole ring all-reduce for a reduce-scatter. The bytes with a true ring reduce-scatter are
shown too. The bytes of torch_mics are those of its counters.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from gpt.model import GPT, GPTConfig
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

import torch_mics as mics


class CollectiveRecorder(TorchDispatchMode):
    """Counts what this rank's c10d collectives send to another node."""

    def __init__(self, ranks_per_node: int) -> None:
        super().__init__()
        self._ranks_per_node = ranks_per_node
        self.gloo_nbytes = 0  # reduce-scatter as a ring all-reduce
        self.ring_nbytes = 0  # reduce-scatter as a ring

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.name()
        if name == "c10d::_allgather_base_":
            self._count(args[0].nbytes, args[2], gloo_rounds=1, ring_rounds=1)
        elif name == "c10d::_reduce_scatter_base_":
            self._count(args[1].nbytes, args[2], gloo_rounds=2, ring_rounds=1)
        elif name == "c10d::allreduce_":
            nbytes = sum(tensor.nbytes for tensor in args[0])
            self._count(nbytes, args[1], gloo_rounds=2, ring_rounds=2)
        return func(*args, **(kwargs or {}))

    def _count(self, nbytes: int, group: object, *, gloo_rounds: int, ring_rounds: int) -> None:
        group = dist.ProcessGroup.unbox(group)
        ranks = dist.get_process_group_ranks(group)
        following = ranks[(ranks.index(dist.get_rank()) + 1) % len(ranks)]
        if following // self._ranks_per_node == dist.get_rank() // self._ranks_per_node:
            return
        once = nbytes * (len(ranks) - 1) // len(ranks)
        self.gloo_nbytes += gloo_rounds * once
        self.ring_nbytes += ring_rounds * once


def build_model(options: argparse.Namespace) -> GPT:
    torch.manual_seed(0)
    config = GPTConfig(
        vocab_size=options.vocab_size,
        layers=options.layers,
        heads=options.heads,
        width=options.width,
    )
    return GPT(config)


def micro_batch(options: argparse.Namespace, index: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * index + dist.get_rank())
    shape = (options.batch_size, options.sequence_length)
    return torch.randint(options.vocab_size, shape, generator=generator)


def shard_with_fsdp2(model: GPT, mesh_shape: tuple[int, int]) -> GPT:
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("dp_replicate", "dp_shard"))
    # A 1-D mesh if there is one replica, as FSDP2's users would make.
    mesh = mesh if mesh_shape[0] > 1 else mesh["dp_shard"]
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


@contextmanager
def last_only(model: nn.Module, is_last: bool, method: str | None) -> Iterator[None]:
    """Sets FSDP2's switch for an accumulation; None leaves it alone, as a plain loop does."""
    if method is not None:
        getattr(model, method)(is_last)
    yield


def measure_fsdp2(
    options: argparse.Namespace, partition_size: int, method: str | None
) -> tuple[int, int, float]:
    """Gives the bytes that all ranks send to other nodes in a step, by Gloo and by rings, and the loss."""
    world_size = dist.get_world_size()
    model = shard_with_fsdp2(build_model(options), (world_size // partition_size, partition_size))
    recorder = CollectiveRecorder(options.ranks_per_node)
    total_loss = 0.0
    with recorder:
        for index in range(options.accumulation_steps):
            with last_only(model, index == options.accumulation_steps - 1, method):
                tokens = micro_batch(options, index)
                loss = model(tokens, tokens)
                (loss / options.accumulation_steps).backward()
                total_loss += loss.item()
    sums = torch.tensor([recorder.gloo_nbytes, recorder.ring_nbytes])
    dist.all_reduce(sums)
    return int(sums[0]), int(sums[1]), total_loss


def measure_mics(
    options: argparse.Namespace, partition_size: int, hierarchical: bool
) -> tuple[int, float]:
    """Gives the bytes that all ranks send to other nodes in a step, by the counters, and the loss."""
    model = build_model(options)
    mesh = mics.init_mesh(partition_size, device_type="cpu")
    mics.shard_model(model, mesh=mesh, hierarchical_gather=hierarchical)
    total_loss = 0.0
    for index in range(options.accumulation_steps):
        with mics.microbatch(model, is_last=index == options.accumulation_steps - 1):
            tokens = micro_batch(options, index)
            loss = model(tokens, tokens)
            (loss / options.accumulation_steps).backward()
            total_loss += loss.item()
    sent = sum(counters["sent_inter_nbytes"] for counters in mics.traffic(model).values())
    total = torch.tensor([sent])
    dist.all_reduce(total)
    return int(total), total_loss


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--vocab-size", type=int, default=1024)
    parser.add_argument("--sequence-length", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--accumulation-steps", type=int, default=4)
    options = parser.parse_args()
    options.ranks_per_node = int(os.environ.get("MICS_RANKS_PER_NODE", "2"))
    return options


def main() -> None:
    options = parse_options()
    rank = int(os.environ.get("RANK", "0"))
    os.environ.setdefault("MICS_NODE_ID", str(rank // options.ranks_per_node))
    dist.init_process_group("gloo")
    world_size, local = dist.get_world_size(), options.ranks_per_node
    rows: list[tuple[str, int, str, str]] = []
    losses = []
    for size in sorted({min(local, world_size), world_size}):
        kind = "FSDP2" if size == world_size else "FSDP2 (HSDP)"
        for label, method in (
            ("plain loop", None),
            ("set_requires_gradient_sync", "set_requires_gradient_sync"),
        ):
            gloo, ring, loss = measure_fsdp2(options, size, method)
            rows.append((f"{kind}, {label}", size, f"{gloo / 1e6:.2f}", f"{ring / 1e6:.2f}"))
            losses.append(loss)
        for hierarchical in (False, True) if size > local else (False,):
            label = "torch_mics, hierarchical" if hierarchical else "torch_mics, flat"
            nbytes, loss = measure_mics(options, size, hierarchical)
            shown = f"{nbytes / 1e6:.2f}"
            rows.append((label if size > local else "torch_mics", size, shown, shown))
            losses.append(loss)
    if max(losses) - min(losses) > 1e-4:
        raise SystemExit(f"the losses of rank {rank} differ between the runs: {losses}")
    if rank == 0:
        numel = sum(p.numel() for p in build_model(options).parameters())
        table = Table(
            title=f"MB sent across nodes per step: {numel / 1e6:.2f}M parameters in fp32, "
            f"{world_size // local} nodes x {local} ranks, {options.accumulation_steps} micro-steps"
        )
        for column in ("", "partition size", "over Gloo", "over rings"):
            table.add_column(column, justify="left" if not column else "right")
        for label, size, gloo, ring in rows:
            table.add_row(label, str(size), gloo, ring)
        Console(width=100).print(table)
    mics.exit_rank()


if __name__ == "__main__":
    main()
