"""`python -m torch_mics env`: what a report of a problem needs to know."""

from __future__ import annotations

import json

import pytest
import torch

import torch_mics
from torch_mics.cli import main


def test_env_as_json_has_versions_and_variables(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    monkeypatch.setenv("SECRET_TOKEN", "hidden")
    assert main(["env", "--json"]) == 0
    printed = capsys.readouterr().out
    found = json.loads(printed)
    assert found["torch_mics"] == torch_mics.__version__
    assert found["torch"] == torch.__version__
    assert found["NCCL_DEBUG"] == "WARN"
    assert "hidden" not in printed
    usable = torch_mics._C.nccl_versions().problem == ""
    assert found["cuda"].startswith("can be used" if usable else "cannot be used: ")
    assert ("GPU 0" in found) == torch.cuda.is_available()


def test_env_is_a_line_per_entry(capsys: pytest.CaptureFixture[str]):
    assert main(["env"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["torch", torch.__version__] for line in lines)
