"""Boxes per object, and warnings of useless detections."""

import pytest
import torch

from datasets.detection_stats import DetectionStats
from datasets.evaluators import Batch


def stats_of(boxes, scores, objects):
    """Statistics of images of 100 x 50 pixels: boxes [N, Q, 4] in pixels, scores [N, Q], numbers of objects [N]."""
    evaluator = DetectionStats()
    size = torch.tensor([50, 100])
    targets = [
        {"image_id": torch.tensor(i), "orig_size": size, "labels": torch.ones(count, dtype=torch.int64)}
        for i, count in enumerate(objects)
    ]
    results = {i: {"boxes": b, "scores": s} for i, (b, s) in enumerate(zip(boxes, scores, strict=True))}
    evaluator.update(results, Batch({}, None, targets))
    evaluator.update({0: results[0]}, Batch({}, None, targets[:1]))  # a padded sampler repeats images
    evaluator.synchronize_between_processes()
    evaluator.accumulate()
    return evaluator.summarize()


def test_boxes_per_object_counts_scores_above_one_half_once_for_each_image(caplog):
    boxes = torch.rand(3, 4, 4) * 50
    scores = torch.tensor([[0.9, 0.6, 0.5, 0.1], [0.51, 0, 0, 0], [0, 0, 0, 0.4]])
    assert stats_of(boxes, scores, [1, 2, 0]) == {"boxes_per_object": 1.0}
    assert not caplog.text


def test_detections_without_objects_give_no_number(caplog):
    assert stats_of(torch.rand(2, 3, 4), torch.ones(2, 3), [0, 0]) == {} and not caplog.text


def test_detections_that_all_score_low_are_warned_of(caplog):
    assert stats_of(torch.rand(2, 3, 4), torch.full((2, 3), 0.5), [1, 1]) == {"boxes_per_object": 0}
    assert "no detection of 2 images scores above 0.5" in caplog.text


@pytest.mark.parametrize(("spread", "warned"), [(0.2, True), (20, False)])
def test_detections_alike_in_all_images_are_warned_of(caplog, spread, warned):
    torch.manual_seed(0)
    boxes = torch.rand(1, 5, 4) * 50 + spread * torch.rand(12, 5, 4)
    stats_of(boxes, torch.ones(12, 5), [1] * 12)
    assert ("nearly the same box in every image" in caplog.text) == warned


def test_detections_of_varying_number_are_not_compared(caplog):
    boxes = [torch.zeros(1 + i % 2, 4) for i in range(12)]
    scores = [torch.ones(len(each)) for each in boxes]
    assert stats_of(boxes, scores, [1] * 12) == {"boxes_per_object": 1.5} and not caplog.text


def test_images_with_more_objects_than_queries_are_warned_of(caplog):
    stats_of(torch.rand(3, 2, 4), torch.ones(3, 2), [2, 3, 1])
    assert "1 images have more objects than the model has queries (--num_queries): images [1]" in caplog.text
