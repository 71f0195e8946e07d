"""What a training loop calls: microbatch, clip_grad_norm_, traffic."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from torch_mics import _C
from torch_mics._context import Context, contexts_of
from torch_mics._exchange import naming
from torch_mics._module import MiCSModule
from torch_mics._unit import units_of


def sharded_module(model: nn.Module, caller: str) -> nn.Module:
    """Gives the sharded module that `model` is, or that torch.compile has wrapped in it.

    Raises:
        TypeError: `model` is not sharded.
    """
    while "_orig_mod" in getattr(model, "_modules", ()):
        model = model.get_submodule("_orig_mod")
    if not isinstance(model, MiCSModule):
        raise TypeError(
            f"{caller} needs a sharded model: got {type(model).__name__}. Call shard_model() first."
        )
    return model


def check_sharded(model: nn.Module, caller: str) -> MiCSModule:
    """As sharded_module(), for those who call methods of MiCSModule."""
    return cast(MiCSModule, sharded_module(model, caller))


@contextlib.contextmanager
def microbatch(model: nn.Module, *, is_last: bool) -> Iterator[None]:
    """One micro-step of an accumulation; the backward inside is a boundary only when `is_last`.

    Gradients are reduced inside the partition group in every micro-step and over the replicas at the
    boundary. Until the boundary `.grad` is what it was before.

    Args:
        model: the sharded root module.
        is_last: whether this is the last micro-step of the step.
    """
    module = check_sharded(model, "microbatch")
    module.set_requires_gradient_sync(is_last)
    try:
        yield
    finally:
        module.set_requires_gradient_sync(True)


@torch.no_grad()
def clip_grad_norm_(
    parameters: torch.Tensor | Iterable[torch.Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    *,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> torch.Tensor:
    """Scales gradients so that their norm over the whole model is at most `max_norm`.

    Works on the local shards, with one reduction over the partition group per mesh. Norms are taken
    per parameter and then joined, as torch does, so that one process gets torch's bits; scaling takes
    gradients that lie next to each other in a unit's buffer together. Plain parameters beside sharded
    ones count once, as replicated.

    Args:
        parameters: sharded parameters, plain ones, or both.
        max_norm: the bound.
        norm_type: of the vector of all gradient elements; may be inf.
        error_if_nonfinite: raise when the norm is not finite. On every rank alike.
        foreach: as torch.nn.utils.clip_grad_norm_.

    Returns:
        The norm before scaling, a plain 0-dim tensor in fp32 (or fp64), equal on every rank.

    Raises:
        RuntimeError: the norm is not finite and error_if_nonfinite is set.
    """
    if isinstance(parameters, torch.Tensor):
        parameters = [parameters]
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return torch.tensor(0.0)
    sharded: dict[DeviceMesh, list[torch.Tensor]] = {}
    plain: list[torch.Tensor] = []
    for gradient in gradients:
        if isinstance(gradient, DTensor):
            sharded.setdefault(gradient.device_mesh, []).append(gradient._local_tensor)
        else:
            plain.append(gradient)
    partial_norms = [
        _reduce_norm(_local_norm(tensors, norm_type), norm_type, mesh)
        for mesh, tensors in sharded.items()
    ]
    if plain:
        partial_norms.append(_local_norm(plain, norm_type))
    total = torch.linalg.vector_norm(torch.stack(partial_norms), norm_type)
    if error_if_nonfinite and not torch.isfinite(total):
        raise RuntimeError(
            f"the gradient norm must be finite: got {total.item()} (norm_type={norm_type}). Skip the "
            "step, or pass error_if_nonfinite=False."
        )
    # As torch: a factor of at most 1, multiplied without a look at its value.
    factor = torch.clamp(max_norm / (total + 1e-6), max=1.0)
    for tensors in [*sharded.values(), plain]:
        joined = _C.join_neighbours(tensors)
        if foreach is False:
            for tensor in joined:
                tensor.mul_(factor)
        elif joined:
            torch._foreach_mul_(joined, factor)
    return total


def _local_norm(tensors: list[torch.Tensor], norm_type: float) -> torch.Tensor:
    is_double = any(tensor.dtype == torch.float64 for tensor in tensors)
    dtype = torch.float64 if is_double else torch.float32
    nonempty = [tensor for tensor in tensors if tensor.numel() > 0]
    if not nonempty:
        return torch.zeros((), dtype=dtype, device=tensors[0].device)
    norms = torch._foreach_norm(nonempty, norm_type, dtype=dtype)
    return torch.linalg.vector_norm(torch.stack(norms), norm_type)


def _reduce_norm(norm: torch.Tensor, norm_type: float, mesh: DeviceMesh) -> torch.Tensor:
    group = mesh.get_group(mesh.ndim - 1)
    with naming("clip_grad_norm_", dist.get_process_group_ranks(group)):
        if norm_type == float("inf"):
            dist.all_reduce(norm, dist.ReduceOp.MAX, group)
            return norm
        powered = norm**norm_type
        dist.all_reduce(powered, dist.ReduceOp.SUM, group)
        return powered ** (1.0 / norm_type)


def traffic(model: nn.Module) -> dict[str, dict[str, int]]:
    """Gives this rank's calls and bytes since the first forward, by communicator.

    Names: gather/rail, gather/intra, reduce/rail, reduce/intra, replicate, control. Keys: calls,
    sent_intra_nbytes, sent_inter_nbytes, received_intra_nbytes, received_inter_nbytes, where intra and
    inter are peers on the same and on another node. Empty before the first forward.
    """
    totals: dict[str, dict[str, int]] = {}
    for context in contexts_of(units_of(sharded_module(model, "traffic"))):
        for name, counters in context.traffic().items():
            total = totals.setdefault(name, dict.fromkeys(counters, 0))
            for field, count in counters.items():
                total[field] += count
    return totals


def memory(model: nn.Module) -> dict[str, int]:
    """Gives the bytes of the runtime's working memory on this rank, by part.

    It is one allocation for full parameters, node blocks and reductions, planned from the units and their
    settings (docs/training.md#memory); shards, gradients and optimizer states are not in it. "beside the
    plan" counts what did not fit, over the life of the plan: several units unsharded by hand, say.

    Collective before the first forward.
    """
    totals: dict[str, int] = {}
    for context in _contexts(model, "memory"):
        planned = context.engine.memory()
        for part in planned.parts:
            totals[part.name] = totals.get(part.name, 0) + part.nbytes
        totals["beside the plan"] = totals.pop("beside the plan", 0) + planned.grown_nbytes
    return totals


def exposed(model: nn.Module) -> dict[str, dict[str, float]]:
    """Gives the seconds that this rank's training thread has stood still for communication, by unit.

    By name of the unit: "gather" and "reduce", since the first forward. It is what compute has not hidden,
    waiting for slower ranks included. On CPUs; a device's own waits are not seen. torch.profiler shows the
    same waits as ranges "torch_mics: ...". Empty before the first forward.
    """
    return {
        unit.name: {
            "gather": context.engine.exposed(unit.index).gather.total_seconds(),
            "reduce": context.engine.exposed(unit.index).reduce.total_seconds(),
        }
        for context in contexts_of(units_of(sharded_module(model, "exposed")))
        for unit in context.units
    }


def _contexts(model: nn.Module, caller: str) -> list[Context]:
    """Those of the units below `model`; that of the model itself, made now, where there is none."""
    module = sharded_module(model, caller)
    found = contexts_of(units_of(module))
    if found:
        return found
    try:
        return [cast(MiCSModule, module)._context()]
    except _C.TimeoutError as error:
        # Other ranks may as well run their first forward.
        raise _C.TimeoutError(
            f"{caller} must be called on every rank before the first forward: {error}"
        ) from error


def describe(model: nn.Module) -> str:
    """Gives the start-up report: groups, units, what carries each communicator, planned memory.

    Also which units shard_model() joined or left to the root for what they share, and which have been lent
    so far (docs/training.md#units). Rank 0 also logs it at the first forward, by the logger "torch_mics" at
    level INFO. Collective before the first forward.
    """
    return "\n".join(context.describe() for context in _contexts(model, "describe"))


def backends(model: nn.Module) -> dict[str, str]:
    """Gives what carries each communicator: "shm", or "c10d" or "local" with the reason.

    Names as in traffic(). Empty before the first forward.
    """
    found: dict[str, str] = {}
    for context in contexts_of(units_of(sharded_module(model, "backends"))):
        found |= context.backends()
    return found
