"""Checkpoints of model, optimizer and more, through torch.distributed.checkpoint.

A checkpoint can be loaded at another world size, partition size and node count, bit for bit.
"""

from __future__ import annotations

import os
import pathlib
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.stateful import Stateful

from torch_mics._context import units_of
from torch_mics._full_state import describe_misfit, full_state_dict
from torch_mics._training import check_sharded

__all__ = ["TrainState", "export_safetensors"]

_KEY = "train"


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
        check_sharded(model, "TrainState")
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
        """Sharded, without communication."""
        model_state, optimizer_state = get_state_dict(self.model, self._optimizers())
        extras = {name: extra.state_dict() for name, extra in self.extras.items()}
        return {"model": model_state, "optimizer": optimizer_state, "extras": extras}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes what state_dict() gave, at any sharding. Full parameters kept so far are freed."""
        set_state_dict(
            self.model,
            self._optimizers(),
            model_state_dict=state_dict["model"],
            optim_state_dict=state_dict["optimizer"],
        )
        for name, extra in self.extras.items():
            extra.load_state_dict(state_dict["extras"][name])
        for unit in units_of(self.model):
            if unit.context is not None:
                unit.context.engine.reshard(unit.index)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a checkpoint directory. Of equal shards only the first replica's is written."""
        planner = dcp.DefaultSavePlanner(dedup_save_to_lowest_rank=True)
        dcp.save({_KEY: self}, checkpoint_id=path, planner=planner)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Reads a checkpoint directory.

        Raises:
            FileNotFoundError: there is no checkpoint, or it was not finished.
            ValueError: it is a checkpoint of another model. On every rank; nothing has been changed.
        """
        if not (pathlib.Path(path) / ".metadata").exists():
            raise FileNotFoundError(
                f"a checkpoint directory has a .metadata file: got none in {path}. The save was not "
                "finished, or the path is wrong."
            )
        self._check_model(path)
        dcp.load({_KEY: self}, checkpoint_id=path)

    def _check_model(self, path: str | os.PathLike[str]) -> None:
        metadata = dcp.FileSystemReader(path).read_metadata()
        prefix = f"{_KEY}.model."
        saved = {
            name.removeprefix(prefix): tuple(entry.size)
            for name, entry in metadata.state_dict_metadata.items()
            if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
        }
        mine = {
            name: tuple(value.shape)
            for name, value in self.model.state_dict().items()
            if isinstance(value, torch.Tensor)
        }
        problem = describe_misfit(mine, saved)
        if problem is not None:
            raise ValueError(f"the checkpoint must be of this model: {problem} (in {path}).")


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
    state = full_state_dict(model)
    if dist.get_rank() == 0:
        tensors = {name: value.contiguous() for name, value in state.items()}
        save_file(tensors, path, metadata=metadata)
    if dist.get_world_size() > 1:
        dist.barrier()
