"""A run that is killed a few times ends as one that was not; `python -m tests.kill_storm` is the long form."""

import pytest

from tests.kill_storm import storm

pytestmark = pytest.mark.slow


def test_a_few_kills_leave_no_trace(tmp_path):
    assert sum(storm(tmp_path, kills=4, epochs=2, seed=3).values()) == 4
