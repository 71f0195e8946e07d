"""Options that several commands share: the model, the cluster, and what is searched."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torch_mics import _C
from torch_mics.planner._calibration import shipped_instances
from torch_mics.planner._models import published_model, published_shapes
from torch_mics.planner._plan import Plan, plan
from torch_mics.planner._workload import module_workload


def add_model(command: argparse.ArgumentParser) -> Any:
    """Adds the model; gives the group of its options, of which one must be there."""
    model = command.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", help=f"a published one: {', '.join(published_shapes())}")
    model.add_argument(
        "--gpt", metavar="SHAPE", help="LAYERSxHIDDEN[xHEADS], as 96x12288x96: MLP of 4, tied head"
    )
    model.add_argument("--bert", metavar="SHAPE", help="as --gpt, with BERT's vocabulary")
    model.add_argument(
        "--module", metavar="PACKAGE:CALLABLE", help="makes the module; called on the meta device"
    )
    command.add_argument("--sequence", type=int, default=0, help="tokens of a sample")
    command.add_argument("--vocabulary", type=int, default=0)
    command.add_argument(
        "--fused-attention", action="store_true", help="attention does not keep its scores"
    )
    return model


def workload_of(options: argparse.Namespace) -> _C.Workload:
    """Makes the workload that the options describe."""
    if options.model is not None:
        if options.sequence or options.vocabulary:
            raise ValueError(
                "a published model has its own sequence and vocabulary: got --sequence or --vocabulary. "
                "Use --gpt or --bert."
            )
        return published_model(options.model)
    if options.module is not None:
        return module_workload(
            _make_module(options.module), tokens_per_sample=options.sequence or 2048
        )
    is_gpt = options.gpt is not None
    text = options.gpt if is_gpt else options.bert
    parts = text.split("x")
    if len(parts) not in (2, 3) or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"a shape must be LAYERSxHIDDEN or LAYERSxHIDDENxHEADS: got {text!r}.")
    sizes = [int(part) for part in parts]
    shape = _C.TransformerShape(
        layers=sizes[0],
        hidden=sizes[1],
        heads=sizes[2] if len(sizes) == 3 else max(1, sizes[1] // 128),
        vocabulary=options.vocabulary or (50257 if is_gpt else 32008),
        sequence=options.sequence or (2048 if is_gpt else 512),
        has_fused_attention=options.fused_attention,
    )
    return _C.transformer_workload(shape)


def _make_module(text: str) -> nn.Module:
    package, colon, name = text.partition(":")
    if not colon:
        raise ValueError(f"a module must be given as PACKAGE:CALLABLE: got {text!r}.")
    sys.path.insert(0, str(Path.cwd()))  # as `python script.py` would
    make: Any = importlib.import_module(package)
    for part in name.split("."):
        make = getattr(make, part)
    with torch.device("meta"):
        module = make()
    if not isinstance(module, nn.Module):
        raise ValueError(f"PACKAGE:CALLABLE must return a module: got {type(module).__name__}.")
    return module


def add_search(command: argparse.ArgumentParser, *, required: bool) -> None:
    """Adds the cluster, the batch and what to try. `required`: the cluster and the batch must be given."""
    command.add_argument(
        "--instance", required=required, help=f"{', '.join(shipped_instances())}, or a .json file"
    )
    command.add_argument("--gpus", type=int, required=required)
    command.add_argument("--global-batch", type=int, required=required, help="samples per step")
    command.add_argument("--shard-size", type=int, nargs="+", help="partition sizes to try")
    command.add_argument("--micro-batch", type=int, nargs="+", help="samples per rank to try")
    command.add_argument(
        "--hierarchical", action=argparse.BooleanOptionalAction, help="try only this variant"
    )
    command.add_argument("--recompute", action=argparse.BooleanOptionalAction, help="try only this")
    command.add_argument(
        "--shards-only", action="store_true", help="keep nothing but shards between uses"
    )


def plan_of(options: argparse.Namespace) -> Plan:
    """Plans what the options describe."""
    return plan(
        workload_of(options),
        instance=options.instance,
        world_size=options.gpus,
        global_batch=options.global_batch,
        shard_sizes=options.shard_size,
        micro_batches=options.micro_batch,
        hierarchical_gather=options.hierarchical,
        recompute=options.recompute,
        vary_residency=not options.shards_only,
    )
