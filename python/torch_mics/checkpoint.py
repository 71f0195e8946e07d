"""Checkpoints of model, optimizer and more, through torch.distributed.checkpoint.

A checkpoint can be loaded at another world size, partition size and node count, bit for bit.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.tensor import DTensor

from torch_mics._exchange import all_or_none, exchange, together
from torch_mics._full_state import describe_misfit, full_state_dict, shapes_of
from torch_mics._module import sharded_module
from torch_mics._optimizer_checks import ignoring_steps_of
from torch_mics._state_dict_hooks import plain_name
from torch_mics._storage import (
    LoadPlanner,
    Reader,
    SavePlanner,
    Writer,
    check_files,
    check_plain,
    read_metadata,
)
from torch_mics._unit import units_of

__all__ = ["TrainState", "export_safetensors"]

_KEY = "train"
_OPTIMIZER_STATE = f"{_KEY}.optimizer.state."
_EXTRA_STATE = "_extra_state"  # of torch; may be a tree of anything
_HAS_STEPPED = "optimizer has stepped"


class TrainState(Stateful):
    """Everything a run needs to go on: model, optimizer, and extras with state_dict()/load_state_dict().

    save() and load() are collective. It is a Stateful, so it can be part of a larger dcp.save() too.

    Args:
        model: the sharded root module.
        optimizer: made after sharding.
        extras: schedulers, counters: objects with state_dict() and load_state_dict(). What is not a
            tensor must be the same on every rank: rank 0's is written.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, **extras: Any
    ) -> None:
        model = sharded_module(model, "TrainState")
        for name, extra in extras.items():
            if not hasattr(extra, "state_dict") or not hasattr(extra, "load_state_dict"):
                raise TypeError(
                    "an extra must have state_dict() and load_state_dict(): got "
                    f"{name}={type(extra).__name__}."
                )
        self.model = model
        self.optimizer = optimizer
        self.extras = extras

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        return [] if self.optimizer is None else [self.optimizer]

    def state_dict(self) -> dict[str, Any]:
        """Gives the state, sharded; no communication."""
        has_stepped = self.optimizer is not None and bool(self.optimizer.state)
        with _undisturbed(self.optimizer):
            model_state, optimizer_state = get_state_dict(self.model, self._optimizers())
        return {
            "model": model_state,
            "optimizer": optimizer_state,
            "extras": self._state_of_extras(),
            _HAS_STEPPED: has_stepped,
        }

    def _state_of_extras(self) -> dict[str, Any]:
        return {name: extra.state_dict() for name, extra in self.extras.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what state_dict() gave, at any sharding. Full parameters kept so far are freed."""
        with _undisturbed(self.optimizer, keeps_state=True):
            set_state_dict(
                self.model,
                self._optimizers(),
                model_state_dict=state_dict["model"],
                optim_state_dict=state_dict["optimizer"],
            )
        if self.optimizer is not None and not state_dict.get(_HAS_STEPPED, True):
            _drop_state(self.optimizer)
        for name, extra in self.extras.items():
            extra.load_state_dict(state_dict["extras"][name])
        for unit in units_of(self.model):
            unit.reshard()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a checkpoint directory. Of equal shards only the first replica's is written.

        Until all ranks have written, the checkpoint that was there is whole and loads; then the new one
        takes its place in one step. What a save that was ended has left, the next one removes.

        Raises:
            TypeError: an extra holds what cannot be loaded without running code. On every rank; nothing
                has been written.
            RuntimeError: it failed on a rank; raised on all ranks. The former checkpoint is whole.
        """
        with together("TrainState.save"), _plain_errors("TrainState.save", path):
            with all_or_none("TrainState.save"):
                check_plain(self._state_of_extras())
            dcp.save({_KEY: self}, storage_writer=Writer(path), planner=SavePlanner())

    def load(self, path: str | os.PathLike[str]) -> None:
        """Reads a checkpoint directory.

        Raises:
            FileNotFoundError: there is no checkpoint, or it was not finished. On every rank, also if
                only some cannot see it; nothing has been changed.
            ValueError: it is a checkpoint of another model, or a part of its files is missing. On every
                rank; nothing has been changed.
            RuntimeError: it failed on another rank.
        """
        with together("TrainState.load"):
            is_there = (pathlib.Path(path) / ".metadata").exists()
            answers = exchange(
                "the directory in a call of TrainState.load", "found" if is_there else ""
            )
            missing = [rank for rank, answer in enumerate(answers) if not answer]
            if missing:
                raise FileNotFoundError(
                    f"a checkpoint directory has a .metadata file: got none in {path} on world ranks "
                    f"{missing}. The save was not finished, the path is wrong, or the ranks do not share "
                    "the file system."
                )
            with all_or_none("TrainState.load"):
                metadata = read_metadata(path)
                check_files(path, metadata)
            entries = metadata.state_dict_metadata
            self._check_model(path, entries)
        with (
            all_or_none("TrainState.load"),
            _plain_errors("TrainState.load", path),
            self._having_state_of(entries),
        ):
            wanted: Stateful = self
            if f"{_KEY}.{_HAS_STEPPED}" not in entries:
                wanted = _Older(self)
            dcp.load({_KEY: wanted}, storage_reader=Reader(path), planner=LoadPlanner())

    @contextlib.contextmanager
    def _having_state_of(self, entries: dict[str, Any]) -> Iterator[None]:
        """Lets the optimizer have state for exactly the parameters that have state in a checkpoint.

        A parameter has none before its first gradient, but torch expects it of all that require gradients.
        """
        optimizer = self.optimizer
        if optimizer is None:
            yield
            return
        named = set()
        for entry in entries:
            if entry.startswith(_OPTIMIZER_STATE):
                name = entry.removeprefix(_OPTIMIZER_STATE)
                while "." in name:  # what a state holds may be a tree
                    name = name.rpartition(".")[0]
                    named.add(name)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        found = self.model.named_parameters(remove_duplicate=False)
        owners = {id(p) for name, p in found if plain_name(name) in named}
        saved = [id(p) in owners for p in parameters]
        if optimizer.state:
            expected = [bool(optimizer.state.get(p)) for p in parameters]
        else:
            expected = [p.requires_grad for p in parameters]
        if saved == expected:
            yield
            return
        state, trainable = dict(optimizer.state), [p.requires_grad for p in parameters]
        _drop_state(optimizer)
        for p, is_saved in zip(parameters, saved, strict=True):
            p.requires_grad_(is_saved)
        try:
            yield
        except BaseException:
            _drop_state(optimizer)
            optimizer.state.update(state)
            raise
        finally:
            for p, is_trainable in zip(parameters, trainable, strict=True):
                p.requires_grad_(is_trainable)

    def _check_model(self, path: str | os.PathLike[str], entries: dict[str, Any]) -> None:
        prefix = f"{_KEY}.model."
        saved = {
            name.removeprefix(prefix): tuple(entry.size)
            for name, entry in entries.items()
            if name.startswith(prefix)
            and isinstance(entry, TensorStorageMetadata)
            and _EXTRA_STATE not in name
        }
        tensors = {
            name: value
            for name, value in self.model.state_dict().items()
            if isinstance(value, torch.Tensor) and _EXTRA_STATE not in name
        }
        problem = describe_misfit(shapes_of(tensors), dict(saved))
        if problem is not None:
            raise ValueError(f"the checkpoint must be of this model: {problem} (in {path}).")


@contextlib.contextmanager
def _plain_errors(call: str, path: str | os.PathLike[str]) -> Iterator[None]:
    """Raises RuntimeError with rank and cause: torch's CheckpointException is no Exception."""
    try:
        yield
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        raise RuntimeError(
            f"{call} must succeed on every rank: got a failure on world ranks {list(error.failures)} "
            f"for {path}, on {rank}: {type(cause).__name__}: {cause}"
        ) from cause


class _Older(Stateful):
    """A TrainState for older checkpoints, which do not say whether the optimizer has stepped."""

    def __init__(self, present: TrainState) -> None:
        self._present = present

    def state_dict(self) -> dict[str, Any]:
        return {k: v for k, v in self._present.state_dict().items() if k != _HAS_STEPPED}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._present.load_state_dict(state_dict)


@contextlib.contextmanager
def _undisturbed(
    optimizer: torch.optim.Optimizer | None, *, keeps_state: bool = False
) -> Iterator[None]:
    """Lets torch create the state of an optimizer that has none yet, and undoes the side effects.

    torch creates it by a step with zero gradients. Such a step counts, may run hooks, and in some
    optimizers moves weights.

    Args:
        optimizer: any.
        keeps_state: leave the state that torch has created.
    """
    if optimizer is None or optimizer.state:
        yield
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    gradients = [p.grad for p in parameters]
    weights = [
        (p._local_tensor if isinstance(p, DTensor) else p).detach().clone() for p in parameters
    ]
    hooks: tuple[dict[int, Any], ...] = (
        optimizer._optimizer_step_pre_hooks,
        optimizer._optimizer_step_post_hooks,
    )
    kept = [dict(each) for each in hooks]
    for each in hooks:
        each.clear()
    for p in parameters:
        p.grad = None
    # Counters of steps belong on the CPU; torch puts those that do not where the parameters are.
    with ignoring_steps_of(optimizer), torch.device("cpu"), contextlib.ExitStack() as stack:
        if not keeps_state:
            # The values do not change in the end, so a backward after this must not see a new version.
            tensors = [p._local_tensor for p in parameters if isinstance(p, DTensor)]
            stack.enter_context(_unsafe_preserve_version_counter((*parameters, *tensors)))
        try:
            yield
        finally:
            for each, content in zip(hooks, kept, strict=True):
                each.update(content)
            if not keeps_state:
                with torch.no_grad():
                    for p, value in zip(parameters, weights, strict=True):
                        (p._local_tensor if isinstance(p, DTensor) else p).copy_(value)
                _drop_state(optimizer)
            for p, gradient in zip(parameters, gradients, strict=True):
                p.grad = gradient


def _drop_state(optimizer: torch.optim.Optimizer) -> None:
    """Clears the state; tensors of it that others hold stay: torch_mics.optim makes new ones next time."""
    optimizer.state.clear()
    optimizer.__dict__.pop("_mics_flat", None)


def export_safetensors(
    model: nn.Module, path: str | os.PathLike[str], *, metadata: dict[str, str] | None = None
) -> None:
    """Writes the full model to one safetensors file, from rank 0. Collective.

    Args:
        model: the sharded root module.
        path: of the file.
        metadata: strings to store beside the tensors.

    Raises:
        ImportError: safetensors is not installed.
    """
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise ImportError(
            "export_safetensors needs safetensors: `pip install safetensors`."
        ) from error
    model = sharded_module(model, "export_safetensors")
    with together("export_safetensors"):
        state = full_state_dict(model)
        with all_or_none("export_safetensors"):
            if dist.get_rank() == 0:
                # Tied tensors are written under each of their names: the format shares no memory.
                tensors: dict[str, torch.Tensor] = {}
                seen: set[int] = set()
                for name, value in state.items():
                    if isinstance(value, torch.Tensor):
                        tensors[name] = value.clone() if id(value) in seen else value.contiguous()
                        seen.add(id(value))
                save_file(tensors, path, metadata=metadata)
