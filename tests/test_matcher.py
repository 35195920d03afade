import itertools

import pytest
import torch

from models.matcher import HungarianMatcher
from tests.helpers import layers_of, matching_scene
from util.box_ops import box_cxcywh_to_xyxy, generalized_box_iou


def cost_of(logits, boxes, target, weights):
    """Cost [Q, T], written out object by object."""
    cost = torch.zeros(len(boxes), len(target["labels"]))
    for q, t in itertools.product(*map(range, cost.shape)):
        l1 = (boxes[q] - target["boxes"][t]).abs().sum()
        giou = generalized_box_iou(box_cxcywh_to_xyxy(boxes[q : q + 1]), box_cxcywh_to_xyxy(target["boxes"][t : t + 1]))
        cost[q, t] = weights[0] * -logits[q].softmax(0)[target["labels"][t]] + weights[1] * l1 - weights[2] * giou
    return cost


def test_equals_trying_every_assignment():
    weights = (1.0, 5.0, 2.0)
    logits, boxes, targets = matching_scene()
    layers = HungarianMatcher(*weights).match_layers(layers_of(logits, boxes), targets)
    for layer in range(2):
        for i, target in enumerate(targets):
            cost = cost_of(logits[layer, i], boxes[layer, i], target, weights)
            n = cost.shape[1]
            best = min(sum(cost[q, t] for t, q in enumerate(p)) for p in itertools.permutations(range(5), n))
            queries, objects = layers[layer][i]
            assert queries.dtype == objects.dtype == torch.int64
            assert sorted(objects.tolist()) == list(range(n)) and queries.tolist() == sorted(set(queries.tolist()))
            assert float(sum(cost[q, t] for q, t in zip(queries, objects, strict=True))) == pytest.approx(float(best))


def test_one_layer_is_the_same_as_that_layer_among_many_and_an_image_as_in_its_batch():
    logits, boxes, targets = matching_scene()
    matcher = HungarianMatcher(1, 5, 2)
    together = matcher.match_layers(layers_of(logits, boxes), targets)
    alone = matcher({"pred_logits": logits[1], "pred_boxes": boxes[1]}, targets)
    single = matcher({"pred_logits": logits[1, 2:], "pred_boxes": boxes[1, 2:]}, targets[2:])
    for pair, other in zip(together[1] + together[1][2:], alone + single, strict=True):
        assert pair[0].tolist() == other[0].tolist() and pair[1].tolist() == other[1].tolist()


def test_more_objects_than_queries():
    logits, boxes, targets = matching_scene(queries=2, sizes=(5,))
    queries, objects = HungarianMatcher().match_layers(layers_of(logits, boxes), targets)[0][0]
    assert queries.tolist() == [0, 1] and len(set(objects.tolist())) == 2


def test_a_batch_without_objects():
    logits, boxes, targets = matching_scene(sizes=(0, 0))
    assert all(len(q) == len(t) == 0 for q, t in HungarianMatcher().match_layers(layers_of(logits, boxes), targets)[0])


def test_predictions_that_are_not_finite_still_match_so_that_the_loss_can_tell():
    logits, boxes, targets = matching_scene()
    boxes[:] = float("nan")
    queries, _ = HungarianMatcher().match_layers(layers_of(logits, boxes), targets)[0][0]
    assert len(queries) == 3


def test_the_cost_crosses_to_the_cpu_once(monkeypatch):
    logits, boxes, targets = matching_scene(layers=6)
    copies = []
    original = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: copies.append(self.shape) or original(self))
    HungarianMatcher().match_layers(layers_of(logits, boxes), targets)
    assert copies == [(6, 3, 5, 3)]


def test_costs_that_are_all_zero_are_refused():
    with pytest.raises(ValueError, match="all three"):
        HungarianMatcher(0, 0, 0)
