"""The benchmarks run and print what they promise; their numbers are not judged here."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(name: str, *arguments: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, str(ROOT / "benchmarks" / name), *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_host_overhead(tmp_path: Path):
    file = tmp_path / "numbers.json"
    arguments = ("--units", "3", "--parameters", "2", "--world-sizes", "2", "--rounds", "2")
    last = run("host_overhead.py", *arguments, "--json", str(file)).splitlines()[-1]
    printed = re.fullmatch(r"ratio ours/FSDP2 = (\d+\.\d{4})", last)
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
