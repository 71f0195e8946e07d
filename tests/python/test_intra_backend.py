"""Who talks over shared memory: the choice, the reason, the same bits, and peers that fail."""

from __future__ import annotations

import dataclasses
import datetime
import gc
import itertools
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from support.models import TinyGPT, batch, loss, make_gpt
from support.ranks import close_pools, run_outcomes, run_ranks
from torch.distributed.device_mesh import init_device_mesh

import torch_mics as mics
from torch_mics import _C
from torch_mics._groups import BACKENDS, Reach

Bits = dict[str, torch.Tensor]


def _train(
    rank: int, shard_size: int, backend: Any, ranks_per_node: int
) -> tuple[dict[str, str], Bits, dict[str, dict[str, int]]]:
    mesh = mics.init_mesh(
        shard_size, device_type="cpu", gpus_per_node=ranks_per_node, intra_backend=backend
    )
    model: TinyGPT = mics.shard_model(make_gpt(), mesh=mesh, mp_policy="bf16")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(2):
        for micro_step in range(2):
            with mics.microbatch(model, is_last=micro_step == 1):
                loss(model, batch(step, micro_step, rank)).backward()
        optimizer.step()
        optimizer.zero_grad()
    shards = {name: p.to_local().detach().clone() for name, p in model.named_parameters()}
    return mics.backends(model), shards, mics.traffic(model)


def sent(traffic: dict[str, dict[str, int]]) -> dict[str, tuple[int, int]]:
    return {k: (v["sent_intra_nbytes"], v["sent_inter_nbytes"]) for k, v in traffic.items()}


SPANS = "c10d (a group has members on several nodes)"


@pytest.mark.parametrize(
    ("shard_size", "expected"),
    [
        (2, {"gather/intra": "shm", "reduce/intra": "shm", "replicate": SPANS, "control": SPANS}),
        (
            4,
            {
                "gather/rail": SPANS,
                "gather/intra": "shm",
                "reduce/rail": SPANS,
                "reduce/intra": "shm",
                "control": SPANS,
            },
        ),
    ],
)
def test_groups_inside_a_node_use_shared_memory_with_the_same_bits(
    shard_size: int, expected: dict[str, str]
):
    results = {}
    for backend in ("auto", "c10d"):
        results[backend] = run_ranks(4, _train, shard_size, backend, 2)
    for (backends, shards, traffic), (others, right, counted) in zip(
        results["auto"], results["c10d"], strict=True
    ):
        assert backends == expected
        assert set(others.values()) == {'c10d (intra_backend is "c10d")'}
        assert list(shards) == list(right)
        assert all(torch.equal(shards[name], value) for name, value in right.items())
        assert sent(traffic) == sent(counted)


def test_on_one_node_every_group_uses_shared_memory():
    for backends, _, _ in run_ranks(4, _train, 2, "shm", 4):
        assert backends == dict.fromkeys(
            ("gather/intra", "reduce/intra", "replicate", "control"), "shm"
        )
    assert not segments()


def _is_of_another_run(pid: int) -> bool:
    """A process that lives and does not descend from this one: tests run side by side."""
    while pid > 1:
        if pid == os.getpid():
            return False
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except FileNotFoundError:
            return False
    return True


def segments() -> list[str]:
    names = [file.name for file in Path("/dev/shm").glob("torch_mics.*")]
    return [name for name in names if not _is_of_another_run(int(name.split(".")[2]))]


def _choose(rank: int, variable: str, asked: str) -> dict[str, str]:
    with mock.patch.dict(os.environ, {"MICS_INTRA_BACKEND": variable}):
        mesh = mics.init_mesh(2, device_type="cpu", gpus_per_node=2, intra_backend=asked)
        return first_backends(mesh)


def first_backends(mesh: Any) -> dict[str, str]:
    model = make_model(mesh)
    model(torch.ones(1, 4)).sum().backward()
    return mics.backends(model)


def make_model(mesh: Any) -> Any:
    torch.manual_seed(0)
    return mics.shard_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), units=1, mesh=mesh)


def test_the_environment_comes_before_the_argument():
    for backends in run_ranks(2, _choose, "c10d", "shm"):
        assert backends["gather/intra"] == 'c10d (intra_backend is "c10d")'
    for backends in run_ranks(2, _choose, "shm", "c10d"):
        assert backends["gather/intra"] == "shm"


def test_other_names_are_refused():
    for outcome in run_outcomes(2, _choose, "", "nvlink"):
        assert outcome.error_type == "ValueError"
        assert "got 'nvlink' from the argument" in str(outcome.error_text)
    for outcome in run_outcomes(2, _choose, "gloo", "auto"):
        assert "got 'gloo' from MICS_INTRA_BACKEND" in str(outcome.error_text)


