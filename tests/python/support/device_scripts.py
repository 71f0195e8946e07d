"""What training scripts do, on any device: each gives tensors on the CPU that say what it came to.

    found = SCRIPTS["accumulation"](Script(rank, "fakegpu", shard_size=2))

A script's numbers are the same, bit for bit, on the CPU and on a device of support.fake_device, which
raises wherever a tensor of the CPU meets one of the device.
"""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import torch_mics as mics
from support.models import TinyGPT, batch, loss, make_gpt
from torch_mics.checkpoint import TrainState
from torch_mics.collectives import GroupCollectives

Result = dict[str, torch.Tensor]
STEPS = 2
BF16 = mics.MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
FP16 = mics.MixedPrecisionPolicy(param_dtype=torch.float16, reduce_dtype=torch.float32)


@dataclasses.dataclass(frozen=True)
class Script:
    """Where a script runs."""

    rank: int
    device: str
    shard_size: int

    @property
    def mesh(self) -> Any:
        """The mesh of the shards."""
        return mics.init_mesh(self.shard_size, device_type=self.device)

    def make(self, **options: Any) -> Any:
        """A sharded model; its values come from the CPU."""
        return mics.shard_model(make_gpt(tied=True), mesh=self.mesh, **options)

    def batch(self, step: int, micro_step: int = 0) -> Any:
        """This rank's data, on the device."""
        return tuple(part.to(self.device) for part in batch(step, micro_step, self.rank))

    def loss(self, model: nn.Module, step: int = 0, micro_step: int = 0) -> torch.Tensor:
        """The loss of one batch. Only this kernel of attention is the same on every device."""
        with sdpa_kernel(SDPBackend.MATH):
            return loss(model, self.batch(step, micro_step))

    def train(self, model: Any, optimizer: Any, *, micro_steps: int = 1) -> list[torch.Tensor]:
        """Two steps; gives losses and norms."""
        numbers = []
        for step in range(STEPS):
            for micro_step in range(micro_steps):
                with mics.microbatch(model, is_last=micro_step == micro_steps - 1):
                    value = self.loss(model, step, micro_step)
                    with sdpa_kernel(SDPBackend.MATH):
                        (value / micro_steps).backward()
                numbers.append(value.detach())
            numbers.append(mics.clip_grad_norm_(model.parameters(), 0.5))
            optimizer.step()
            optimizer.zero_grad()
        return numbers


def values(model: nn.Module, numbers: Any = ()) -> Result:
    """Full parameters and `numbers`, on the CPU. Collective."""
    found = {name: _whole(value).cpu() for name, value in model.state_dict().items()}
    return found | {f"number {i}": number.cpu() for i, number in enumerate(numbers)}


def _whole(value: torch.Tensor) -> torch.Tensor:
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach()


def _trains(script: Script, micro_steps: int = 2, **options: Any) -> Result:
    model = script.make(**options)
    optimizer = mics.optim.AdamW(model.parameters(), lr=1e-2)
    return values(model, script.train(model, optimizer, micro_steps=micro_steps))


def _keeps_blocks(script: Script) -> Result:
    """Node blocks between micro-steps, where a group has several nodes."""
    blocks: Any = {"accumulate": "block", "keep_between_microsteps": "block"}
    return _trains(script, **(blocks if script.shard_size == 4 else {}))


def _with_torch(script: Script, make: Callable[..., Any], **options: Any) -> Result:
    model = script.make()
    optimizer = make(model.parameters(), lr=1e-2, **options)
    return values(model, script.train(model, optimizer))


def _recomputes(script: Script) -> Result:
    model = make_gpt()
    for block in model.blocks:
        inner = block.forward
        block.forward = lambda x, inner=inner: checkpoint(inner, x, use_reentrant=False)
    mics.shard_model(model, mesh=script.mesh)
    return values(model, script.train(model, mics.optim.SGD(model.parameters(), momentum=0.9)))


def _scales(script: Script) -> Result:
    model = script.make(mp_policy=FP16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=True)
    scaler = torch.amp.GradScaler(script.device, init_scale=2.0**17)  # overflows at first
    numbers = []
    for step in range(4):
        with sdpa_kernel(SDPBackend.MATH):
            scaler.scale(script.loss(model, step)).backward()
        scaler.unscale_(optimizer)
        numbers.append(mics.clip_grad_norm_(model.parameters(), 1.0))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        numbers.append(torch.tensor(scaler.get_scale()))
    return values(model, numbers)


def _averages(script: Script) -> Result:
    """An average of the weights, which evaluation puts into the model for a while."""
    model = script.make()
    optimizer = mics.optim.AdamW(model.parameters(), lr=1e-2)
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    numbers = []
    for step in range(STEPS):
        numbers += script.train(model, optimizer)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                average[name].lerp_(parameter, 0.3)
            torch._foreach_mul_(list(average.values()), 0.99)
        kept = copy.deepcopy(model.state_dict())
        model.load_state_dict(average, strict=False)
        with torch.no_grad():
            numbers.append(script.loss(model, step))
        model.load_state_dict(kept)
    return values(model, numbers)


