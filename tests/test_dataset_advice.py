"""Advice about flags, from the statistics of a dataset."""

import pytest

from datasets.coco_index import read_coco_index
from tests.helpers import write_coco
from tools.dataset_advice import advise


def advice(tmp_path, per_image=1, box=(4, 4, 30, 30), sizes=(480, 640), num_queries=100, memory=None):
    write_coco(tmp_path, "train", [1, 2], [(1, 1, list(box), {})] * per_image, sizes=sizes)
    index = read_coco_index(tmp_path / "annotations" / "instances_train2017.json")
    return "\n".join(advise(index, num_queries, memory))


def test_advice_for_few_images_of_few_objects(tmp_path):
    text = advice(tmp_path, 3)
    assert "2 images are few: start from COCO weights" in text and "--recipe small" in text
    assert "at most 3 objects in an image: --num_queries 100 is enough" in text and "--num_queries 10 is enough" in text
    assert "enlarges them 1.7 times" in text and "--min_size 480 --max_size 640 has 2.8 times fewer pixels" in text
    assert "GPU" not in text and "half a cell" not in text


def test_advice_for_more_objects_than_the_queries_can_answer(tmp_path):
    assert "up to 70 objects in an image: give --num_queries 110 or more" in advice(tmp_path, 70)


@pytest.mark.parametrize("side, said", [(9, True), (10, False)])  # 1.667 times: 15 and 16.7 pixels
def test_advice_for_objects_below_half_a_cell(side, said, tmp_path):
    assert ("100% of the objects are below 16 pixels" in advice(tmp_path, box=(4, 4, side, side))) == said


def test_advice_on_the_batch_size_is_the_published_one_on_16_gigabytes(tmp_path):
    assert "--batch_size 2 should fit into the GPU's 16 GB" in advice(tmp_path, sizes=(800, 1333), memory=16e9)
    assert "enlarges" not in advice(tmp_path / "large", sizes=(800, 1333))
