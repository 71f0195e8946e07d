"""Extension modules that the C++ tests build for Python tests."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest

# Where the C++ tests are built: by default where tests/run.sh builds them.
VARIABLE = "MICS_TEST_FAKES"
_ROOT = Path(__file__).resolve().parents[3]


def _path(name: str) -> Path:
    directory = os.environ.get(VARIABLE) or _ROOT / ".build" / "python" / "fakes"
    return Path(directory) / f"{name}.so"


def needs_built(name: str) -> pytest.MarkDecorator:
    """Skips where the module is not built; one that the environment names and is not there is an error."""
    return pytest.mark.skipif(
        not _path(name).exists() and not os.environ.get(VARIABLE),
        reason="the C++ tests are not built here: bash tests/run.sh builds them",
    )


def load_built(name: str) -> Any:
    """Gives the module."""
    specification = importlib.util.spec_from_file_location(name, _path(name))
    assert specification is not None, _path(name)
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module
