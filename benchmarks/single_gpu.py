"""One GPT on one device: plain PyTorch, FSDP2 and torch_mics, alone in the world.

    python benchmarks/single_gpu.py --instance p5 --json single_gpu.json
    python benchmarks/single_gpu.py --device cpu --layers 2 --width 128 --heads 4 --length 64

The default is a model of 1.3 billion parameters in bfloat16 with AdamW. Each contestant trains in a
process of its own, so that its peak memory is its own; the contestants take turns, round by round.
With nothing to shard, what a contestant costs over plain PyTorch is overhead.

  plain   autocast, no wrapper
  fsdp2   fully_shard on blocks and model, world size 1
  ours    torch_mics.shard_model with its own AdamW, world size 1
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import torch_mics as mics
from torch_mics.planner import load_calibration

HERE = Path(__file__).resolve()
sys.path.insert(0, str(HERE.parent / "train_bench"))
from models import Shape, Transformer, batch  # noqa: E402

CONTESTANTS = ("plain", "fsdp2", "ours")
SHAPE = {"layers": 24, "width": 2048, "heads": 16, "vocabulary": 32768, "length": 1024, "rows": 4}
WARM_UPS = 3


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in SHAPE.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--recompute", action="store_true", help="keep only the inputs of blocks")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--instance", help="an instance type of the planner, for the MFU")
    parser.add_argument("--json", type=Path, help="write everything here")
    parser.add_argument("--contestant", choices=CONTESTANTS, help=argparse.SUPPRESS)  # of a child
    arguments = parser.parse_args()
    for name in (*SHAPE, "steps", "rounds"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be at least 1: got {getattr(arguments, name)}.")
    if arguments.width % arguments.heads:
        parser.error("--width must be a multiple of --heads.")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU: torch finds none. Use --device cpu.")
    return arguments


def shape_of(arguments: argparse.Namespace) -> Shape:
    sizes = {name: getattr(arguments, name) for name in SHAPE}
    return Shape(kind="gpt", recompute=arguments.recompute, **sizes)


# --- one contestant, in its own process -----------------------------------------------------------


@dataclasses.dataclass
class Result:
    """What one contestant did in one round."""

    seconds: list[float]  # of a step, to its end on the device
    host_seconds: list[float]  # until forward and backward have been issued
    exposed_seconds: float | None  # of a step, waiting for collectives; ours only
    peak_nbytes: int  # allocated on the GPU, or resident
    outside_nbytes: int  # in use on the GPU in the end and not torch's: context, communicators
    losses: list[float]


def make(name: str, arguments: argparse.Namespace) -> tuple[nn.Module, Any]:
    """Makes the contestant's model and optimizer; all start from the same values."""
    torch.manual_seed(0)
    with torch.device(arguments.device):
        model: nn.Module = Transformer(shape_of(arguments))
    policy = MixedPrecisionPolicy(
        param_dtype=getattr(torch, arguments.dtype), reduce_dtype=torch.float32
    )
    blocks = list(model.blocks)  # type: ignore[arg-type]
    if name == "fsdp2":
        mesh = init_device_mesh(arguments.device, (1,))
        for block in blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
    if name == "ours":
        mesh = mics.init_mesh(1, device_type=arguments.device)
        mics.shard_model(model, units=blocks, mesh=mesh, mp_policy=policy)
        return model, mics.optim.AdamW(model.parameters(), lr=1e-4)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-4)


def train(name: str, arguments: argparse.Namespace) -> Result:
    """Warms up, then times steps."""
    dist.init_process_group(
        "gloo" if arguments.device == "cpu" else "cpu:gloo,cuda:nccl",
        store=dist.HashStore(),
        rank=0,
        world_size=1,
    )
    model, optimizer = make(name, arguments)
    shape, dtype = shape_of(arguments), getattr(torch, arguments.dtype)
    result = Result([], [], None, 0, 0, [])
    exposed_before = 0.0
    for step in range(WARM_UPS + arguments.steps):
        tokens, targets = (t.to(arguments.device) for t in batch(shape, step, 0, 0))
        if step == WARM_UPS:
            exposed_before = exposed_of(name, model)
        finish(arguments.device)
        start = time.perf_counter()
        with torch.autocast(arguments.device, dtype, enabled=name == "plain"):
            loss = model(tokens, targets)
        loss.backward()
        issued = time.perf_counter()
        optimizer.step()
        optimizer.zero_grad()
        finish(arguments.device)
        result.losses.append(loss.item())
        if step >= WARM_UPS:
            result.seconds.append(time.perf_counter() - start)
            result.host_seconds.append(issued - start)
    if name == "ours":
        waited = exposed_of(name, model) - exposed_before
        result.exposed_seconds = waited / arguments.steps
    result.peak_nbytes = peak_nbytes(arguments.device)
    result.outside_nbytes = outside_nbytes(arguments.device)
    return result


