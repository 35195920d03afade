"""The fast path trains as plain float32 does; tests/loss_curves.py draws it over more steps."""

import pytest

from tests.helpers import parse
from tests.loss_curves import curve

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("way, tolerance", [("fast", 1e-4), ("bf16", 0.05)])
def test_the_fast_way_gives_the_plain_ways_losses(coco_root, way, tolerance):
    flags = f"--coco_path {coco_root} --augment none --dropout 0 --lr 1e-3"
    plain, fast = (curve(parse(flags), each, 12) for each in ("plain", way))
    assert plain[-1] < plain[0] and len(fast) == 12
    assert fast == pytest.approx(plain, rel=tolerance)
