"""Trains one model in one process and on ranks, and compares gradients and parameters."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

import torch_mics as mics
from support.models import batch, loss, make_gpt

STEPS = 6
OPTIMIZERS = ("sgd", "momentum", "adamw")
MAX_NORM = 0.5  # below the norms of the model, so that clipping is active


@dataclasses.dataclass(frozen=True)
class Task:
    """What is trained: the same in one process and on any number of ranks."""

    world_size: int
    micro_steps: int
    clip: bool
    optimizer: str
    tied: bool = True


@dataclasses.dataclass(frozen=True)
class Case:
    """How it is sharded."""

    task: Task
    ranks_per_node: int
    partition_size: int
    hierarchical: bool
    divide_factor: float | None = None  # set by the negative control


@dataclasses.dataclass
class Reference:
    """One process: parameters before every step, gradients of every step, final parameters.

    Gradients are as before clipping.
    """

    trajectory: list[dict[str, torch.Tensor]]
    gradients: list[dict[str, torch.Tensor]]
    parameters: dict[str, torch.Tensor]


@dataclasses.dataclass
class Deviation:
    """Largest relative L2 deviation of a tensor from the reference."""

    gradient: float
    parameter: float
    replicas_agree: bool = True


def make_optimizer(name: str, model: nn.Module) -> torch.optim.Optimizer:
    if name == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    momentum = 0.9 if name == "momentum" else 0.0
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)


def train_alone(task: Task) -> Reference:
    model = make_gpt(task.tied)
    optimizer = make_optimizer(task.optimizer, model)
    trajectory, gradients = [], []
    for step in range(STEPS):
        trajectory.append({n: p.detach().clone() for n, p in model.named_parameters()})
        for micro_step in range(task.micro_steps):
            for rank in range(task.world_size):
                part = loss(model, batch(step, micro_step, rank))
                (part / (task.micro_steps * task.world_size)).backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
        if task.clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
    return Reference(
        trajectory, gradients, {n: p.detach().clone() for n, p in model.named_parameters()}
    )


def own_rows(parameter: torch.Tensor, full: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's rows of a parameter or gradient, and the same rows of a full tensor."""
    if not isinstance(parameter, DTensor):
        return parameter.detach(), full
    mesh = parameter.device_mesh
    rows = -(-full.shape[0] // mesh.size(mesh.ndim - 1))
    first = min(rows * mesh.get_local_rank(mesh.ndim - 1), full.shape[0])
    return parameter.to_local().detach(), full[first : first + rows]


def local_error(mine: torch.Tensor, reference: torch.Tensor) -> tuple[float, float]:
    """Squared error and squared size over this rank's rows."""
    local, rows = own_rows(mine, reference)
    error = (local.double() - rows.double()).square().sum().item()
    return error, rows.double().square().sum().item()


# Cases of one launch share meshes: every process group costs sockets and threads.
Meshes = dict[tuple[int, int], DeviceMesh]


def make_sharded(case: Case, meshes: Meshes) -> nn.Module:
    key = (case.partition_size, case.ranks_per_node)
    if key not in meshes:
        meshes[key] = mics.init_mesh(key[0], device_type="cpu", gpus_per_node=key[1])
    mesh = meshes[key]
    model = make_gpt(case.task.tied)
    mics.shard_model(model, mesh=mesh, hierarchical_gather=case.hierarchical)
    if case.divide_factor is not None:
        for module in model.modules():
            if isinstance(module, mics.MiCSModule):
                module.set_gradient_divide_factor(case.divide_factor)
    return model


def run_step(rank: int, model: nn.Module, task: Task, step: int) -> None:
    for micro_step in range(task.micro_steps):
        with mics.microbatch(model, is_last=micro_step == task.micro_steps - 1):
            (loss(model, batch(step, micro_step, rank)) / task.micro_steps).backward()


def train_sharded(rank: int, case: Case, reference: Reference, meshes: Meshes) -> dict[str, Any]:
    """Trains on this rank; returns squared errors, and a digest of its gradients.

    Gradients are compared at the reference's own parameters, so that what is seen is the error of the
    gradient and not how far the parameters have drifted apart. Then a free run gives the parameters.
    """
    model = make_sharded(case, meshes)
    gradient_errors: list[dict[str, tuple[float, float]]] = []
    for step in range(STEPS):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                local, rows = own_rows(parameter, reference.trajectory[step][name])
                local.copy_(rows)
        run_step(rank, model, case.task, step)
        gradient_errors.append(
            {
                name: local_error(parameter.grad, reference.gradients[step][name])
                for name, parameter in model.named_parameters()
            }
        )
        model.zero_grad()
    model = make_sharded(case, meshes)
    optimizer = make_optimizer(case.task.optimizer, model)
    digest = 0.0
    for step in range(STEPS):
        run_step(rank, model, case.task, step)
        digest += sum(p.grad.to_local().double().sum().item() for p in model.parameters())
        if case.task.clip:
            mics.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
    parameter_errors = {
        name: local_error(parameter, reference.parameters[name])
        for name, parameter in model.named_parameters()
    }
    return {"gradients": gradient_errors, "parameters": parameter_errors, "digest": digest}


def train_ddp(rank: int, task: Task, reference: Reference) -> dict[str, Any]:
    """The same with DistributedDataParallel: how much rounding alone moves the parameters."""
    model = make_gpt(task.tied)
    ddp = nn.parallel.DistributedDataParallel(model)
    optimizer = make_optimizer(task.optimizer, model)
    for step in range(STEPS):
        for micro_step in range(task.micro_steps):
            ddp.require_backward_grad_sync = micro_step == task.micro_steps - 1
            (loss(ddp, batch(step, micro_step, rank)) / task.micro_steps).backward()
        if task.clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
    errors = {n: local_error(p, reference.parameters[n]) for n, p in model.named_parameters()}
    return {"gradients": [], "parameters": errors, "digest": 0.0}


def run_all(
    rank: int, cases: list[Case | Task], references: dict[Task, Reference]
) -> list[dict[str, Any]]:
    """Runs many cases in one launch; a Task stands for its DDP run."""
    meshes: Meshes = {}
    results = []
    for case in cases:
        if isinstance(case, Task):
            results.append(train_ddp(rank, case, references[case]))
        else:
            results.append(train_sharded(rank, case, references[case.task], meshes))
        dist.barrier()
    return results


def _relative(errors: list[tuple[float, float]]) -> float:
    size = sum(reference for _, reference in errors)
    return (sum(error for error, _ in errors) / max(size, 1e-30)) ** 0.5


def _largest(per_rank: list[dict[str, tuple[float, float]]]) -> float:
    return max(_relative([errors[name] for errors in per_rank]) for name in per_rank[0])


def deviation(case: Case | Task, per_rank: list[dict[str, Any]]) -> Deviation:
    """Joins what the ranks of each replica found."""
    size = 1 if isinstance(case, Task) else case.partition_size
    replicas = [per_rank[first : first + size] for first in range(0, len(per_rank), size)]
    gradient, parameter = 0.0, 0.0
    for replica in replicas:
        for step in range(len(replica[0]["gradients"])):
            gradient = max(gradient, _largest([rank["gradients"][step] for rank in replica]))
        parameter = max(parameter, _largest([rank["parameters"] for rank in replica]))
    digests = [[rank["digest"] for rank in replica] for replica in replicas]
    return Deviation(gradient, parameter, all(found == digests[0] for found in digests))
