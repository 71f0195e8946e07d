"""The package as it is built and imported."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import pytest
import torch

import torch_mics
from torch_mics import _C, _build_check


def test_core_was_built_for_the_torch_at_hand() -> None:
    assert _C.built_for_torch == torch.__version__
    assert _C.version == torch_mics.__version__
    record = _build_check.built_for_torch(pathlib.Path(_C.__file__))
    assert record == torch.__version__


def test_core_built_for_another_torch_is_refused_with_the_command_to_run() -> None:
    _build_check.check_build(torch.__version__, torch.__version__)
    _build_check.check_build(None, torch.__version__)
    with pytest.raises(ImportError) as caught:
        _build_check.check_build("2.9.1+cpu", "2.11.0+cu130")
    text = str(caught.value)
    assert "built_for_torch=2.9.1+cpu, torch=2.11.0+cu130" in text
    assert "pip install --no-build-isolation" in text


def test_import_refuses_before_the_core_is_loaded(tmp_path: pathlib.Path) -> None:
    package = pathlib.Path(torch_mics.__file__).parent
    copy = tmp_path / "torch_mics"
    copy.mkdir()
    for file in package.iterdir():
        if file.is_file() and file.name != "_built_for_torch.txt":
            (copy / file.name).symlink_to(file)
    (copy / "_built_for_torch.txt").write_text("1.0.0\n")
    code = "import sys; sys.path.insert(0, sys.argv[1]); import torch_mics"
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert run.returncode != 0
    assert "got built_for_torch=1.0.0" in run.stderr


def test_process_has_at_most_one_libnccl() -> None:
    code = """
import pathlib, torch_mics
maps = pathlib.Path("/proc/self/maps").read_text().splitlines()
print(len({line.split()[-1] for line in maps if "libnccl.so" in line}))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(run.stdout) <= 1


def test_every_exported_name_exists() -> None:
    missing = [name for name in torch_mics.__all__ if not hasattr(torch_mics, name)]
    assert missing == []
