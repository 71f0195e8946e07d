"""AdamW and SGD that step a unit at a time.

They are torch.optim's: the same options, numbers and state dict. The parameters of a unit are stepped by
a few operations on its flat shard instead of a few operations per parameter. A parameter that is in no
unit is stepped by torch's own optimizer.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any

import torch

from torch_mics import _C
from torch_mics._flat_state import FlatState, Group, Run

__all__ = ["SGD", "AdamW"]


class _FlatOptimizer(torch.optim.Optimizer, abc.ABC):
    """What AdamW and SGD have in common; their second base is the class of torch.optim."""

    _torch_class: Callable[[Any], torch.optim.Optimizer]
    _counts_steps: bool

    def _flat_state(self) -> FlatState:
        # Made when needed: unpickling and load_state_dict() bypass the constructor.
        if "_mics_flat" not in self.__dict__:
            self.__dict__["_mics_flat"] = FlatState(
                self._make_handle, counts_steps=self._counts_steps
            )
        return self.__dict__["_mics_flat"]

    @abc.abstractmethod
    def _keys(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Names of the states that have the parameter's shape."""

    @abc.abstractmethod
    def _make_handle(self, run: Run) -> Any:
        """Makes the run's arguments for the C++ core."""

    @abc.abstractmethod
    def _step_group(self, group: dict[str, Any], flat: Group) -> None:
        """Steps the runs of one parameter group."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one step; parameters without a gradient are left alone.

        Args:
            closure: evaluates the model again and returns the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            _check_options(group)
        keys = [self._keys(group) for group in self.param_groups]
        found = self._flat_state().groups(self.param_groups, self.state, keys)
        for group, flat in zip(self.param_groups, found, strict=True):
            if flat.runs:
                self._step_group(group, flat)
        rest = [
            {**group, "params": flat.rest}
            for group, flat in zip(self.param_groups, found, strict=True)
            if flat.rest
        ]
        if rest:
            self._step_rest(rest)
        return loss

    def _step_rest(self, groups: list[dict[str, Any]]) -> None:
        """Lets torch step what is in no unit."""
        if "_mics_rest" not in self.__dict__:
            self.__dict__["_mics_rest"] = self._torch_class(groups[0]["params"])
        rest: torch.optim.Optimizer = self.__dict__["_mics_rest"]
        rest.param_groups, rest.state = groups, self.state
        with torch.device("cpu"):  # where new counters of steps belong
            rest.step()


class AdamW(_FlatOptimizer, torch.optim.AdamW):
    """torch.optim.AdamW, a unit at a time.

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, maximize: as torch.optim.AdamW. A tensor as `lr`
            is read at every step.
        fused: one launch of torch's fused kernel for all units, which reads and writes each state once;
            its values differ in the last bits. None: on CUDA, where operation after operation would move
            the state many times; not on a CPU, where blocks of it stay in the cache.
    """

    _torch_class = torch.optim.AdamW
    _counts_steps = True

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        fused: bool | None = None,
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            amsgrad=amsgrad,
            maximize=maximize,
        )
        # Not by torch's constructor, which would let a gradient scaler leave its work to step().
        for options in (self.defaults, *self.param_groups):
            options["fused"] = fused

    def _keys(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else []))

    def _make_handle(self, run: Run) -> _C.AdamWRun:
        return _C.AdamWRun(
            parameter=run.parameter,
            gradient=run.gradient,
            exp_avg=run.state["exp_avg"],
            exp_avg_sq=run.state["exp_avg_sq"],
            max_exp_avg_sq=run.state.get("max_exp_avg_sq"),
        )

    def _step_group(self, group: dict[str, Any], flat: Group) -> None:
        beta1, beta2 = group["betas"]
        fused = group["fused"]
        if fused is None:
            fused = flat.runs[0].parameter.is_cuda
        _C.adamw_step(
            flat.handles,
            [steps + 1 for steps in flat.steps],
            lr=float(group["lr"]),
            beta1=float(beta1),
            beta2=float(beta2),
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            maximize=group["maximize"],
            fused=fused,
        )


class SGD(_FlatOptimizer, torch.optim.SGD):
    """torch.optim.SGD, a unit at a time.

    Args:
        params, lr, momentum, dampening, weight_decay, nesterov, maximize: as torch.optim.SGD. A tensor
            as `lr` is read at every step.
    """

    _torch_class = torch.optim.SGD
    _counts_steps = False

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
            maximize=maximize,
        )

    def _keys(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] != 0 else ()

    def _make_handle(self, run: Run) -> _C.SgdRun:
        return _C.SgdRun(
            parameter=run.parameter,
            gradient=run.gradient,
            momentum_buffer=run.state.get("momentum_buffer"),
        )

    def _step_group(self, group: dict[str, Any], flat: Group) -> None:
        _C.sgd_step(
            flat.handles,
            [run.is_new for run in flat.runs],
            lr=float(group["lr"]),
            momentum=group["momentum"],
            dampening=group["dampening"],
            weight_decay=group["weight_decay"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
        )


def _check_options(group: dict[str, Any]) -> None:
    for name in ("capturable", "differentiable"):
        if group.get(name):
            raise ValueError(
                f"{name} must be False in torch_mics.optim: got {name}=True. Use the optimizer of "
                "torch.optim for it; the state dict is the same."
            )
