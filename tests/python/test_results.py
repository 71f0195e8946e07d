"""The page of results: what is made of launches, and that the page in docs is made of its own numbers."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

import results
from prediction import predicted_seconds

ROOT = Path(__file__).resolve().parents[2]
CALIBRATION = {
    "layers": 4,
    "layer_mb": 2.0,
    "layer_seconds": 0.15,
    "micro_steps": 2,
    "base": "none",
}


def record(seconds: list[float], **changes: Any) -> dict[str, Any]:
    return {
        "losses": [2.0, 1.0],
        "norms": [],
        "seconds": seconds,
        "exposed": [0.0] * len(seconds),
        "cpu": [0.1] * len(seconds),
        "counted_intra_nbytes": 0,
        "counted_inter_nbytes": 4_000_000,
        "link_nbytes": 4_040_000,
        "loopback_nbytes": None,
        "parity": "exact",
        "why_not": "",
        **changes,
    }


def write(
    data: Path, name: str, records: dict[str, Any], nodes: int, per_node: int, **options: Any
) -> None:
    launch = {
        "versions": {
            "torch": "2.11.0",
            "cores": 2,
            "kernel": "6",
            "commit": "abc",
            "date": "today",
        },
        "options": {"base": next(iter(records)), **options},
        "world_size": nodes * per_node,
        "ranks_per_node": per_node,
        "reference_losses": [2.0, 1.0],
        "records": records,
    }
    cluster = {
        "nodes": nodes,
        "rate_bps": 100_000_000,
        "broken_gates": [],
        "command": ["python", "train_bench", "--json", "somewhere", "--steps", "2"],
    }
    data.mkdir(exist_ok=True)
    (data / f"{name}.json").write_text(json.dumps(launch))
    (data / f"{name}.cluster.json").write_text(json.dumps(cluster))


def test_a_comparison_joins_its_launches(tmp_path: Path):
    absent = record([], why_not="RuntimeError: it cannot")
    for launch, (ddp, ours) in enumerate([([1.0, 2.0], [2.0, 2.0]), ([1.0], [3.0])], 1):
        records = {"ddp": record(ddp), "ours@2": record(ours), "deepspeed_mics@2": absent}
        write(tmp_path / "data", f"one_node-{launch}", records, 4, 2)
    assert "1 comparisons" in results.render(tmp_path)
    page = (tmp_path / "README.md").read_text()
    # Ratios are of steps in the same turn: 2, 1 and 3.
    assert "| ours@2 | 2.000 | 2.000 | 0.10 | 4.04 | 4.00 |  | exact |" in page
    assert "| deepspeed_mics@2 |  |  |  |  |  |  | did not run: RuntimeError: it cannot |" in page
    assert "Launches: 2, timed steps in all: 3." in page
    command = (
        "--nodes 4 --ranks-per-node 2 --rate 100mbit -- python benchmarks/train_bench --steps 2"
    )
    assert command in page
    for plot in re.findall(r"!\[.*?\]\((.*?)\)", page):
        assert (tmp_path / plot).stat().st_size > 1000


def test_accumulation_is_paired_with_ours(tmp_path: Path):
    for micro_steps in (1, 4):
        records = {
            "ddp": record([1.0, 1.0]),
            "hsdp@2": record([2.0 * micro_steps, 2.0]),
            "hsdp_deferred@2": record([3.0, 3.0]),
            "ours_each@2": record([1.0 * micro_steps, 1.0 * micro_steps]),
            "ours@2": record([1.0, 1.0]),
        }
        write(tmp_path / "data", f"accumulation_{micro_steps}-1", records, 4, 2)
    results.render(tmp_path)
    page = (tmp_path / "README.md").read_text()
    assert "| | s = 1 | s = 4 |" in page
    assert "| ours, replicas in every micro-step | 1.00 | 4.00 |" in page
    assert "| HSDP, replicas in every micro-step | 2.00 | 5.00 |" in page


def test_weak_scaling_has_efficiencies_and_predictions(tmp_path: Path):
    data = tmp_path / "data"
    shutil.copytree(ROOT / "docs/results/data", data, ignore=lambda *_: _other_than_calibration())
    alone = 4 * 2 * 3 * 0.15
    for nodes, over_all in ((1, 1.0), (8, 2.0)):
        records = {"none": record([alone, alone], parity="not checked")}
        for p in (4, 8, 16, 32)[: 1 if nodes == 1 else 4]:
            scale = 1.0 if nodes == 1 else 1.0 + (over_all - 1.0) * p / 32
            records[f"ours@{p}"] = record([alone * scale] * 2, parity="not checked")
        write(data, f"weak_scaling_{nodes}-1", records, nodes, 4, **CALIBRATION)
    results.render(tmp_path)
    page = (tmp_path / "README.md").read_text()
    assert "| 8 x 4 | none | 3.60 | 3.60 | 1.000 | 1.000 | +0.0% |" in page
    assert "groups of one node 88.9%, one group, two hops 50.0%" in page  # 1 / 1.125 and 1 / 2
    assert re.search(r"Mean error: \d+\.\d%, worst \d+\.\d%\.", page)
    assert (tmp_path / "partition_sweep.svg").exists()


def _other_than_calibration() -> set[str]:
    files = (ROOT / "docs/results/data").iterdir()
    return {file.name for file in files if file.name != "calibration.json"}


def test_predictions_have_the_compute_in_them_and_grow_without_hierarchy():
    predicted = predicted_seconds
    file = ROOT / "docs/results/data/calibration.json"
    launch = {"options": CALIBRATION, "world_size": 32, "ranks_per_node": 4}
    seconds = [predicted(file, launch, f"ours@{p}") for p in (4, 8, 16, 32)]
    assert predicted(file, launch, "ours_flat@32") > seconds[-1]
    assert predicted(file, launch, "none") == pytest.approx(3.6)
    assert all(second > 3.6 for second in seconds)
    assert predicted(file, launch, "fsdp2") is None


def test_the_page_in_docs_is_made_of_its_numbers(tmp_path: Path):
    shutil.copytree(ROOT / "docs/results/data", tmp_path / "data")
    results.render(tmp_path)
    page = (tmp_path / "README.md").read_text()
    assert page == (ROOT / "docs/results/README.md").read_text()
    for plot in re.findall(r"!\[.*?\]\((.*?)\)", page):
        assert (ROOT / "docs/results" / plot).exists()
