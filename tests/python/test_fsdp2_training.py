"""Losses, gradients, norms and precision are those of FSDP2."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed.fsdp as fsdp
from support.fsdp2 import (
    DIMS,
    assert_close,
    each_rank,
    gradients,
    mesh_of,
    on_ranks,
    ours,
    shard_with,
    theirs,
    train,
    twins,
)
from support.models import batch, loss, make_gpt
from support.values import full_values
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

import torch_mics as mics


def _train_both(rank: int, dims: int, options: dict[str, Any]) -> tuple[list[float], list[float]]:
    found = []
    for model in twins(dims, tied=True, **options):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        found.append(train(rank, model, optimizer, 0.7))
    return found[0], found[1]


@pytest.mark.parametrize("reshard_after_forward", [None, True, False])
@pytest.mark.parametrize("dims", DIMS)
def test_losses_with_two_micro_steps_equal_those_of_fsdp2(
    dims: int, reshard_after_forward: bool | None
):
    for found, right in on_ranks(
        _train_both, dims, {"reshard_after_forward": reshard_after_forward}
    ):
        assert len(set(right)) == 6
        assert found == pytest.approx(right, rel=1e-6)


@pytest.mark.parametrize(
    "method",
    [
        "set_requires_gradient_sync",
        "set_requires_all_reduce",
        "set_is_last_backward",
        "every backward",
    ],
)
@pytest.mark.parametrize("dims", DIMS)
@each_rank
def test_accumulated_gradients_equal_those_of_fsdp2(rank: int, dims: int, method: str) -> None:
    gradient: list[Any] = []
    for model in twins(dims):
        for micro_step in range(3):
            is_last = micro_step == 2
            if method == "set_requires_gradient_sync":
                model.set_requires_gradient_sync(is_last)
            elif method == "set_requires_all_reduce":
                model.set_requires_all_reduce(is_last)
            elif method == "set_is_last_backward":
                # Several backwards of one forward step, as pipeline schedules have them.
                model.set_is_last_backward(is_last)
                model.set_requires_gradient_sync(is_last)
            elif method == "every backward":
                pass
            loss(model, batch(0, micro_step, rank)).backward()
            if not is_last and isinstance(model, mics.MiCSModule) and method != "every backward":
                assert all(p.grad is None for p in model.parameters())
        gradient.append(gradients(model))
    assert_close(gradient[0], gradient[1], rtol=1e-5, atol=1e-6)


@each_rank
def test_no_sync_defers_the_all_reduce_and_hides_gradients_until_the_boundary(rank: int) -> None:
    model, right = twins(2)

    def replicate_calls() -> int:
        return mics.traffic(model)["replicate"]["calls"]

    with model.no_sync():
        loss(model, batch(0, 0, rank)).backward()
        assert all(p.grad is None for p in model.parameters())
        assert replicate_calls() == 0
    with pytest.raises(ArithmeticError), model.no_sync():
        raise ArithmeticError("the user's own")
    loss(model, batch(0, 1, rank)).backward()
    assert replicate_calls() > 0
    right.set_requires_gradient_sync(False)
    loss(right, batch(0, 0, rank)).backward()
    right.set_requires_gradient_sync(True)
    loss(right, batch(0, 1, rank)).backward()
    assert_close(gradients(model), gradients(right), rtol=1e-5, atol=1e-6)
    # Backwards of its own are boundaries again.
    model.zero_grad()
    loss(model, batch(1, 0, rank)).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("dims", DIMS)
@each_rank
def test_gradient_divide_factor_means_what_it_means_in_fsdp2(rank: int, dims: int) -> None:
    found = []
    for model in twins(dims):
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(3.0)
                # Gloo has no sum with a factor.
                module.set_force_sum_reduction_for_comms(True)
        loss(model, batch(0, 0, rank)).backward()
        found.append(gradients(model))
    assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)
    # Nor is it the default, which divides by the world size.
    right = ours(dims)
    loss(right, batch(0, 0, rank)).backward()
    assert_close({k: v * 3 / 4 for k, v in found[0].items()}, gradients(right), atol=1e-6)


def _clip(rank: int, dims: int, norm_type: float) -> list[float]:
    models = [ours(dims), ours(dims)]
    for model in models:
        # Of uneven size, and None on some parameters.
        model.positions.weight.requires_grad_(False)
        (loss(model, batch(0, 0, rank)) * 30).backward()
    full = [g for g in gradients(models[0]).values() if g is not None]
    # fp64 is the reference; both sum in fp32.
    right = torch.linalg.vector_norm(torch.cat([g.flatten().double() for g in full]), norm_type)
    norm = mics.clip_grad_norm_(models[0].parameters(), 1.5, norm_type)
    assert type(norm) is torch.Tensor
    assert norm.item() == pytest.approx(right.item(), rel=1e-5)
    clipped = gradients(models[0])
    factor = 1.5 / (right.item() + 1e-6)
    for value, before in zip([g for g in clipped.values() if g is not None], full, strict=True):
        torch.testing.assert_close(value, before * factor, rtol=1e-5, atol=1e-8)
    if norm_type != float("inf"):
        # torch has no inf norm of a DTensor with an empty shard.
        theirs_norm = torch.nn.utils.clip_grad_norm_(models[1].parameters(), 1.5, norm_type)
        assert isinstance(theirs_norm, DTensor)
        assert theirs_norm.full_tensor().item() == pytest.approx(norm.item(), rel=1e-6)
        assert_close(clipped, gradients(models[1]), rtol=1e-6, atol=1e-9)
    return [norm.item(), right.item()]


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, float("inf")])
@pytest.mark.parametrize("dims", DIMS)
def test_clip_grad_norm_equals_that_of_torch_and_of_all_gradients_together(
    dims: int, norm_type: float
):
    norms = on_ranks(_clip, dims, norm_type)
    assert all(norm == norms[0] for norm in norms)
    assert norms[0][1] > 1.5


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        ("AdamW", {"lr": 1e-2, "foreach": False}),
        ("AdamW", {"lr": 1e-2, "foreach": True}),
        ("AdamW", {"lr": 1e-2, "fused": True}),
        ("Adam", {"lr": 1e-2, "fused": True, "amsgrad": True}),
        ("SGD", {"lr": 1e-2, "momentum": 0.9, "foreach": True}),
        ("SGD", {"lr": 1e-2, "momentum": 0.9, "foreach": False, "nesterov": True}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value)),
)
@pytest.mark.parametrize("dims", DIMS)
@each_rank
def test_optimizer_of_torch_gives_what_it_gives_on_plain_tensors(
    rank: int, dims: int, cls: str, options: dict[str, Any]
) -> None:
    model, plain = ours(dims), make_gpt()
    optimizer = getattr(torch.optim, cls)(model.parameters(), **options)
    plain_options = {**options, "foreach": False, "fused": False}
    right = getattr(torch.optim, cls)(plain.parameters(), **plain_options)
    for step in range(3):
        loss(model, batch(step, 0, rank)).backward()
        # The same gradients for both, so that only the optimizer is compared.
        for twin, gradient in zip(plain.parameters(), gradients(model).values(), strict=True):
            twin.grad = gradient
        optimizer.step()
        right.step()
        optimizer.zero_grad()
    assert_close(full_values(model), full_values(plain), rtol=1e-5, atol=1e-6)
    assert not torch.equal(plain.head.weight, make_gpt().head.weight)
    # Forward uses what the optimizer wrote.
    data = batch(9, 0, rank)
    plain.load_state_dict(full_values(model))
    assert loss(model, data).item() == pytest.approx(loss(plain, data).item(), rel=1e-6)


@pytest.mark.parametrize(
    "policy",
    [
        MixedPrecisionPolicy(param_dtype=torch.bfloat16),
        MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
        MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32),
    ],
    ids=["param", "param-reduce", "param-output"],
)
@pytest.mark.parametrize("dims", DIMS)
@each_rank
def test_mixed_precision_has_the_dtypes_and_values_of_fsdp2(
    rank: int, dims: int, policy: MixedPrecisionPolicy
) -> None:
    mesh = mesh_of(dims)
    mine, right = make_gpt(), make_gpt()
    if policy.output_dtype is None:
        shard_with(mics.fully_shard, mine, mesh=mesh, mp_policy=policy)
        theirs(mesh, right, mp_policy=policy)
    else:
        # The output of a block is the input of bf16 kernels.
        mics.fully_shard(mine, mesh=mesh, mp_policy=policy)
        fsdp.fully_shard(right, mesh=mesh, mp_policy=policy)
    outputs, found = [], []
    for model in (mine, right):
        outputs.append(model(batch(0, 0, rank)[0]))
        loss(model, batch(0, 0, rank)).backward()
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())
        found.append(gradients(model))
    assert outputs[0].dtype == outputs[1].dtype
    # Forward is the same kernels on the same bf16 values; gradients are summed in another order.
    assert torch.equal(outputs[0], outputs[1])
    for name, value in found[1].items():
        scale = value.abs().max().item()
        torch.testing.assert_close(found[0][name], value, rtol=2**-6, atol=2**-6 * scale)
