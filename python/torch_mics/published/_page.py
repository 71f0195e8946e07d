"""docs/accuracy.md: what the models predict, beside what was published."""

from __future__ import annotations

from torch_mics.published._fit import RAIL_LAUNCH_SHARE
from torch_mics.published._validate import Validation

_TOP = """# Accuracy of the planner

Written by `python -m torch_mics validate --page docs/accuracy.md`; a test writes it again and compares.

The time model ([planner.md](planner.md)) is fitted to the few published runs marked as fitted and predicts
all others. Errors are relative errors of the time of a micro-step. What is not fitted is given: shapes,
peaks, the bandwidth inside a node, and how each system runs. DeepSpeed 0.5.6 runs communication and
compute one after the other; MiCS overlaps them, gathers hierarchically over several nodes and reduces
flat.

Three numbers are not fitted and were chosen with held-out runs in sight: compute on p3dn is slowed by
{p3dn:.0%} while its network is busy, on p4d by {p4d:.0%} (Calculon's figure; with p3dn's, the step of
BloombergGPT is 12 to 14% off), and a hop over nodes starts in {share:.0%} of the time of a flat collective.
The model's structure was found on these runs too. So the errors on runs of other clusters will be
larger; other instance types have no published training run to
compare with, and their calibrations say `assumed`.
"""


def accuracy_page(result: Validation) -> str:
    """Gives the page; the same for every machine."""
    slowed = {
        name: result.calibrations[f"{name}.24xlarge"]["compute_by_network"]
        for name in ("p3dn", "p4d")
    }
    text = _TOP.format(**slowed, share=RAIL_LAUNCH_SHARE)
    for table in result.tables():
        text += f"\n## {table.title}\n\n{table.markdown()}"
    text += "\n## Left out of every mean\n\n"
    text += "".join(f"- {line}\n" for line in result.left_out())
    return f"{text}\n{result.summary()}\n"
