"""Tensors that are the same at every layout, and their comparison bit for bit."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.distributed.tensor import DTensor


def local(value: torch.Tensor) -> torch.Tensor:
    """A copy of this rank's rows."""
    return (value.to_local() if isinstance(value, DTensor) else value).detach().clone()


def whole(value: torch.Tensor) -> torch.Tensor:
    """A copy of the full tensor. Collective."""
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()


def full_values(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict in full. Collective."""
    return {name: whole(value) for name, value in model.state_dict().items()}


def assert_same(found: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> None:
    """The same names in one order, and the same bits under each."""
    assert list(found) == list(right)
    for name, value in right.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), f"{name}: {found[name]} instead of {value}"
