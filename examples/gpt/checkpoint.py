"""Where checkpoints lie, which one is the last complete one, and what is saved beside the model.

`output_dir/checkpoints/step_00000060/` holds sharded tensors and run.json;
`output_dir/checkpoints/latest` holds the name of the last complete one.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from gpt.config import ConfigError

__all__ = ["Progress", "check_same_run", "find_checkpoint", "mark_complete", "step_directory"]

_LATEST = "latest"
_RUN = "run.json"


class Progress:
    """The trainer's own state, saved with the model: position, generator, time spent.

    The position in the data is the step: batches are a pure function of it.
    """

    def __init__(self) -> None:
        self.step = 0
        self.seconds = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Returns the state and the current generator's."""
        return {"step": self.step, "seconds": self.seconds, "generator": torch.get_rng_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the state and the generator's."""
        self.step = int(state["step"])
        self.seconds = float(state["seconds"])
        torch.set_rng_state(state["generator"].cpu())


def step_directory(output_dir: Path, step: int) -> Path:
    """Names the checkpoint of `step`."""
    return output_dir / "checkpoints" / f"step_{step:08d}"


def mark_complete(directory: Path, run: dict[str, Any]) -> None:
    """Makes `directory` the latest checkpoint. Rank 0 calls it after every rank has saved.

    Args:
        directory: from `step_directory`.
        run: what must be the same on resume, and notes for people.
    """
    (directory / _RUN).write_text(json.dumps(run, indent=2) + "\n")
    draft = directory.parent / f".{_LATEST}"
    draft.write_text(directory.name + "\n")
    os.replace(draft, directory.parent / _LATEST)


def _follow(marker: Path) -> Path:
    directory = marker.parent / marker.read_text().strip()
    if not (directory / _RUN).is_file():
        raise ConfigError(
            f"{marker} must name a complete checkpoint: got {directory.name}, which has no {_RUN}. "
            "Name another checkpoint with --resume."
        )
    return directory


def find_checkpoint(resume: str | None, output_dir: Path) -> Path | None:
    """Turns `--resume` into a complete checkpoint directory, or None to start from nothing.

    Raises:
        ConfigError: `resume` names no complete checkpoint.
    """
    if resume is None:
        return None
    if resume == "auto":
        marker = output_dir / "checkpoints" / _LATEST
        return _follow(marker) if marker.is_file() else None
    path = Path(resume)
    if path.is_file():
        return _follow(path)
    if (path / _RUN).is_file():
        return path
    for marker in (path / _LATEST, path / "checkpoints" / _LATEST):
        if marker.is_file():
            return _follow(marker)
    known = sorted(found.parent.name for found in output_dir.glob(f"checkpoints/*/{_RUN}"))
    raise ConfigError(
        f"--resume must name a complete checkpoint, a '{_LATEST}' file, a run directory or 'auto': "
        f"got resume={resume!r}. Complete in {output_dir / 'checkpoints'}: "
        f"{', '.join(known) or 'none'}."
    )


def check_same_run(directory: Path, run: dict[str, Any]) -> None:
    """Compares what must not change across a resume; world and partition size may.

    Raises:
        ConfigError: the model's shape or the data differ.
    """
    saved = json.loads((directory / _RUN).read_text())
    differing = [name for name in run["fixed"] if saved["fixed"].get(name) != run["fixed"][name]]
    if differing:
        values = ", ".join(
            f"{name}={run['fixed'][name]} (saved: {saved['fixed'].get(name)})" for name in differing
        )
        raise ConfigError(
            f"a resumed run must keep the model, the data and loss scaling: got {values} "
            f"({directory}). Use the saved values or another --output-dir without --resume."
        )
