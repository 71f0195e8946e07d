"""Workloads of modules: what each unit computes and keeps, without running it on real memory."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from torch_mics import _C
from torch_mics._find_units import Units, find_units

_WIRE_NBYTES = 2  # activations are kept in 16 bits


@dataclasses.dataclass
class _Unit:
    name: str
    modules: list[nn.Module]
    parameters: list[nn.Parameter]
    flops: float = 0
    saved_nbytes: float = 0
    input_nbytes: float = 0


def module_workload(
    model: nn.Module,
    *,
    units: Units = "auto",
    sample: tuple[Any, ...] | None = None,
    tokens_per_sample: int | None = None,
) -> _C.Workload:
    """Gives the workload of a model, on the meta device or any other; the model is not changed.

    With `sample`, the arguments of one forward of a batch of one, FLOP and saved tensors are counted in a
    forward on the meta device. Without, each matrix of a unit counts 2 FLOP per element and token, and
    keeps its input and output; other computation, such as attention scores, is not counted.

    Args:
        model: the model, not sharded.
        units: as shard_model().
        sample: arguments of forward; tensors may be on any device.
        tokens_per_sample: positions of one sample; taken from the first tensor of `sample` if not given.

    Raises:
        ValueError: neither `sample` nor `tokens_per_sample` is given, or the model has no parameters.
    """
    if sample is None and tokens_per_sample is None:
        raise ValueError(
            "a workload needs a sample or a number of tokens: got neither. Pass sample=(inputs,) of a "
            "batch of one, or tokens_per_sample."
        )
    found = _find(model, units)
    if not any(unit.parameters for unit in found):
        raise ValueError(f"a workload must have parameters: got none in {type(model).__name__}.")
    if sample is None:
        assert tokens_per_sample is not None
        for unit in found:
            _count_by_rule(unit, tokens_per_sample)
    else:
        tensors = [value for value in sample if isinstance(value, torch.Tensor)]
        if tokens_per_sample is None:
            tokens_per_sample = max((t.shape[1] if t.dim() > 1 else 1 for t in tensors), default=1)
        found = _count_by_running(model, units, sample)
    return _C.Workload(
        units=_merged(found), tokens_per_sample=tokens_per_sample, width=_width(found)
    )


def tflops(workload: _C.Workload, settings: _C.StepSettings, seconds: float) -> float:
    """TFLOP/s of one rank; recomputation counts, as in the papers."""
    samples = settings.micro_batch * settings.num_microsteps
    return workload.flops(recompute=settings.recompute) * samples / seconds / 1e12


def _find(model: nn.Module, units: Units) -> list[_Unit]:
    """Units in the order of their modules; the root has what no unit below it has."""
    names = {id(module): name for name, module in model.named_modules()}
    order = {id(module): position for position, module in enumerate(model.modules())}
    taken: set[int] = set()
    found = []
    for modules in find_units(model, units):
        parameters = {id(p): p for module in modules for p in module.parameters()}
        mine = [p for key, p in parameters.items() if key not in taken]
        taken |= set(parameters)
        found.append(_Unit(names[id(modules[0])], modules, mine))
    found.sort(key=lambda unit: order[id(unit.modules[0])])
    rest = [p for p in model.parameters() if id(p) not in taken]
    return [_Unit("root", [model], rest), *found]


def _matrices(unit: _Unit) -> Iterator[tuple[int, int]]:
    """Rows and columns of what a token is multiplied with. An embedding is looked up."""
    looked_up = {
        id(child.weight)
        for module in unit.modules
        for child in module.modules()
        if isinstance(child, nn.Embedding)
    }
    for parameter in unit.parameters:
        if parameter.dim() >= 2 and id(parameter) not in looked_up:
            yield parameter.shape[0], parameter[0].numel()


def _count_by_rule(unit: _Unit, tokens: int) -> None:
    matrices = list(_matrices(unit))
    unit.flops = sum(2.0 * rows * columns * tokens for rows, columns in matrices)
    unit.saved_nbytes = sum(float(_WIRE_NBYTES * (r + c) * tokens) for r, c in matrices)
    unit.input_nbytes = float(_WIRE_NBYTES * matrices[0][1] * tokens) if matrices else 0.0


def _count_by_running(model: nn.Module, units: Units, sample: tuple[Any, ...]) -> list[_Unit]:
    """Runs one forward of a copy on the meta device and counts, unit by unit."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        shell = nn.Parameter(
            torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad
        )
        memo[id(parameter)] = shell
    twin = copy.deepcopy(model, memo).to("meta")
    found = _find(twin, units)
    inputs = [v.to("meta") if isinstance(v, torch.Tensor) else v for v in sample]
    counter = FlopCounterMode(display=False)
    parameters = {p.untyped_storage()._cdata for p in twin.parameters()}
    with _watch(found, parameters) as current, counter, torch.enable_grad():
        current.append(found[0])
        twin(*inputs)
    counts = counter.get_flop_counts()
    by_name = {name: float(sum(ops.values())) for name, ops in counts.items() if name != "Global"}
    root = type(twin).__name__
    names = {id(module): name for name, module in twin.named_modules()}
    for unit in found[1:]:
        keys = [f"{root}.{names[id(module)]}" for module in unit.modules]
        unit.flops = sum(by_name.get(key, 0.0) for key in keys)
    found[0].flops = sum(map(float, counts["Global"].values())) - sum(u.flops for u in found[1:])
    return found


