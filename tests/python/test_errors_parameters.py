"""Parameters and states that do not fit are named on every rank, and nothing is changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.errors import (
    WORLD,
    caught,
    expect,
    expect_caught,
    outcomes_of,
    parameters_of,
    refused_on_each_rank,
    sharded_gpt,
)
from support.models import batch, loss, make_gpt
from support.ranks import run_ranks
from torch import nn

import torch_mics as mics

REPLACED = "a sharded parameter must not be replaced"


# --- parameters -----------------------------------------------------------------------------------


class Odd(nn.Module):
    """A Linear with one more parameter."""

    def __init__(self, extra: nn.Parameter | None) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.extra = extra

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


def _make_odd(kind: str) -> Odd:
    if kind == "non-contiguous":
        return Odd(nn.Parameter(torch.ones(4, 3).t()))
    if kind == "sparse":
        return Odd(nn.Parameter(torch.eye(4).to_sparse()))
    if kind == "complex":
        return Odd(nn.Parameter(torch.ones(4, dtype=torch.complex64)))
    if kind == "0-dim":
        return Odd(nn.Parameter(torch.tensor(1.0)))
    assert kind == "mixed dtypes"
    return Odd(nn.Parameter(torch.ones(4, dtype=torch.bfloat16)))


ODD_PARAMETERS = {
    "non-contiguous": ("must be contiguous", "strides=(1, 3)", '"extra"', "Convert it, or ignore"),
    "sparse": ("must be dense", "layout=torch.sparse_coo", '"extra"', "Convert it, or ignore it"),
    "complex": (
        "must be floating point or frozen",
        "dtype=torch.complex64",
        '"extra"',
        "Convert it, or ignore",
    ),
    "0-dim": ("at least one dimension", "a 0-dim tensor", '"extra"', "Make it 1-dim"),
    "mixed dtypes": (
        "must have one dtype",
        'torch.float32 ("linear.',
        'torch.bfloat16 ("extra")',
        "Cast them",
    ),
}


def _shard_odd_parameters(rank: int) -> dict[str, tuple[tuple[str, str], bool]]:
    found = {}
    for kind in ODD_PARAMETERS:
        model = _make_odd(kind)
        before = dict(model.named_parameters())
        error = caught(lambda model=model: mics.fully_shard(model))
        same = all(before[name] is now for name, now in model.named_parameters())
        found[kind] = (error, same and type(model) is Odd)
    return found


@pytest.fixture(scope="module")
def odd_parameters() -> list[dict[str, tuple[tuple[str, str], bool]]]:
    return run_ranks(WORLD, _shard_odd_parameters)


@pytest.mark.parametrize("kind", ODD_PARAMETERS)
def test_parameter_that_cannot_be_cut_is_named_and_nothing_is_changed(
    kind: str, odd_parameters: list[dict[str, tuple[tuple[str, str], bool]]]
):
    expect_caught([found[kind][0] for found in odd_parameters], "ValueError", *ODD_PARAMETERS[kind])
    assert all(found[kind][1] for found in odd_parameters)


def _ignored_odd_parameter_trains(rank: int) -> bool:
    torch.manual_seed(0)
    model = _make_odd("0-dim")
    assert model.extra is not None
    mics.fully_shard(model, ignored_params={model.extra}, shard_size=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    (model(torch.ones(2, 4)).sum() + model.extra).backward()
    optimizer.step()
    return model.extra.item() == pytest.approx(0.9)


def test_ignored_parameter_may_be_of_any_kind():
    assert run_ranks(WORLD, _ignored_odd_parameter_trains) == [True] * WORLD


@refused_on_each_rank(
    "ValueError", "a parameter may be in one unit", '"weight"', "fully_shard([a, b])"
)
def test_parameter_tied_over_two_units_is_named(rank: int) -> None:
    model = make_gpt(tied=True, blocks=1)
    mics.fully_shard(model.tokens)
    mics.fully_shard(model.head)


def _leave_a_parameter_out(rank: int, when: str) -> None:
    model = make_gpt(blocks=2)
    mesh = mics.init_mesh(2)
    for block in model.blocks:
        mics.fully_shard(block, mesh=mesh)
    if when == "added later":
        mics.fully_shard(model, mesh=mesh)
        model.extra = nn.Parameter(torch.ones(5))
    optimizer = torch.optim.AdamW(model.parameters())
    loss(model, batch(0, 0, rank)).backward()
    with pytest.warns(UserWarning, match="is in no unit") as caught:
        optimizer.step()
    raise UserWarning(str(caught[0].message))


@pytest.mark.parametrize(
    ("when", "shape"), [("never sharded", "(37, 12)"), ("added later", "(5,)")]
)
def test_trainable_parameter_in_no_unit_is_named_at_the_step(when: str, shape: str):
    expect(
        outcomes_of(_leave_a_parameter_out, when),
        "UserWarning",
        "is in no unit: torch_mics does not average its gradient",
        f"of shape {shape}",
        "fully_shard() on the root module too, or list it in ignored_params",
    )


@pytest.mark.parametrize(
    "when", ["before the first forward", "after a backward", "stepped before too"]
)
@refused_on_each_rank(
    "RuntimeError",
    "an optimizer must be made after sharding",
    "weight",
    "Make the optimizer after shard_model() or fully_shard()",
)
def test_optimizer_made_before_sharding_is_refused_at_the_step(rank: int, when: str) -> None:
    if when == "stepped before too":
        # The checks are there from the first sharding in the process on.
        mics.shard_model(make_gpt(blocks=1), shard_size=2)
    model = make_gpt(blocks=2)
    optimizer = torch.optim.AdamW(model.parameters())
    if when == "stepped before too":
        loss(model, batch(0, 0, 0)).backward()
        optimizer.step()
        optimizer.zero_grad()
    mics.shard_model(model, shard_size=2)
    if when != "before the first forward":
        loss(model, batch(0, 0, rank)).backward()
    optimizer.step()


@pytest.mark.parametrize("when", ["before the first forward", "after a step"])
@pytest.mark.parametrize("how", ["plain", "another DTensor", "deleted"])
@refused_on_each_rank(
    "ValueError", REPLACED, '"blocks.1.up.weight"', "copy_() or load_state_dict()"
)
def test_parameter_replaced_after_sharding_is_named_at_the_forward(
    rank: int, when: str, how: str
) -> None:
    model = sharded_gpt()
    if when == "after a step":
        loss(model, batch(0, 0, rank)).backward()
    up = model.blocks[1].up
    if how == "plain":
        up.weight = nn.Parameter(torch.zeros(26, 12))
    elif how == "another DTensor":
        up.weight = nn.Parameter(up.weight.detach().clone())
    else:
        del up.weight
        up.weight = torch.zeros(26, 12)
    loss(model, batch(1, 0, rank)).backward()


# --- states of other models -----------------------------------------------------------------------


def _save_and_load_in_another(rank: int, path: str, difference: str) -> tuple[str, str, bool]:
    model = sharded_gpt()
    mics.checkpoint.TrainState(model, torch.optim.AdamW(model.parameters())).save(path)
    other = make_gpt(blocks=3 if difference == "more" else 1 if difference == "fewer" else 2)
    if difference == "shape":
        other.blocks[1].up = nn.Linear(12, 27)
        other.blocks[1].down = nn.Linear(27, 12)
    torch.manual_seed(5)
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    mics.shard_model(other, shard_size=4)
    before = parameters_of(other)
    state = mics.checkpoint.TrainState(other, torch.optim.AdamW(other.parameters()))
    kind, text = caught(lambda: state.load(path))
    same = all(torch.equal(a, b) for a, b in zip(before, parameters_of(other), strict=True))
    return kind, text, same


@pytest.mark.parametrize(
    ("difference", "parts"),
    [
        ("more", ('got no "blocks.2.', "names are missing")),
        ("fewer", ('got an unknown "blocks.1.', "names are unknown")),
        ("shape", ('got shape [26, 12] for "blocks.1.up.weight", which has [27, 12] here',)),
    ],
)
def test_checkpoint_of_another_model_is_refused_and_nothing_is_changed(
    tmp_path: Path, difference: str, parts: tuple[str, ...]
):
    results = run_ranks(WORLD, _save_and_load_in_another, str(tmp_path), difference)
    expect_caught(
        [(kind, text) for kind, text, _ in results],
        "ValueError",
        "the checkpoint must be of this model",
        *parts,
    )
    assert all(same for _, _, same in results)


def _load_full_state_of_another(rank: int, what: str) -> None:
    model = sharded_gpt()
    state: dict[str, Any] = {}
    if rank == 0:
        state = make_gpt(
            blocks=3 if what == "unknown" else 1 if what == "missing" else 2
        ).state_dict()
        if what == "shape":
            state["blocks.1.up.weight"] = torch.zeros(27, 12)
    mics.load_full_state_dict(model, state)


@pytest.mark.parametrize(
    ("what", "part"),
    [
        ("missing", 'got no "blocks.1.'),
        ("unknown", 'got an unknown "blocks.2.'),
        ("shape", 'got shape [27, 12] for "blocks.1.up.weight", which has [26, 12] here'),
    ],
)
def test_full_state_of_another_model_on_rank_0_is_refused_on_all_ranks(what: str, part: str):
    expect(
        outcomes_of(_load_full_state_of_another, what),
        "ValueError",
        "the state dict must be one of this model",
        part,
    )
