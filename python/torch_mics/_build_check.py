"""Compares the torch that the C++ core was built for with the one that is installed."""

from __future__ import annotations

import importlib.util
import pathlib

import torch

_REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps torch-mics"


def built_for_torch(library: pathlib.Path) -> str | None:
    """Returns the torch version recorded beside the C++ core, or None when there is no record."""
    record = library.with_name("_built_for_torch.txt")
    return record.read_text().strip() if record.exists() else None


def check_build(built_for: str | None, at_hand: str) -> None:
    """Raises ImportError when the core was built for another torch than the installed one.

    libtorch has no stable C++ interface, so a core built for another version fails later, with an
    undefined symbol or worse.
    """
    if built_for is not None and built_for != at_hand:
        raise ImportError(
            "torch_mics must run with the torch it was built for: got built_for_torch="
            f"{built_for}, torch={at_hand}. In a checkout run `pip install --no-build-isolation -e .`;"
            f" else run `{_REBUILD}`."
        )


def check_import() -> None:
    """Raises ImportError before the core is loaded when it is missing or was built for another torch."""
    spec = importlib.util.find_spec("torch_mics._C")
    if spec is None or spec.origin is None:
        raise ImportError(
            "torch_mics needs its C++ core: torch_mics._C is missing. In a checkout run "
            "`pip install --no-build-isolation -e .`."
        )
    check_build(built_for_torch(pathlib.Path(spec.origin)), torch.__version__)
