"""What the planner predicts for a launch with virtual layers, on the cluster of its calibration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch_mics.planner import chain_seconds, load_calibration


def predicted_seconds(calibration: Path, launch: dict[str, Any], contestant: str) -> float | None:
    """Seconds of one step; None for a contestant that the time model does not know.

    Args:
        calibration: of the emulated cluster, by `torch_mics calibrate`.
        launch: the numbers that train_bench has written, with virtual layers.
        contestant: the name of one in the launch.
    """
    strategy, _, size = contestant.partition("@")
    options = launch["options"]
    if strategy == "none":
        return float(options["layers"] * options["micro_steps"] * 3 * options["layer_seconds"])
    if strategy not in ("ours", "ours_flat"):
        return None
    return chain_seconds(
        load_calibration(calibration),
        num_layers=options["layers"],
        layer_numel=int(options["layer_mb"] * 1e6 / 4),
        forward_seconds=options["layer_seconds"],
        world_size=launch["world_size"],
        shard_size=int(size),
        num_microsteps=options["micro_steps"],
        hierarchical=strategy == "ours",
    )
