"""Host time of optimizer.step() for many small parameters: torch_mics.optim beside torch's AdamW.

    python benchmarks/optimizer_overhead.py

One process, a world of one. Two copies of one sharded model are stepped in turn: one by
torch_mics.optim.AdamW, one by torch.optim.AdamW(foreach=True), which sees the same DTensors. For scale:
torch's AdamW over plain tensors of the same sizes, and over one flat tensor of all. Each line is the
median over the rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import torch_mics as mics


class Unit(nn.Module):
    """Adds up what its parameters make of the input."""

    def __init__(self, num_parameters: int, numel: int) -> None:
        super().__init__()
        self.scales = nn.ParameterList(
            nn.Parameter(torch.rand(numel)) for _ in range(num_parameters)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for scale in self.scales:
            x = x + scale
        return x


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--units", type=int, default=100)
    parser.add_argument("--parameters", type=int, default=10, help="per unit")
    parser.add_argument("--numel", type=int, default=64, help="elements per parameter")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", type=Path, help="write the numbers here")
    return parser.parse_args()


def sharded_model(arguments: argparse.Namespace) -> nn.Module:
    """Makes a sharded model that has gradients."""
    torch.manual_seed(0)
    units = [Unit(arguments.parameters, arguments.numel) for _ in range(arguments.units)]
    mesh = init_device_mesh("cpu", (1,))
    model = mics.shard_model(nn.Sequential(*units), units=units, mesh=mesh)
    model(torch.rand(arguments.numel)).sum().backward()
    return model


def plain_parameters(num_parameters: int, numel: int) -> list[nn.Parameter]:
    parameters = [nn.Parameter(torch.rand(numel)) for _ in range(num_parameters)]
    for parameter in parameters:
        parameter.grad = torch.rand_like(parameter)
    return parameters


def main() -> None:
    """Prints a table, and the ratio as the last line."""
    arguments = parse_arguments()
    torch.set_num_threads(1)
    count = arguments.units * arguments.parameters
    mics.init_mesh(1, device_type="cpu")  # makes the process group
    models = [sharded_model(arguments) for _ in range(2)]
    candidates = {
        "torch_mics.optim, sharded": mics.optim.AdamW(models[0].parameters()),
        "torch foreach, sharded (DTensors)": torch.optim.AdamW(
            models[1].parameters(), foreach=True
        ),
        "torch foreach, plain tensors": torch.optim.AdamW(
            plain_parameters(count, arguments.numel), foreach=True
        ),
        "torch foreach, one flat tensor": torch.optim.AdamW(
            plain_parameters(1, count * arguments.numel), foreach=True
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for round_number in range(arguments.rounds + 2):
        for name, optimizer in candidates.items():
            start = time.perf_counter()
            optimizer.step()
            if round_number >= 2:  # the first steps create the state
                seconds[name].append(time.perf_counter() - start)
    for mine, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(mine.to_local(), other.to_local()), "the optimizers must agree"

    medians = {name: statistics.median(times) for name, times in seconds.items()}
    table = Table(title=f"optimizer.step(), {count} parameters in {arguments.units} units")
    table.add_column("AdamW")
    table.add_column("ms", justify="right")
    for name, median in medians.items():
        table.add_row(name, f"{median * 1e3:.3f}")
    Console().print(table)
    ours, theirs = list(medians.values())[:2]
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"medians_s": medians, "ratio": ours / theirs}) + "\n")
    print(f"ratio ours/torch = {ours / theirs:.4f}")


if __name__ == "__main__":
    main()
