"""What a training loop calls: microbatch and clip_grad_norm_."""

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
from torch_mics._exchange import naming
from torch_mics._module import MiCSModule, sharded_module


@contextlib.contextmanager
def microbatch(model: nn.Module, *, is_last: bool) -> Iterator[None]:
    """One micro-step of an accumulation; the backward inside is a boundary only when `is_last`.

    Gradients are reduced inside the partition group in every micro-step and over the replicas at the
    boundary. Until the boundary `.grad` stays as it was.

    Args:
        model: the sharded root module.
        is_last: whether this is the last micro-step of the step.
    """
    module = cast(MiCSModule, sharded_module(model, "microbatch"))
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
    per parameter and then joined, as torch does, so that one process gets torch's bits. Gradients that
    lie next to each other in a unit's buffer are scaled by one operation. Plain parameters beside
    sharded ones count once, as replicated.

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
    # As torch: the factor is at most 1, and is applied without reading it on the host.
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
