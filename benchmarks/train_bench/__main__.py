"""Trains one model in several ways that take turns step by step: step times, bytes, parity.

    python benchmarks/emulated_cluster --nodes 4 --ranks-per-node 2 -- \\
        python benchmarks/train_bench --strategy none ddp fsdp2 hsdp_deferred@2 ours@2 --json out.json
    torchrun --nproc-per-node 4 benchmarks/train_bench --strategy ddp ours@2

  none            no communication: the compute alone
  ddp             DistributedDataParallel, gradients synchronised in the last micro-step
  fsdp2           FSDP2 over all ranks; fsdp2_best with explicit prefetch and the last block kept
  hsdp@P          FSDP2 over groups of P ranks
  *_deferred      replicas are synchronised in the last micro-step only
  *_nosync        gradients are synchronised in the last micro-step only, and kept whole until then
  ours@P          torch_mics; _each synchronises replicas in every micro-step, _flat gathers and reduces
                  in one hop, _gloo does without shared memory, _nosync as above,
                  _residency with node blocks of parameters and gradients kept over the step
  deepspeed_zero3, deepspeed_mics@P   where DeepSpeed is installed; what fails is recorded, with why
  control         sums in place of means: must not have parity
  .../our_rs      the peer with our reduce-scatter in place of Gloo's, which sends twice the bytes
  .../communication  without the waiting of virtual layers

With --compute virtual layers wait instead of computing, so that many ranks fit on few cores.

On a cluster, one contestant per launch (examples/launch has the files for SLURM and EKS):

    torchrun --nnodes 2 --nproc-per-node 8 ... benchmarks/train_bench --strategy ours@8 \\
        --shape bert_10b --device cuda --dtype bfloat16 --instance p4d.24xlarge --json out.json
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from contest import Contest, Record, one_process
from contestant import Contestant, Setting
from models import Shape, Transformer, VirtualModel, batch
from rich.console import Console
from rich.table import Table
from strategies import check_name, make_contestant
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy

import torch_mics as mics
from torch_mics.planner import load_calibration, published_shapes

# Only shapes that these models can have: the perceptron is four times as wide.
SHAPES = {
    name: shape
    for name, shape in published_shapes().items()
    if shape.mlp == 4 * shape.hidden and shape.mlp_matrices == 2
}
GLOBAL_ROWS = 8192  # of a step in the paper
WARM_UPS = 2  # steps whose gradients are compared with one process; not timed; virtual: 1

# Time of a layer's bytes on the link over the time of its forward: as BERT 10B on these machines.
PRESETS = {"p3dn": 1.06, "p4d": 0.57}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="train_bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--strategy", nargs="+", default=["none", "ddp", "fsdp2"], metavar="NAME")
    parser.add_argument("--base", help="base of the ratios; by default the first strategy")
    parser.add_argument("--steps", type=int, default=5, help="timed steps")
    parser.add_argument("--micro-steps", type=int, default=4)
    parser.add_argument("--optimizer", choices=("adamw", "sgd"), default="adamw")
    parser.add_argument("--model", choices=("gpt", "bert"), default="gpt")
    for name, default in (("layers", 8), ("width", 256), ("heads", 4), ("vocabulary", 2048)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--length", type=int, default=64, help="tokens of a row")
    parser.add_argument("--rows", type=int, default=1, help="rows of a micro-batch")
    parser.add_argument(
        "--shape",
        choices=SHAPES,
        help="a model of the MiCS paper with its batches: 8 rows a micro-step, 8192 a step, "
        "recomputation, and no comparison with one process",
    )
    parser.add_argument("--recompute", action="store_true", help="keep only the inputs of blocks")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of parameters and compute in FSDP2, HSDP and ours; gradients are reduced in float32",
    )
    parser.add_argument("--instance", help="an instance type of the planner, for the MFU")
    parser.add_argument("--compute", choices=("real", "virtual"), default="real")
    parser.add_argument("--layer-mb", type=float, default=4.0, help="virtual: MB of a layer")
    parser.add_argument("--layer-seconds", type=float, default=0.1, help="virtual: of its forward")
    parser.add_argument("--preset", choices=PRESETS, help="virtual: seconds of a layer from --rate")
    parser.add_argument("--rate", type=float, default=100e6, help="with --preset: bits per second")
    parser.add_argument("--no-parity", action="store_true", help="do not compare with one process")
    parser.add_argument("--json", type=Path, help="write everything here")
    arguments = parser.parse_args()
    if arguments.shape is not None:
        _take_shape(arguments)
    for name in ("steps", "micro_steps", "layers", "width", "heads", "length", "rows"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if arguments.dtype != "float32" and not arguments.no_parity:
        parser.error("one process trains in float32: --dtype needs --no-parity")
    if arguments.instance is not None:
        try:
            load_calibration(arguments.instance)
        except ValueError as error:
            parser.error(str(error))
    if arguments.width % arguments.heads:
        parser.error("--width must be a multiple of --heads")
    arguments.base = arguments.base or arguments.strategy[0]
    if arguments.base not in arguments.strategy:
        parser.error(f"--base must be one of the strategies: got {arguments.base!r}")
    if len(set(arguments.strategy)) < len(arguments.strategy):
        parser.error("each strategy may be given once")
    if arguments.preset is not None:
        nbytes = arguments.layer_mb * 1e6
        arguments.layer_seconds = 8 * nbytes / arguments.rate / PRESETS[arguments.preset]
    for name in arguments.strategy:
        if message := check_name(name, int(os.environ.get("WORLD_SIZE", "1"))):
            parser.error(message)
    return arguments


def _take_shape(arguments: argparse.Namespace) -> None:
    """Takes the model of the paper, and its batches for this number of ranks."""
    shape = SHAPES[arguments.shape]
    arguments.model = "bert" if "bert" in arguments.shape else "gpt"
    arguments.layers, arguments.width, arguments.heads = shape.layers, shape.hidden, shape.heads
    arguments.vocabulary, arguments.length = shape.vocabulary, shape.sequence
    arguments.rows, arguments.recompute, arguments.no_parity = 8, True, True
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    arguments.micro_steps = max(1, GLOBAL_ROWS // (arguments.rows * ranks))


class Task:
    """The model that is asked for, its optimizer and its loss."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self._shape = Shape(
            kind=arguments.model,
            layers=arguments.layers,
            width=arguments.width,
            heads=arguments.heads,
            vocabulary=arguments.vocabulary,
            length=arguments.length,
            rows=arguments.rows,
            recompute=arguments.recompute,
        )
        self.is_virtual = arguments.compute == "virtual"
        self._device = arguments.device

    def model(self, without_waiting: bool = False) -> nn.Module:
        torch.manual_seed(0)
        if not self.is_virtual:
            # Large models are built sharded; others whole, so that one process can train them too.
            with torch.device("meta" if self._arguments.shape else self._device):
                return Transformer(self._shape)
        seconds = 0.0 if without_waiting else self._arguments.layer_seconds
        numel = int(self._arguments.layer_mb * 1e6 / 4)
        return VirtualModel(self._arguments.layers, numel, seconds)

    def optimizer(self, model: nn.Module, optimizers: ModuleType = torch.optim) -> Any:
        if self._arguments.optimizer == "adamw":
            return optimizers.AdamW(model.parameters(), lr=1e-3)
        return optimizers.SGD(model.parameters(), lr=0.1)

    def loss(self, model: nn.Module, step: int, micro_step: int, rank: int) -> Tensor:
        if self.is_virtual:
            return model(torch.ones(1))
        return model(*(t.to(self._device) for t in batch(self._shape, step, micro_step, rank)))

    def rates(self, seconds: float) -> dict[str, float]:
        """Gives what a rank does in a step of `seconds`: tokens, TFLOPS by the paper's formula, MFU."""
        if self.is_virtual:
            return {}
        rows = self._shape.rows * self._arguments.micro_steps
        rates = {
            "tokens_per_s": rows * self._shape.length / seconds,
            "tflops": rows * self._shape.flops(self._shape.recompute) / seconds / 1e12,
        }
        if self._arguments.instance is not None:
            peak = load_calibration(self._arguments.instance)["peak"]
            rates["mfu"] = rows * self._shape.flops(recompute=False) / seconds / peak
        return rates