def exposed_of(name: str, model: nn.Module) -> float:
    if name != "ours":
        return 0.0
    return sum(unit["gather"] + unit["reduce"] for unit in mics.exposed(model).values())


def finish(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def peak_nbytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def outside_nbytes(device: str) -> int:
    if device != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


# --- all of them ----------------------------------------------------------------------------------


def run_child(name: str) -> Result:
    """Runs one contestant for one round, and prints its result as the last line."""
    done = subprocess.run(
        [sys.executable, str(HERE), *sys.argv[1:], "--contestant", name],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise SystemExit(f"{name} ended with status {done.returncode}.")
    return Result(**json.loads(done.stdout.splitlines()[-1]))


def summary(arguments: argparse.Namespace, rounds: dict[str, list[Result]]) -> dict[str, Any]:
    """Gives medians over all steps, and ratios to plain, paired by round."""
    shape = shape_of(arguments)
    peak = load_calibration(arguments.instance)["peak"] if arguments.instance else None
    plain = [statistics.median(result.seconds) for result in rounds["plain"]]
    found = {}
    for name, results in rounds.items():
        seconds = statistics.median(s for result in results for s in result.seconds)
        host = statistics.median(s for result in results for s in result.host_seconds)
        mine = [statistics.median(result.seconds) for result in results]
        found[name] = {
            "seconds": seconds,
            "over_plain": statistics.median(a / b for a, b in zip(mine, plain, strict=True)),
            "tokens_per_s": shape.rows * shape.length / seconds,
            "mfu": shape.rows * shape.flops(recompute=False) / seconds / peak if peak else None,
            "peak_nbytes": max(result.peak_nbytes for result in results),
            "outside_nbytes": max(result.outside_nbytes for result in results),
            "host_seconds_per_unit": host / (shape.layers + 1),
            "exposed_seconds": results[-1].exposed_seconds,
            "last_loss": results[-1].losses[-1],
        }
    return found


def show(found: dict[str, Any], device: str) -> None:
    table = Table(title=f"one GPT on one {device}, world size 1")
    for column in ("", "s / step", "over plain", "tokens / s", "MFU", "peak GiB", "outside GiB"):
        table.add_column(column, justify="right" if column else "left")
    table.add_column("host us / unit", justify="right")
    table.add_column("exposed ms", justify="right")
    table.add_column("last loss", justify="right")
    for name, line in found.items():
        exposed = line["exposed_seconds"]
        table.add_row(
            name,
            f"{line['seconds']:.4f}",
            f"{line['over_plain']:.4f}",
            f"{line['tokens_per_s']:.0f}",
            "" if line["mfu"] is None else f"{line['mfu']:.1%}",
            f"{line['peak_nbytes'] / 2**30:.2f}",
            f"{line['outside_nbytes'] / 2**30:.2f}",
            f"{1e6 * line['host_seconds_per_unit']:.0f}",
            "" if exposed is None else f"{1e3 * exposed:.2f}",
            f"{line['last_loss']:.4f}",
        )
    Console(width=110).print(table)


def main() -> None:
    """Runs all contestants in turn, or the one that a parent has asked for."""
    arguments = parse_arguments()
    if arguments.contestant is not None:
        print(json.dumps(dataclasses.asdict(train(arguments.contestant, arguments))))
        mics.exit_rank()
    rounds: dict[str, list[Result]] = {name: [] for name in CONTESTANTS}
    for number in range(arguments.rounds):
        for name in CONTESTANTS:
            print(f"round {number + 1} of {arguments.rounds}: {name}", file=sys.stderr, flush=True)
            rounds[name].append(run_child(name))
    found = summary(arguments, rounds)
    show(found, arguments.device)
    if arguments.json is not None:
        device = torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu"
        numbers = {
            "device": device,
            "torch": torch.__version__,
            "options": {**vars(arguments), "json": None},
            "summary": found,
            "rounds": {
                name: [dataclasses.asdict(r) for r in all_] for name, all_ in rounds.items()
            },
        }
        arguments.json.write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    main()
