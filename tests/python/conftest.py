"""Every test module gets processes of its own, and every process one thread.

DTensor keeps what it has planned for a mesh, and takes a mesh of the same shape from a later process group
for the same one, with group names that are gone. Inside a module, groups are made in one way.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support.ranks import close_pools

# More threads than free cores make tiny matrices a hundred times slower.
torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def fresh_ranks() -> Iterator[None]:
    yield
    close_pools()