def _saves(script: Script) -> Result:
    model, other = script.make(), script.make()
    optimizer = mics.optim.AdamW(model.parameters(), lr=1e-2)
    later = torch.optim.AdamW(other.parameters(), lr=1e-2, foreach=True)
    numbers = script.train(model, optimizer)
    script.train(other, later)
    paths = [tempfile.mkdtemp() if script.rank == 0 else ""]
    dist.broadcast_object_list(paths, device=torch.device("cpu"))
    path = Path(paths[0]) / "saved"
    TrainState(model, optimizer).save(path)
    TrainState(other, later).load(path)
    return values(other, numbers + script.train(other, later))


def _full_states(script: Script) -> Result:
    model, other = script.make(), script.make()
    numbers = script.train(model, mics.optim.AdamW(model.parameters(), lr=1e-2))
    full = mics.full_state_dict(model, rank0_only=False, cpu_offload=False)
    mics.load_full_state_dict(other, full if script.rank == 0 else {})
    mics.load_full_state_dict(other, mics.full_state_dict(model, rank0_only=False), broadcast=False)
    with mics.unsharded(other, writeback=True):
        for parameter in other.parameters():
            parameter.data.mul_(0.5)
    numbers += script.train(other, mics.optim.SGD(other.parameters(), lr=1e-2))
    return {**values(other, numbers), **{f"full {k}": v.cpu() for k, v in full.items()}}


def _materializes(script: Script) -> Result:
    """Draws nothing: the generators of devices differ."""
    with mics.meta_device():
        model = TinyGPT()
        for index, parameter in enumerate(model.parameters()):
            numel = parameter.numel()
            new = torch.arange(numel, dtype=torch.float32) * (0.01 / numel) * (index + 1)
            parameter.data.copy_(new.view(parameter.shape))
    mics.shard_model(model, mesh=script.mesh)
    mics.materialize(model)
    return values(model, script.train(model, mics.optim.AdamW(model.parameters())))


def _keeps(script: Script) -> Result:
    """Zeroed gradients that are kept, lists to prefetch, hooks, units by hand, a frozen parameter."""
    model = script.make()
    blocks = list(model.blocks)
    blocks[0].set_modules_to_forward_prefetch(blocks[1:])
    blocks[-1].set_modules_to_backward_prefetch(blocks[:-1][::-1])
    blocks[1].set_all_reduce_hook(lambda gradient: gradient.mul_(2.0))
    blocks[2].norm1.weight.requires_grad_(False)
    optimizer = mics.optim.AdamW(model.parameters(), lr=1e-2)
    numbers = []
    for step in range(3):
        value = script.loss(model, step)
        with sdpa_kernel(SDPBackend.MATH):
            value.backward()
        numbers += [value.detach(), mics.clip_grad_norm_(model.parameters(), 0.5)]
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        blocks[step].unshard()
        numbers.append(blocks[step].up.weight.detach().sum())
        blocks[step].reshard()
        model.release_memory()
    return values(model, numbers)


def _recovers(script: Script) -> Result:
    """An exception in a forward, then a reset."""
    model = script.make()
    handle = model.blocks[1].register_forward_hook(_raise)
    try:
        script.loss(model)
    except ValueError:
        model.reset()
    handle.remove()
    return values(model, script.train(model, mics.optim.AdamW(model.parameters())))


def _raise(*_: Any) -> None:
    raise ValueError("as a script may")


def _reports(script: Script) -> Result:
    model = script.make()
    watch = mics.report_after(model, STEPS)
    numbers = script.train(model, mics.optim.AdamW(model.parameters()))
    texts = [
        str(watch.report),
        mics.describe(model),
        str(mics.memory(model)),
        str(mics.traffic(model)),
    ]
    assert all(texts)
    assert mics.exposed(model).keys() == {unit.name for unit in model._context().units}
    return values(model, numbers)


def _collectives(script: Script) -> Result:
    group = GroupCollectives(script.mesh)
    piece = torch.arange(5.0, device=script.device) + script.rank
    full = piece.new_empty(5 * group.size)
    group.all_gather(full, piece)
    group.reduce_scatter(piece, full * 2)
    return {"full": full.cpu(), "piece": piece.cpu()}


ADAM, SGD = torch.optim.AdamW, torch.optim.SGD
SCRIPTS: dict[str, Callable[[Script], Result]] = {
    "accumulation": _trains,
    "local accumulation": lambda s: _trains(s, accumulate="local"),
    "blocks": _keeps_blocks,
    "kept full": lambda s: _trains(s, keep_between_microsteps="full"),
    "bf16": lambda s: _trains(s, mp_policy=BF16),
    "adam, foreach": lambda s: _with_torch(s, ADAM, foreach=True),
    "adam, fused": lambda s: _with_torch(s, ADAM, fused=True),
    "adam, one by one": lambda s: _with_torch(s, ADAM, foreach=False),
    "momentum": lambda s: _with_torch(s, SGD, foreach=True, momentum=0.9),
    "recomputation": _recomputes,
    "scaler": _scales,
    "average": _averages,
    "checkpoint": _saves,
    "full states": _full_states,
    "materialize": _materializes,
    "habits": _keeps,
    "recovery": _recovers,
    "reports": _reports,
    "collectives": _collectives,
}
