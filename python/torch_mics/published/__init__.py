"""Reproduces published figures: fits the planner to a few published runs and predicts the others.

`python -m torch_mics validate` prints the result; docs/accuracy.md is written by it. No other part of the
package needs this one.
"""

from torch_mics.published._announcement import write_announcement
from torch_mics.published._page import accuracy_page
from torch_mics.published._validate import validate

__all__ = ["accuracy_page", "validate", "write_announcement"]