def reference(task: Task, arguments: argparse.Namespace) -> tuple[list[float], list[float]] | None:
    """Gives losses and gradient norms of one process, trained on rank 0. Collective."""
    if task.is_virtual or arguments.no_parity:
        return None
    found: list[Any] = [None]
    if dist.get_rank() == 0:
        model = task.model()
        steps = WARM_UPS + arguments.steps
        optimizer = task.optimizer(model)
        found[0] = one_process(
            model, optimizer, task.loss, steps, arguments.micro_steps, dist.get_world_size()
        )
    dist.broadcast_object_list(found)
    return found[0]


def _version_of(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, Any]:
    """Gives the versions that made the numbers."""
    git = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    )
    return {
        "torch": torch.__version__,
        "torch_mics": mics.__version__,
        "deepspeed": _version_of("deepspeed"),
        "python": platform.python_version(),
        "kernel": platform.release(),
        "cores": os.cpu_count(),
        "commit": git.stdout.strip() or None,
        "date": datetime.date.today().isoformat(),
    }


def peak_nbytes(device: str) -> int:
    """Gives this process' peak of memory: on a GPU allocated by torch, else resident."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def outside_nbytes(device: str) -> int:
    """Gives what is in use on a GPU and not torch's: CUDA's context, communicators, other processes."""
    if device != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def paired_ratios(records: dict[str, Record], base: str) -> dict[str, float]:
    """Gives each contestant's time relative to the base's in the same turn: the median over steps."""
    return {
        name: statistics.median(
            own / other for own, other in zip(r.seconds, records[base].seconds, strict=True)
        )
        for name, r in records.items()
        if not r.why_not and not records[base].why_not
    }


def show(
    records: dict[str, Record],
    ratios: dict[str, float],
    base: str,
    rates: dict[str, dict[str, float]],
) -> None:
    """Prints the table; TFLOPS and MFU are those of a rank."""
    table = Table(
        title="one step: time of the slowest rank, CPU of all ranks, bytes sent by node 0"
    )
    columns = ("strategy", "seconds", f"over {base}", "CPU s", "exposed s", "link MB", "local MB")
    for column in columns:
        table.add_column(column, justify="left" if column == "strategy" else "right")
    table.add_column("counted across MB", justify="right")
    has_mfu = any("mfu" in rate for rate in rates.values())
    for column in ("TFLOPS", "MFU") if has_mfu else ():
        table.add_column(column, justify="right")
    table.add_column("parity")

    def megabytes(nbytes: float | None) -> str:
        return "" if nbytes is None else f"{nbytes / 1e6:.2f}"

    for name, record in records.items():
        if record.why_not:
            blank = [""] * (len(table.columns) - 2)
            table.add_row(name, *blank, f"did not run: {record.why_not}")
            continue
        exposed = statistics.median(record.exposed)
        table.add_row(
            name,
            f"{statistics.median(record.seconds):.3f}",
            f"{ratios[name]:.3f}" if name in ratios else "",
            f"{statistics.median(record.cpu):.3f}",
            "" if exposed != exposed else f"{exposed:.3f}",
            megabytes(record.link_nbytes),
            megabytes(record.loopback_nbytes),
            megabytes(record.counted_inter_nbytes) if record.counted_inter_nbytes else "",
            *([f"{rates[name]['tflops']:.4g}", f"{rates[name]['mfu']:.1%}"] if has_mfu else []),
            record.parity,
        )
    Console(width=150).print(table)


def faults(contestants: list[Contestant], records: dict[str, Record]) -> list[str]:
    """Lists contestants whose parity is wrong. For a peer that may fail, that is a result."""
    found = []
    for contestant in contestants:
        if contestant.may_fail:
            continue
        parity = records[contestant.name].parity
        if parity != "not checked" and (parity == "exact") != contestant.has_parity:
            expected = "parity" if contestant.has_parity else "no parity"
            found.append(f"{contestant.name} must have {expected}: {parity}")
    return found


def main() -> None:
    """Runs the contest; ends with 1 when a contestant trains something else than one process."""
    arguments = parse_arguments()
    torch.set_num_threads(1)
    if arguments.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("gloo" if arguments.device == "cpu" else "cpu:gloo,cuda:nccl")
    task = Task(arguments)
    policy = None
    if arguments.dtype != "float32":
        dtype = getattr(torch, arguments.dtype)
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    setting = Setting(
        arguments.device,
        policy,
        task.optimizer,
        arguments.micro_steps,
    )
    single = reference(task, arguments)
    contestants = []
    for name in arguments.strategy:
        contestant = make_contestant(name, task.model, setting)
        if contestant.optimizer is None:
            contestant.optimizer = task.optimizer(contestant.model, contestant.optimizers)
        contestants.append(contestant)
    ranks_per_node = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
    contest = Contest(contestants, task.loss, arguments.micro_steps, ranks_per_node)
    warm_ups = 1 if task.is_virtual else WARM_UPS
    for step in range(warm_ups + arguments.steps):
        contest.turn(step, is_timed=step >= warm_ups)
        if dist.get_rank() == 0:
            print(f"step {step + 1} of {warm_ups + arguments.steps}", file=sys.stderr, flush=True)
    records = contest.finish(single)
    wrong = faults(contestants, records)
    if dist.get_rank() == 0:
        ratios = paired_ratios(records, arguments.base)
        rates = {
            name: task.rates(statistics.median(record.seconds))
            for name, record in records.items()
            if not record.why_not
        }
        show(records, ratios, arguments.base, rates)
        if arguments.json is not None:
            options = {name: value for name, value in vars(arguments).items() if name != "json"}
            numbers = {
                "versions": versions(),
                "options": options,
                "world_size": dist.get_world_size(),
                "ranks_per_node": ranks_per_node,
                "parameter_nbytes": sum(4 * p.numel() for p in task.model().parameters()),
                "reference_losses": None if single is None else single[0],
                "records": {name: dataclasses.asdict(r) for name, r in records.items()},
                "rates": rates,
                "peak_nbytes": peak_nbytes(arguments.device),
                "outside_nbytes": outside_nbytes(arguments.device),
                "ratios": ratios,
            }
            arguments.json.write_text(json.dumps(numbers, indent=1) + "\n")
        for message in wrong:
            print(f"error: {message}", file=sys.stderr)
    mics.exit_rank(1 if wrong else 0)  # while DDP's model still holds its process group


if __name__ == "__main__":
    main()
