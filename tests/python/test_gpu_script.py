"""tests/gpu.sh up to the point where a GPU is needed, and what it says of what went wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHOW = ROOT / "tests" / "gpu" / "show.py"


def _environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHON": sys.executable, **more}


def test_a_dry_run_on_cpus_goes_to_where_a_gpu_is_needed(tmp_path: Path):
    done = subprocess.run(
        ["bash", str(ROOT / "tests" / "gpu.sh"), "--dry-run", "--no-build", "--first"],
        env=_environment(OUT=str(tmp_path)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "A GPU is needed from here on" in done.stdout
    results = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    logs = {result["log"].partition("_")[0] for result in results}
    assert logs == {"one", "two", "race", "four"}
    # No mode failed but the one in which a rank was killed, and its other rank was told.
    assert [result["mode"] for result in results if "error" in result] == ["ours+killed"]
    assert len(list(tmp_path.iterdir())) <= 8


def test_it_says_that_it_needs_a_gpu(tmp_path: Path):
    done = subprocess.run(
        ["bash", str(ROOT / "tests" / "gpu.sh"), "--no-build"],
        env=_environment(OUT=str(tmp_path), CUDA_VISIBLE_DEVICES=""),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "tests/gpu.sh needs a GPU" in done.stderr


RIGHT: dict[tuple[str, str], dict[str, Any]] = {
    ("two_fsdp2", "fsdp2"): {},
    ("two_ours", "ours+sync"): {},
    ("two_killed", "ours+killed"): {"error": "CommError: rank 1 has ended"},
    ("race_async", "ours+late"): {},
    ("race_blocking", "ours+late"): {},
}
WRONG: dict[str, tuple[tuple[str, str], dict[str, Any]]] = {
    "losses within": (("two_ours", "ours+sync"), {"losses": [2.0, 1.1, 1.0, 1.0, 1.0]}),
    "host synchronisations": (("two_ours", "ours+sync"), {"synchronisations": ["step.py:3"]}),
    "allocations by step": (("two_ours", "ours+sync"), {"allocations": [1, 2, 3, 4, 5]}),
    "the other rank was told": (("two_killed", "ours+killed"), {"error": None}),
    "late compute gives": (("race_async", "ours+late"), {"norms": [0.5, 0.5, 0.5, 0.5, 0.6]}),
    "ValueError": (("race_blocking", "ours+late"), {"error": "ValueError: no"}),
    "no result": (("two_ours", "ours+sync"), {}),
}


def _show(folder: Path, results: dict[tuple[str, str], dict[str, Any] | None]) -> tuple[int, str]:
    usual = {
        "seconds": 1.0,
        "losses": [2.0, 1.5, 1.2, 1.1, 1.0],
        "norms": [0.5] * 5,
        "ms": [1.0] * 5,
        "peak_mib": 3.0,
        "synchronisations": [],
        "allocations": [1, 2, 3, 3, 3],
    }
    for (log, mode), changes in results.items():
        text = "a warning\n"
        if changes is not None:
            result = {"mode": mode, **usual, **changes}
            text += "RESULT " + json.dumps({k: v for k, v in result.items() if v is not None})
        (folder / f"{log}.log").write_text(text)
    done = subprocess.run(
        [sys.executable, str(SHOW), str(folder), str(folder / "results.jsonl")],
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr


def test_what_is_right_is_called_right(tmp_path: Path):
    status, text = _show(tmp_path, dict(RIGHT))
    assert status == 0, text
    assert "WRONG" not in text
    assert text.count("  right ") >= 5


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_called_wrong(tmp_path: Path, what: str):
    place, changes = WRONG[what]
    results: dict[tuple[str, str], dict[str, Any] | None] = dict(RIGHT)
    results[place] = None if what == "no result" else changes
    status, text = _show(tmp_path, results)
    assert status == 1, text
    assert any(what in line for line in text.splitlines() if "WRONG" in line), text
