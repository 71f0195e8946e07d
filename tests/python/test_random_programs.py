"""Random programs of what a training script may do, compared with one process after every action.

What is kept between uses, several forwards, exceptions and the end of one step before the next meet in
combinations that nobody would write down.
"""

from __future__ import annotations

import os

import pytest
from support.bodies import on_ranks
from support.programs import RandomProgram

NUM_PROGRAMS = 300 if os.environ.get("MICS_WIDE") else 20

# All programs are one launch.
pytestmark = pytest.mark.timeout(1800 if NUM_PROGRAMS < 100 else 3600)


@on_ranks(4, 2, 1, cases=range(NUM_PROGRAMS))
def test_a_program_does_what_it_does_in_one_process(world, seed):
    RandomProgram(world, seed).run()