def _own_mesh(rank: int) -> dict[str, str]:
    return first_backends(init_device_mesh("cpu", (2,), mesh_dim_names=("dp_shard",)))


def test_a_mesh_that_the_user_made_chooses_by_itself():
    for backends in run_ranks(2, _own_mesh):
        assert backends == {"gather/intra": "shm", "reduce/intra": "shm", "control": "shm"}


def test_a_world_of_one_needs_no_backend():
    for backends in run_ranks(1, _own_world):
        assert set(backends.values()) == {"local (a group of one)"}


def _own_world(rank: int) -> dict[str, str]:
    return first_backends(mics.init_mesh(1, device_type="cpu"))


def test_the_page_of_backends_says_what_they_declare():
    page = (Path(__file__).resolve().parents[2] / "docs/backends.md").read_text()
    table = page.partition("<!-- table: properties -->")[2].partition("\n\n")[0]
    declared = set()
    for backend in {each for choices in BACKENDS.values() for each in choices}:
        cells = dataclasses.astuple(backend.properties)
        words = [{True: "yes", False: "no"}.get(cell, cell) for cell in cells]
        declared.add(f"| {' | '.join([backend.name, *words])} |")
    assert set(table.splitlines()[3:]) == declared


def test_every_kind_of_group_has_a_backend():
    assert set(BACKENDS) == set(itertools.product(("cpu", "cuda"), get_args(Reach)))
    # The last one that is asked refuses nothing.
    assert {choices[-1].name for choices in BACKENDS.values()} == {"local", "c10d", "nccl"}


# --- one segment per group, shared by the models ---------------------------------------------------


def mapped() -> int:
    """How many segments this process has mapped."""
    return len(set(re.findall(r"/dev/shm/torch_mics\S+", Path("/proc/self/maps").read_text())))


def _two_models(rank: int) -> list[Any]:
    mesh = mics.init_mesh(2, device_type="cpu", gpus_per_node=2)
    counts = []
    gc.collect()  # models of other tests
    first, second = make_model(mesh), make_model(mesh)
    for model in (first, second, first):
        model(torch.ones(1, 4)).sum().backward()
        counts.append(mapped())
    calls = [mics.traffic(model)["gather/intra"]["calls"] for model in (first, second)]
    if rank == 0:  # the other keeps it: what one rank alone has open is not used again
        del first, model, second
        gc.collect()
        counts.append(mapped())
    third = make_model(mesh)
    third(torch.ones(1, 4)).sum().backward()
    if rank == 0:
        counts.append(mapped())
    else:
        del first, model, second
    gc.collect()
    counts.append(mapped())
    third(torch.ones(1, 4)).sum().backward()
    del third
    gc.collect()
    return [counts, mapped(), calls]


def test_models_share_a_segment_per_group_and_the_last_one_closes_it():
    roles = 3  # gather/intra, reduce/intra, control
    first, second = run_ranks(2, _two_models)
    assert first == [[roles, roles, roles, 0, roles, roles], 0, [4, 2]]
    assert second == [[roles, roles, roles, roles], 0, [4, 2]]


def _after_a_failure(rank: int) -> dict[str, str]:
    mesh = mics.init_mesh(2, device_type="cpu", gpus_per_node=2)
    failed = make_model(mesh)
    failed(torch.ones(1, 4)).sum().backward()
    (communicators,) = failed._mics_unit.owner.communicators.values()
    with pytest.raises(mics.CommError, match="must issue the same collectives"):
        communicators.gather_intra.all_reduce(torch.ones(rank + 1))
    second = make_model(mesh)
    second(torch.ones(1, 4)).sum().backward()
    return mics.backends(second)


def test_a_group_that_failed_is_not_used_by_later_models():
    for backends in run_ranks(2, _after_a_failure):
        assert backends == {"gather/intra": "shm", "reduce/intra": "shm", "control": "shm"}


def _mixed(rank: int) -> dict[str, str]:
    mesh = mics.init_mesh(4, device_type="cpu", gpus_per_node=2)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    mics.fully_shard(model[0], mesh=mesh, hierarchical_gather=False)
    mics.fully_shard(model, mesh=mesh)
    model(torch.ones(1, 4)).sum().backward()
    return mics.backends(model)


def test_flat_and_hierarchical_units_in_one_model_say_both():
    for backends in run_ranks(4, _mixed):
        assert set(backends["gather/intra"].split("; ")) == {"shm", SPANS}
        assert backends["gather/rail"] == SPANS


# --- falling back together ------------------------------------------------------------------------


