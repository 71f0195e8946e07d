"""The benchmarks run and print what they promise; their numbers are not judged here."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(name: str, *arguments: str) -> str:
    return start(str(ROOT / "benchmarks" / name), *arguments)


def start(*arguments: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=1500, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_host_overhead(tmp_path: Path):
    file = tmp_path / "numbers.json"
    arguments = ("--units", "3", "--parameters", "2", "--world-sizes", "2", "--rounds", "2")
    last = run("host_overhead.py", *arguments, "--json", str(file)).splitlines()[-1]
    # Of three units the difference to the plain model may drown in noise, and be negative.
    printed = re.fullmatch(r"ratio ours/FSDP2 = (-?\d+\.\d{4})", last)
    numbers = json.loads(file.read_text())
    assert printed is not None
    assert abs(float(printed[1]) - numbers["ratios"]["inline"]) < 1e-4
    assert [(row["streams"], row["clock"]) for row in numbers["rows"]] == [
        (streams, clock) for streams in ("inline", "threads") for clock in ("wall", "cpu")
    ]


def test_optimizer_overhead(tmp_path: Path):
    file = tmp_path / "numbers.json"
    arguments = ("--units", "3", "--parameters", "4", "--rounds", "3", "--json", str(file))
    last = run("optimizer_overhead.py", *arguments).splitlines()[-1]
    printed = re.fullmatch(r"ratio ours/torch = (\d+\.\d{4})", last)
    numbers = json.loads(file.read_text())
    assert printed is not None
    assert abs(float(printed[1]) - numbers["ratio"]) < 1e-4
    assert len(numbers["medians_s"]) == 4


def collective_numbers(file: Path) -> tuple[dict, dict[tuple[str, str, int], dict]]:
    found = json.loads(file.read_text())
    records = {(r["operation"], r["contestant"], r["nbytes"]): r for r in found["records"]}
    assert len(records) == len(found["records"])
    return found, records


def test_collectives_of_two_nodes(tmp_path: Path):
    file = tmp_path / "numbers.json"
    sizes = ("--smallest", "64kB", "--largest", "128kB", "--repeats", "2")
    printed = run(
        *("collective_bench.py", "--ranks", "4", "--ranks-per-node", "2"),
        *(*sizes, "--json", str(file)),
    )
    assert "all_gather, 4 ranks" in printed
    assert "reduce_scatter, 4 ranks" in printed
    found, records = collective_numbers(file)
    assert found["carried_by"]["hierarchical/shm"]["gather/intra"] == "shm"
    names = ("torch", "flat", "hierarchical", "hierarchical/shm")
    assert set(records) == {
        (operation, name, nbytes)
        for operation in ("all_gather", "reduce_scatter")
        for name in names
        for nbytes in (1 << 16, 1 << 17)
    }
    for (_, name, nbytes), record in records.items():
        assert len(record["seconds"]) == 2
        assert record["algbw_Bps"] == pytest.approx(nbytes / record["median_s"])
        assert record["busbw_Bps"] == pytest.approx(record["algbw_Bps"] * 3 / 4)
        if name.startswith("hierarchical"):  # a rank's piece to the other node; two inside
            assert record["sent_inter_nbytes"] == nbytes // 4
            assert record["sent_intra_nbytes"] == nbytes // 2


def test_collectives_of_one_node_under_torchrun(tmp_path: Path):
    file = tmp_path / "numbers.json"
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    script = str(ROOT / "benchmarks" / "collective_bench.py")
    sizes = ("--smallest", "64kB", "--largest", "64kB", "--repeats", "2", "--json", str(file))
    start(*launcher, script, *sizes)
    _, records = collective_numbers(file)
    assert {name for _, name, _ in records} == {"torch", "flat", "flat/shm"}


# --- train_bench ----------------------------------------------------------------------------------

SMALL = ("--steps", "1", "--layers", "1", "--width", "32", "--vocabulary", "64", "--length", "8")


def torchrun(ranks: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks))
    return subprocess.run(
        [*command, str(ROOT / "benchmarks" / "train_bench"), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        timeout=1500,
        check=False,
    )


@pytest.mark.parametrize("model", ["gpt", "bert"])
def test_contestants_train_as_one_process_and_a_wrong_one_is_seen(tmp_path: Path, model: str):
    names = ["ddp", "hsdp_deferred@1", "fsdp2/our_rs", "ours@2", "ours_nosync@1", "control", "none"]
    file = tmp_path / "numbers.json"
    options = ("--model", model, "--optimizer", "sgd", *SMALL, "--json", str(file))
    done = torchrun(2, "--strategy", *names, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    numbers = json.loads(file.read_text())
    parity = {name: record["parity"] for name, record in numbers["records"].items()}
    assert [name for name in names if parity[name] == "exact"] == names[:-2]
    assert "gradient norm by" in parity["control"]
    for name in names[:-2]:
        assert numbers["records"][name]["losses"] == pytest.approx(
            numbers["reference_losses"], abs=1e-5
        )
    assert numbers["ratios"]["ddp"] == 1.0
    assert all(len(record["seconds"]) == 1 for record in numbers["records"].values())


def test_virtual_layers_take_their_time(tmp_path: Path):
    file = tmp_path / "numbers.json"
    sizes = ("--layers", "2", "--layer-mb", "0.1", "--layer-seconds", "0.1", "--micro-steps", "2")
    names = ("none", "ours@2", "ours@2/communication")
    options = ("--compute", "virtual", *sizes, "--steps", "2", "--json", str(file))
    done = torchrun(2, "--strategy", *names, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    records = json.loads(file.read_text())["records"]
    compute = 2 * 2 * 3 * 0.1  # many times what a busy machine needs for the communication
    assert min(records["none"]["seconds"]) >= compute
    assert min(records["ours@2"]["seconds"]) >= compute
    assert min(records["ours@2/communication"]["seconds"]) < compute


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("zero9", "strategy must be one of none, ddp"),
        ("hsdp", "'hsdp' is written with @P"),
        ("ddp@2", "'ddp' is written without @P"),
        ("ours@3", "P must divide the number of ranks: got 'ours@3' and 1 ranks"),
        ("ddp/our_rs", "our reduce-scatter fits FSDP2 and HSDP"),
        ("ddp/fast", "a variant must be one of our_rs, communication"),
    ],
)
def test_names_that_are_wrong_are_refused(name: str, message: str):
    command = [sys.executable, str(ROOT / "benchmarks" / "train_bench"), "--strategy", name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500, check=False)
    assert done.returncode == 2
    assert message in done.stderr


# --- single_gpu -----------------------------------------------------------------------------------


def test_single_device_compares_what_trains_alike(tmp_path: Path):
    file = tmp_path / "numbers.json"
    sizes = (
        "--layers",
        "2",
        "--width",
        "32",
        "--heads",
        "2",
        "--vocabulary",
        "64",
        "--length",
        "8",
    )
    how = ("--device", "cpu", "--steps", "2", "--rounds", "1", "--instance", "p4d")
    printed = run("single_gpu.py", *sizes, *how, "--json", str(file))
    assert "one GPT on one cpu, world size 1" in printed
    numbers = json.loads(file.read_text())
    found = numbers["summary"]
    assert list(found) == ["plain", "fsdp2", "ours"]
    assert found["ours"]["last_loss"] == pytest.approx(found["fsdp2"]["last_loss"], rel=1e-3)
    assert found["ours"]["last_loss"] == pytest.approx(found["plain"]["last_loss"], rel=1e-2)
    for name, line in found.items():
        assert len(numbers["rounds"][name][0]["seconds"]) == 2
        assert line["tokens_per_s"] == pytest.approx(4 * 8 / line["seconds"])
        assert 0 < line["mfu"] < 1
        assert line["peak_nbytes"] > 0
        assert (line["exposed_seconds"] is None) == (name != "ours")


def test_single_device_says_what_is_wrong():
    for arguments, message in (
        (("--device", "cpu", "--rounds", "0"), "--rounds must be at least 1: got 0."),
        (("--device", "cpu", "--heads", "3"), "--width must be a multiple of --heads."),
    ):
        command = [sys.executable, str(ROOT / "benchmarks" / "single_gpu.py"), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=1500, check=False)
        assert done.returncode == 2
        assert message in done.stderr
