"""All-gather and reduce-scatter of a partition group beside those of torch.distributed.

    python benchmarks/collective_bench.py --ranks 4 --ranks-per-node 2
    torchrun --nproc-per-node 2 --nnodes 4 ... benchmarks/collective_bench.py     # on several nodes

Contestants take turns call by call; each line is the median over the repeats of the time of the slowest
rank. As nccl-tests: the size is that of the whole gathered (or reduced) tensor, algbw = size / time, and
busbw = algbw * (n-1)/n, which a perfect ring brings to the speed of its slowest link.

  torch              all_gather_into_tensor, reduce_scatter_tensor
  flat               torch_mics, one hop over all ranks, on torch's process groups
  flat/shm           the same over shared memory, where all ranks are on one node
  hierarchical       torch_mics, two hops, both on torch's process groups
  hierarchical/shm   the same with the hop inside nodes over shared memory
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing
from rich.console import Console
from rich.table import Table

import torch_mics as mics
from torch_mics.collectives import GroupCollectives

UNITS = {"kB": 1 << 10, "MB": 1 << 20, "GB": 1 << 30}
OPERATIONS = ("all_gather", "reduce_scatter")
WARM_UPS = 2

Call = Callable[[torch.Tensor, torch.Tensor], None]  # (full, piece)


def nbytes_of(text: str) -> int:
    """Reads "64kB", "32MB" or "1GB"; powers of 1024."""
    for unit, factor in UNITS.items():
        if text.lower().endswith(unit.lower()):
            return int(text[: -len(unit)]) * factor
    return int(text)


def text_of(nbytes: int) -> str:
    """Writes a size as nbytes_of() reads it."""
    unit = next((u for u in reversed(UNITS) if nbytes % UNITS[u] == 0), None)
    return f"{nbytes // UNITS[unit]}{unit}" if unit else f"{nbytes}"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=4, help="to start without a launcher")
    parser.add_argument("--ranks-per-node", type=int, help="instead of what the hosts say")
    parser.add_argument("--smallest", type=nbytes_of, default="64kB", metavar="SIZE")
    parser.add_argument("--largest", type=nbytes_of, default="32MB", metavar="SIZE", help="to 1GB")
    parser.add_argument("--factor", type=int, default=2, help="from one size to the next")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--json", type=Path, help="write all times here")
    arguments = parser.parse_args()
    if arguments.smallest < 1 or arguments.largest > 1 << 30 or arguments.factor < 2:
        parser.error("sizes must be from 1 byte to 1GB, and --factor at least 2")
    if arguments.repeats < 1:
        parser.error("--repeats must be at least 1")
    return arguments


@dataclasses.dataclass
class Contestant:
    """One way to do both operations."""

    name: str
    calls: dict[str, Call]
    groups: GroupCollectives | None = None

    def sent(self) -> tuple[int, int]:
        """Bytes that this rank has sent, inside nodes and between them."""
        counters = [] if self.groups is None else self.groups.traffic().values()
        return (
            sum(c["sent_intra_nbytes"] for c in counters),
            sum(c["sent_inter_nbytes"] for c in counters),
        )


def contestants(arguments: argparse.Namespace) -> list[Contestant]:
    """Makes the contestants that differ on this cluster. Collective."""
    found = [
        Contestant(
            "torch",
            {
                "all_gather": lambda full, piece: dist.all_gather_into_tensor(full, piece),
                "reduce_scatter": lambda full, piece: dist.reduce_scatter_tensor(piece, full),
            },
        )
    ]
    for intra_backend, suffix in (("c10d", ""), ("auto", "/shm")):
        mesh = mics.init_mesh(
            "world",
            device_type=arguments.device,
            gpus_per_node=arguments.ranks_per_node,
            intra_backend=intra_backend,
        )
        chosen = GroupCollectives(mesh)  # hierarchical if there are several nodes
        for groups in [GroupCollectives(mesh, hierarchical=False), chosen]:
            if groups is chosen and not groups.is_hierarchical:
                continue
            if suffix and groups.backends()["gather/intra"] != "shm":
                continue
            calls = {
                "all_gather": groups.all_gather,
                "reduce_scatter": lambda full, piece, groups=groups: groups.reduce_scatter(
                    piece, full
                ),
            }
            name = "hierarchical" if groups.is_hierarchical else "flat"
            found.append(Contestant(name + suffix, calls, groups))
    return found


def timed(call: Call, full: torch.Tensor, piece: torch.Tensor) -> float:
    """Seconds of one call, all ranks starting together."""
    if full.is_cuda:
        torch.cuda.synchronize()
    dist.barrier()
    begin = time.perf_counter()
    call(full, piece)
    if full.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def check(everyone: list[Contestant], operation: str, full: torch.Tensor, piece: torch.Tensor):
    """Checks that all give the same result: the same bits for a gather, a sum up to its rounding."""
    expected = None
    for contestant in everyone:
        (full if operation == "all_gather" else piece).zero_()
        contestant.calls[operation](full, piece)
        result = (full if operation == "all_gather" else piece).clone()
        expected = result if expected is None else expected
        tolerance = 0.0 if operation == "all_gather" else 0.02
        torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)


def measure(
    arguments: argparse.Namespace, everyone: list[Contestant], operation: str, nbytes: int
) -> list[dict]:
    """Times one operation at one size. Gives one record per contestant, the same on every rank."""
    dtype, world_size = getattr(torch, arguments.dtype), dist.get_world_size()
    numel = max(nbytes // dtype.itemsize // world_size, 1)
    generator = torch.Generator().manual_seed(dist.get_rank())
    piece = torch.rand(numel, generator=generator).to(arguments.device, dtype)
    full = torch.rand(numel * world_size, generator=generator).to(arguments.device, dtype)
    check(everyone, operation, full, piece)
    before = [contestant.sent() for contestant in everyone]
    seconds = torch.zeros(arguments.repeats, len(everyone), dtype=torch.float64)
    for repeat in range(-WARM_UPS, arguments.repeats):
        for place in range(len(everyone)):
            index = (place + repeat) % len(everyone)  # nobody always follows the same one
            time_of_call = timed(everyone[index].calls[operation], full, piece)
            if repeat >= 0:
                seconds[repeat, index] = time_of_call
    slowest = seconds.to(arguments.device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    records = []
    for index, contestant in enumerate(everyone):
        times = slowest[:, index].tolist()
        size = numel * world_size * dtype.itemsize
        algbw = size / statistics.median(times)
        record = {
            "operation": operation,
            "contestant": contestant.name,
            "nbytes": size,
            "seconds": times,
            "median_s": statistics.median(times),
            "algbw_Bps": algbw,
            "busbw_Bps": algbw * (world_size - 1) / world_size,
        }
        if contestant.groups is not None:
            calls = arguments.repeats + WARM_UPS
            sent = zip(contestant.sent(), before[index], strict=True)
            intra, inter = ((now - then) // calls for now, then in sent)
            record |= {"sent_intra_nbytes": intra, "sent_inter_nbytes": inter}
        records.append(record)
    return records


def table_of(operation: str, records: list[dict]) -> Table:
    table = Table(title=f"{operation}, {dist.get_world_size()} ranks")
    for column in ("size", "contestant", "ms", "algbw GB/s", "busbw GB/s", "of torch's time"):
        left = column == "contestant"
        table.add_column(column, justify="left" if left else "right", no_wrap=True)
    for record in records:
        if record["operation"] != operation:
            continue
        is_first = record["contestant"] == "torch"
        if is_first:
            table.add_section()
            torch_seconds = record["seconds"]
        ratios = [a / b for a, b in zip(record["seconds"], torch_seconds, strict=True)]
        table.add_row(
            text_of(record["nbytes"]) if is_first else "",
            record["contestant"],
            f"{record['median_s'] * 1e3:.3f}",
            f"{record['algbw_Bps'] / 1e9:.3f}",
            f"{record['busbw_Bps'] / 1e9:.3f}",
            f"{statistics.median(ratios):.2f}",
        )
    return table


def run(arguments: argparse.Namespace) -> None:
    """Measures everything on an initialised process group; rank 0 prints and writes."""
    torch.set_num_threads(1)
    everyone = contestants(arguments)
    records = []
    nbytes = arguments.smallest
    while nbytes <= arguments.largest:
        for operation in OPERATIONS:
            records += measure(arguments, everyone, operation, nbytes)
        nbytes *= arguments.factor
    if dist.get_rank() != 0:
        return
    console = Console(width=None if sys.stdout.isatty() else 100)
    for operation in OPERATIONS:
        console.print(table_of(operation, records))
    if arguments.json is not None:
        about = {
            "backend": dist.get_backend(),
            "ranks": dist.get_world_size(),
            "dtype": arguments.dtype,
            "repeats": arguments.repeats,
            "torch": torch.__version__,
            "torch_mics": mics.__version__,
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
            "carried_by": {c.name: c.groups.backends() for c in everyone if c.groups is not None},
        }
        arguments.json.write_text(json.dumps(about | {"records": records}, indent=1) + "\n")


def start_rank(local_rank: int, arguments: argparse.Namespace, store: str) -> None:
    """Runs one rank that this script started, or, with store "", one that a launcher started."""
    if arguments.device == "cuda":
        torch.cuda.set_device(local_rank)
    backend = "nccl" if arguments.device == "cuda" else "gloo"
    if store:
        dist.init_process_group(
            backend, init_method=f"file://{store}", rank=local_rank, world_size=arguments.ranks
        )
    else:
        dist.init_process_group(backend)
    run(arguments)
    mics.exit_rank()


def main() -> None:
    """Joins the launcher's world, or starts a world on this machine."""
    arguments = parse_arguments()
    if "RANK" in os.environ:
        start_rank(int(os.environ.get("LOCAL_RANK", "0")), arguments, "")
    with tempfile.TemporaryDirectory() as directory:
        store = str(Path(directory, "store"))
        torch.multiprocessing.spawn(start_rank, (arguments, store), arguments.ranks)


if __name__ == "__main__":
    main()