def _refused(rank: int, backend: str, refusing: int) -> dict[str, str]:
    """One rank cannot attach to, or make, any segment."""
    made = _C.ShmGroup

    def make(*args: Any, **kwargs: Any) -> _C.ShmGroup:
        if rank == refusing:
            raise mics.CommError("no room in /dev/shm")
        return made(*args, **kwargs)

    with mock.patch.object(_C, "ShmGroup", make):
        mesh = mics.init_mesh(2, device_type="cpu", gpus_per_node=2, intra_backend=backend)
        return first_backends(mesh)


@pytest.mark.parametrize("refusing", [0, 3])
def test_when_one_rank_cannot_attach_all_fall_back(refusing: int):
    reason = f"c10d (world_rank {refusing} could not attach: no room in /dev/shm)"
    for backends in run_ranks(4, _refused, "auto", refusing):
        assert backends["gather/intra"] == backends["reduce/intra"] == reason
        assert backends["replicate"] == SPANS
    assert not segments()


def test_when_one_rank_cannot_attach_and_shm_was_asked_for_all_raise():
    for outcome in run_outcomes(4, _refused, "shm", 3):
        assert outcome.error_type == "ValueError"
        assert 'intra_backend="shm" needs groups that can share memory' in str(outcome.error_text)
        assert "because world_rank 3 could not attach" in str(outcome.error_text)
    assert not segments()


def _other_host(rank: int) -> dict[str, str]:
    with mock.patch.object(_C, "shm_host_identity", return_value=f"host {rank}"):
        return first_backends(mics.init_mesh(2, device_type="cpu", gpus_per_node=2))


def test_ranks_of_one_node_on_several_hosts_use_c10d():
    for backends in run_ranks(4, _other_host):
        assert backends["gather/intra"] == (
            "c10d (world ranks [0, 1] are on one node but not on one host or PID namespace)"
        )


def _flat_over_nodes(rank: int) -> dict[str, str]:
    mesh = mics.init_mesh(4, device_type="cpu", gpus_per_node=2, intra_backend="shm")
    torch.manual_seed(0)
    model = mics.fully_shard(torch.nn.Linear(4, 4), mesh=mesh, hierarchical_gather=False)
    model(torch.ones(1, 4))
    return mics.backends(model)


def test_a_flat_group_over_nodes_cannot_be_on_shared_memory():
    for outcome in run_outcomes(4, _flat_over_nodes):
        assert outcome.error_type == "ValueError"
        assert "because a group has members on several nodes" in str(outcome.error_text)


# --- conformance and failures ---------------------------------------------------------------------


@pytest.fixture
def ranks_that_end() -> Iterator[None]:
    yield
    close_pools()


def _die(rank: int, directory: str) -> None:
    model = mics.shard_model(make_gpt(), shard_size=4)
    loss(model, batch(0, 0, rank)).backward()
    begin = time.monotonic()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(mics.CommError, match=r"world_rank 1 has ended \(pid \d+\)"):
        loss(model, batch(0, 0, rank)).backward()
    written = Path(f"{directory}-{rank}")
    written.write_text(str(time.monotonic() - begin))
    written.rename(Path(directory, str(rank)))
    # When the first rank comes back, the others are ended.
    deadline = time.monotonic() + 600.0
    while len(list(Path(directory).iterdir())) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)


@pytest.mark.usefixtures("ranks_that_end")
def test_a_killed_peer_is_named_at_once(tmp_path: Path):
    with pytest.raises(AssertionError, match="rank 1 did not come back"):
        run_ranks(4, _die, str(tmp_path))
    seconds = [float(file.read_text()) for file in tmp_path.iterdir()]
    assert len(seconds) == 3
    assert max(seconds) < 120.0  # of 30 minutes, Gloo's time-out
    assert not segments()


def _wait_too_long(rank: int, path: str) -> str:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{path}",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=10),
    )
    model = mics.shard_model(make_gpt(), shard_size=2)
    tokens, _ = batch(0, 0, rank)
    model(tokens)
    over = Path(f"{path}-over")
    if rank == 1:
        deadline = time.monotonic() + 600.0
        while not over.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        return ""
    with pytest.raises(mics.TimeoutError) as caught:
        model(tokens)
    over.touch()
    return str(caught.value)


def test_the_timeout_is_that_of_the_process_group(tmp_path: Path):
    text, _ = run_ranks(2, _wait_too_long, str(tmp_path / "store"), initialise=False)
    assert "all_gather failed: operation" in text
    assert "of group gather/intra (world_rank=0)" in text
    assert "world_rank 1 did not come within 10000 ms" in text
