"""adamw_step and sgd_step of the C++ core against torch's optimizers, over plain tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import torch_mics  # noqa: F401  (checks the build before _C is loaded)
from torch_mics import _C

OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("AdamW", {}),
    ("AdamW", {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.0}),
    ("AdamW", {"lr": 0.02, "weight_decay": 0.3, "amsgrad": True, "maximize": True}),
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "weight_decay": 0.1, "maximize": True}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "maximize": True}),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("case", OPTIONS, ids=str)
def test_runs_of_several_blocks(case: tuple[str, dict[str, Any]], dtype: torch.dtype):
    name, options = case
    torch.manual_seed(0)
    numel = 3 * (1 << 15) * torch.get_num_threads() + 5
    plain = nn.Parameter(torch.randn(numel, dtype=dtype))
    values = plain.detach().clone()
    states = [torch.zeros_like(values) for _ in range(3)]
    optimizer = getattr(torch.optim, name)([plain], foreach=False, **options)
    for step in range(1, 4):
        plain.grad = torch.randn(numel, dtype=dtype)
        group = optimizer.param_groups[0]
        optimizer.step()
        if name == "AdamW":
            run = _C.AdamWRun(
                parameter=values,
                gradient=plain.grad,
                exp_avg=states[0],
                exp_avg_sq=states[1],
                max_exp_avg_sq=states[2] if group["amsgrad"] else None,
            )
            _C.adamw_step(
                [run],
                [step],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                **{key: group[key] for key in ("lr", "eps", "weight_decay", "maximize")},
            )
        else:
            buffer = states[0] if group["momentum"] else None
            run = _C.SgdRun(parameter=values, gradient=plain.grad, momentum_buffer=buffer)
            keys = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")
            _C.sgd_step([run], [step == 1], **{key: group[key] for key in keys})
        assert torch.equal(values, plain.detach())


def test_a_run_has_one_length():
    run = _C.SgdRun(parameter=torch.zeros(4), gradient=torch.zeros(3), momentum_buffer=None)
    with pytest.raises(ValueError, match="flat and of one length: got numel=4 and 3"):
        _C.sgd_step(
            [run],
            [True],
            lr=0.1,
            momentum=0.0,
            dampening=0.0,
            weight_decay=0.0,
            nesterov=False,
            maximize=False,
        )