@contextmanager
def _watch(found: list[_Unit], parameters: set[int]) -> Iterator[list[_Unit]]:
    """Adds saved tensors and inputs to the unit whose forward runs: the last one of the list given."""
    current: list[_Unit] = []
    seen: set[tuple[int, int]] = set()

    def nbytes(tensor: torch.Tensor) -> float:
        itemsize = min(tensor.itemsize, _WIRE_NBYTES) if tensor.is_floating_point() else 1
        return float(tensor.numel() * max(itemsize, 1))

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()._cdata
        key = (id(current[-1]), storage)
        if storage not in parameters and key not in seen:
            seen.add(key)
            current[-1].saved_nbytes += nbytes(tensor)
        return tensor

    def enter(unit: _Unit) -> Any:
        def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            current.append(unit)
            if module is unit.modules[0]:
                tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
                unit.input_nbytes += sum(map(nbytes, tensors))

        return hook

    def leave(module: nn.Module, arguments: object, output: object) -> None:
        current.pop()

    handles = [
        handle
        for unit in found[1:]
        for module in unit.modules
        for handle in (
            module.register_forward_pre_hook(enter(unit)),
            module.register_forward_hook(leave, always_call=True),
        )
    ]
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield current
    finally:
        for handle in handles:
            handle.remove()


def _merged(found: list[_Unit]) -> list[_C.UnitWork]:
    """Joins equal units that follow each other."""
    work: list[_C.UnitWork] = []
    for unit in found:
        numel = sum(p.numel() for p in unit.parameters)
        amounts = (numel, unit.flops, unit.saved_nbytes, unit.input_nbytes)
        if not any(amounts):
            continue
        if work:
            last = work[-1]
            if amounts == (last.numel, last.forward_flops, last.saved_nbytes, last.input_nbytes):
                last.num_units += 1
                continue
        work.append(
            _C.UnitWork(
                name=unit.name,
                numel=numel,
                forward_flops=unit.flops,
                saved_nbytes=unit.saved_nbytes,
                input_nbytes=min(unit.input_nbytes, unit.saved_nbytes),
                # Only units in a row are checkpointed, not embeddings, heads and the root.
                can_recompute=False,
            )
        )
    largest = max(work, key=lambda unit: unit.num_units)
    for row in work:
        row.can_recompute = row.num_units > 1 or largest.num_units == 1
    return work


def _width(found: list[_Unit]) -> int:
    """The commonest number of columns of large matrices: the hidden size."""
    weights: dict[int, int] = {}
    for unit in found:
        for rows, columns in _matrices(unit):
            weights[columns] = weights.get(columns, 0) + rows * columns
    return max(weights, key=lambda columns: weights[columns], default=0)
