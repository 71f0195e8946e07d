"""Transformers that are known by name: the shapes of published runs."""

from __future__ import annotations

import json
from functools import cache
from importlib import resources

from torch_mics import _C


@cache
def published_shapes() -> dict[str, _C.TransformerShape]:
    """Gives the shapes of the published models by name."""
    file = resources.files("torch_mics.planner") / "data" / "models.json"
    shapes = json.loads(file.read_text())
    return {name: _C.TransformerShape(**shape) for name, shape in shapes.items()}


@cache
def published_model(name: str) -> _C.Workload:
    """Gives a published model's workload.

    Raises:
        ValueError: no such model.
    """
    shapes = published_shapes()
    if name not in shapes:
        raise ValueError(f"a model must be a published one: got {name!r}. Use {', '.join(shapes)}.")
    return _C.transformer_workload(shapes[name])
