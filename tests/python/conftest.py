"""Every test module gets processes of its own.

DTensor keeps what it has planned for a mesh, and takes a mesh of the same shape from a later process group
for the same one, with group names that are gone. Inside a module, groups are made in one way.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.ranks import close_pools


@pytest.fixture(scope="module", autouse=True)
def fresh_ranks() -> Iterator[None]:
    yield
    close_pools()
