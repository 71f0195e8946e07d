"""What the probe runs: a mode is a contestant and the settings of its run, "ours+p2+bf16"."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import torch_mics as mics

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks" / "train_bench"))

from models import Shape, Transformer, batch

__all__ = ["Mode", "batch", "make_model", "make_optimizer"]

SMALL = Shape(layers=4, width=256, heads=4, vocabulary=2048, length=128, rows=2)
TINY = Shape(layers=3, width=32, heads=2, vocabulary=64, length=16, rows=2)  # on CPUs
LARGE = Shape(layers=8, width=1024, heads=16, vocabulary=8192, length=512, rows=4)

SETTINGS = {
    "bf16": "parameters and activations in bf16, sums in fp32",
    "fp16": "the same in fp16, with a scaler",
    "bf16model": "a model that is bf16 itself",
    "ac": "activations are computed again",
    "compile": "blocks are compiled",
    "meta": "built on the meta device",
    "flat": "gathers in one hop",
    "resident": "node blocks are kept between micro-steps, hop 2 of reductions once per step",
    "keep": "full parameters are kept from forward to backward",
    "keepfull": "full parameters are kept between micro-steps",
    "torchopt": "AdamW of torch",
    "foreach": "its foreach form",
    "fused": "its fused form",
    "between": "gradients are zeroed between forward and backward",
    "keepgrad": "gradients are zeroed, not dropped",
    "prefetch": "lists of three units to prefetch",
    "late": "the device sleeps inside a block and before the optimizer",
    "sync": "host synchronisations of steps are counted",
    "boom": "an exception in a forward, then a reset",
    "eval": "an evaluation after every step",
    "killed": "the last rank kills itself in the second step",
    "large": "a larger model",
    "trace": "a profiler trace of one step more",
}


@dataclasses.dataclass(frozen=True)
class Mode:
    """One run."""

    name: str
    contestant: str
    settings: frozenset[str]
    shard_size: int

    @staticmethod
    def parse(text: str, world_size: int) -> Mode:
        """Reads "ours+p2+bf16"; pN is the partition size, by default the world.

        Raises:
            ValueError: a setting is not known.
        """
        contestant, *rest = text.split("+")
        sizes = [int(word[1:]) for word in rest if word[0] == "p" and word[1:].isdigit()]
        settings = [word for word in rest if not (word[0] == "p" and word[1:].isdigit())]
        unknown = sorted(set(settings) - set(SETTINGS))
        if contestant not in ("ours", "fsdp2") or unknown:
            raise ValueError(f"a mode is ours or fsdp2 and settings: got {text!r} ({unknown}).")
        return Mode(text, contestant, frozenset(settings), sizes[0] if sizes else world_size)

    def __contains__(self, setting: str) -> bool:
        return setting in self.settings

    @property
    def is_ours(self) -> bool:
        """Whether it is this library's run."""
        return self.contestant == "ours"

    def shape(self, device: str) -> Shape:
        """The model."""
        shape = TINY if device == "cpu" else LARGE if "large" in self else SMALL
        return dataclasses.replace(shape, recompute="ac" in self)


def make_model(mode: Mode, device: str, world_size: int) -> nn.Module:
    """Builds and shards the model."""
    torch.manual_seed(0)
    with torch.device(device), _construction(mode):
        model = Transformer(mode.shape(device))
    blocks: Any = model.blocks
    if "compile" in mode:
        for block in blocks:
            block.compile()
    if "bf16model" in mode:
        model.to(torch.bfloat16)
    if "late" in mode and device == "cuda":
        blocks[1].register_forward_pre_hook(lambda *_: torch.cuda._sleep(20_000_000))
    options: dict[str, Any] = {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        if name in mode:
            policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
            options["mp_policy"] = policy
    if mode.is_ours:
        options |= _options(mode, world_size)
        mesh = mics.init_mesh(mode.shard_size, device_type=device)
        mics.shard_model(model, units=list(blocks), mesh=mesh, **options)
        if "meta" in mode:
            mics.materialize(model)
    else:
        _shard_by_fsdp2(model, mode, device, world_size, options)
    if "prefetch" in mode:
        for i, block in enumerate(blocks):
            block.set_modules_to_forward_prefetch(list(blocks[i + 1 : i + 4]))
            block.set_modules_to_backward_prefetch(list(blocks[max(0, i - 3) : i])[::-1])
    return model


def _construction(mode: Mode) -> Any:
    return mics.meta_device() if "meta" in mode else torch.no_grad()


def _options(mode: Mode, world_size: int) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if "flat" in mode:
        options["hierarchical_gather"] = False
    if "keep" in mode:
        options["reshard_after_forward"] = False
    if "keepfull" in mode:
        options["keep_between_microsteps"] = "full"
    if "resident" in mode and mode.shard_size == world_size > 2:
        options |= {"keep_between_microsteps": "block", "accumulate": "block"}
    return options


def _shard_by_fsdp2(
    model: nn.Module, mode: Mode, device: str, world_size: int, options: dict[str, Any]
) -> None:
    size = mode.shard_size
    shape, names = (world_size // size, size), ("replicate", "shard")
    mesh = (
        init_device_mesh(device, (size,))
        if size == world_size
        else init_device_mesh(device, shape, mesh_dim_names=names)
    )
    for block in model.blocks:  # type: ignore[union-attr]
        fully_shard(block, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)


def make_optimizer(mode: Mode, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW: the library's, or torch's in the form that the mode asks for."""
    if mode.is_ours and "torchopt" not in mode:
        return mics.optim.AdamW(model.parameters(), lr=1e-3)
    forms: dict[str, Any] = {form: True for form in ("foreach", "fused") if form in mode}
    return torch.optim.AdamW(model.parameters(), lr=1e-3, **forms)
