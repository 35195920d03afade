"""A run that is killed a few times ends with the same bits; `python -m tests.kill_storm` is the long form."""

import pytest

from tests.kill_storm import storm

pytestmark = pytest.mark.slow


def test_a_run_killed_a_few_times_ends_with_the_same_bits(tmp_path):
    assert sum(storm(tmp_path, kills=4, epochs=2, seed=3).values()) == 4
