"""The contestants: one way each to train the same model on all ranks.

A name is a strategy and, where it has groups, their size: "ddp", "hsdp_deferred@2", "ours@4". Behind a
slash it may have a variant: "/our_rs" plugs our reduce-scatter into a peer, "/communication" takes the
waiting out of virtual layers.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from contestant import Contestant, Setting
from deepspeed_strategies import make_deepspeed
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

import torch_mics as mics
from torch_mics.collectives import GroupCollectives

MakeModel = Callable[[bool], nn.Module]  # (without waiting?)


class OurReduceScatter:
    """torch_mics' reduce-scatter, for FSDP2's set_custom_reduce_scatter()."""

    def __init__(self, groups: GroupCollectives) -> None:
        self._groups = groups

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        self._groups.reduce_scatter(output_tensor, input_tensor)
        if op == dist.ReduceOp.AVG:
            output_tensor.div_(self._groups.size)


def _plain(name: str, model: nn.Module) -> Contestant:
    return Contestant(name, model, copies=1, has_parity=False)


def _ddp(name: str, model: nn.Module) -> Contestant:
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)

    def micro_step(is_last: bool) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if is_last else wrapped.no_sync()

    return Contestant(name, wrapped, dist.get_world_size(), micro_step)


def _fsdp2(
    name: str, model: nn.Module, shard_size: int, variants: set[str], setting: Setting
) -> Contestant:
    world_size = dist.get_world_size()
    strategy = name.partition("@")[0].partition("/")[0]
    if shard_size == world_size:
        mesh = init_device_mesh(setting.device, (world_size,), mesh_dim_names=("shard",))
    else:
        sizes = (world_size // shard_size, shard_size)
        mesh = init_device_mesh(setting.device, sizes, mesh_dim_names=("replicate", "shard"))
    options: dict[str, Any] = {"mp_policy": setting.policy} if setting.policy else {}
    blocks = list(model.blocks)  # type: ignore[arg-type]
    for block in blocks:
        keeps = strategy == "fsdp2_best" and block is blocks[-1]
        fully_shard(block, mesh=mesh, reshard_after_forward=not keeps, **options)
    fully_shard(model, mesh=mesh, **options)
    if _is_on_meta(model):
        model.to_empty(device=setting.device)
        for module in model.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    root = model
    assert isinstance(root, FSDPModule)
    if strategy == "fsdp2_best":
        for number, block in enumerate(blocks):
            block.set_modules_to_forward_prefetch(blocks[number + 1 : number + 3])
            block.set_modules_to_backward_prefetch(blocks[max(0, number - 2) : number][::-1])
    if "our_rs" in variants:
        groups = GroupCollectives(mics.init_mesh(shard_size, device_type=setting.device))
        for module in [*blocks, model]:
            module.set_custom_reduce_scatter(OurReduceScatter(groups))

    @contextlib.contextmanager
    def micro_step(is_last: bool) -> Iterator[None]:
        if strategy.endswith("_deferred"):
            root.set_requires_all_reduce(is_last)
        if strategy.endswith("_nosync"):
            root.set_requires_gradient_sync(is_last)
        yield

    return Contestant(name, model, world_size // shard_size, micro_step)


def _is_on_meta(model: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in model.parameters())


def _ours(name: str, model: nn.Module, shard_size: int, setting: Setting) -> Contestant:
    strategy = name.partition("@")[0].partition("/")[0]
    mesh = mics.init_mesh(
        shard_size,
        device_type=setting.device,
        intra_backend="c10d" if strategy == "ours_gloo" else "auto",
    )
    options: dict[str, Any] = {"mp_policy": setting.policy}
    if strategy == "ours_flat":
        options["hierarchical_gather"] = False
    if strategy == "ours_residency":
        options |= {"keep_between_microsteps": "block", "accumulate": "block"}
    if strategy == "ours_nosync":
        options["accumulate"] = "local"
    blocks = list(model.blocks)  # type: ignore[arg-type]
    mics.shard_model(model, units=blocks, mesh=mesh, **options)
    if _is_on_meta(model):
        mics.materialize(model)

    def micro_step(is_last: bool) -> contextlib.AbstractContextManager[None]:
        return mics.microbatch(model, is_last=is_last or strategy == "ours_each")

    def counted() -> tuple[int, int]:
        counters = mics.traffic(model).values()
        inside, across = (
            sum(c[f"sent_{tier}_nbytes"] for c in counters) for tier in ("intra", "inter")
        )
        return inside, across

    def exposed() -> float:
        return sum(u["gather"] + u["reduce"] for u in mics.exposed(model).values())

    return Contestant(
        name,
        model,
        dist.get_world_size() // shard_size,
        micro_step,
        optimizers=mics.optim,
        counted=counted,
        exposed=exposed,
    )


def _control(name: str, model: nn.Module, setting: Setting) -> Contestant:
    """Sums where means are right: the parity check must catch it."""
    found = _ours(name, model, dist.get_world_size(), setting)
    found.model.set_gradient_divide_factor(1.0)  # type: ignore[operator]
    return dataclasses.replace(found, has_parity=False)


OURS = ("ours", "ours_each", "ours_flat", "ours_gloo", "ours_nosync", "ours_residency")
PEERS = ("fsdp2", "fsdp2_best", "fsdp2_nosync", "hsdp", "hsdp_deferred", "hsdp_nosync")
DEEPSPEED = ("deepspeed_zero3", "deepspeed_mics")
STRATEGIES = ("none", "ddp", *PEERS, *DEEPSPEED, *OURS, "control")
VARIANTS = ("our_rs", "communication")


def check_name(name: str, world_size: int) -> str | None:
    """Says what is wrong with a contestant's name."""
    strategy, _, variants = name.partition("/")
    strategy, has_size, size = strategy.partition("@")
    if strategy not in STRATEGIES:
        return f"strategy must be one of {', '.join(STRATEGIES)}: got {strategy!r} in {name!r}."
    needs_size = strategy in (*OURS, "deepspeed_mics") or strategy.startswith("hsdp")
    if needs_size != bool(has_size):
        return f"{strategy!r} is written {'with' if needs_size else 'without'} @P: got {name!r}."
    if needs_size and (not size.isdigit() or int(size) < 1 or world_size % int(size)):
        return f"P must divide the number of ranks: got {name!r} and {world_size} ranks."
    for variant in filter(None, variants.split("/")):
        if variant not in VARIANTS:
            return f"a variant must be one of {', '.join(VARIANTS)}: got {variant!r} in {name!r}."
        if variant == "our_rs" and strategy not in PEERS:
            return f"our reduce-scatter fits FSDP2 and HSDP: got {name!r}."
    return None


def make_contestant(name: str, make_model: MakeModel, setting: Setting) -> Contestant:
    """Builds the contestant of a valid name. Collective."""
    head, *variants = name.split("/")
    strategy, _, size = head.partition("@")
    model = make_model("communication" in variants)
    if strategy == "none":
        return _plain(name, model)
    if strategy == "ddp":
        return _ddp(name, model)
    if strategy == "control":
        return _control(name, model, setting)
    if strategy in DEEPSPEED:
        return make_deepspeed(name, model, int(size) if size else None, setting)
    shard_size = int(size) if size else dist.get_world_size()
    if strategy in OURS:
        return _ours(name, model, shard_size, setting)
    return _fsdp2(name, model, shard_size, set(variants), setting)
