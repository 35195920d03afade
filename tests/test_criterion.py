import pytest
import torch
import torch.nn.functional as F

from models import build_model
from models.criterion import SetCriterion, loss_weights
from models.matcher import HungarianMatcher
from tests.helpers import layers_of, matching_scene, parse
from util.box_ops import box_cxcywh_to_xyxy, generalized_box_iou

CLASSES = 4


def outputs_of(logits, boxes):
    """Layers first to last -> the model's dict."""
    layers = layers_of(logits, boxes)
    return {**layers[-1], "aux_outputs": layers[:-1]}


def criterion(losses=("labels", "boxes", "cardinality")):
    return SetCriterion(CLASSES, HungarianMatcher(1, 5, 2), {}, 0.1, list(losses))


def written_out(logits, boxes, targets, indices):
    """The losses of one layer [B, Q, ...], image by image and pair by pair."""
    wanted = torch.full(logits.shape[:2], CLASSES)
    l1 = giou = 0.0
    for i, (queries, objects) in enumerate(indices):
        for q, t in zip(queries, objects, strict=True):
            wanted[i, q] = targets[i]["labels"][t]
            found, box = boxes[i, q][None], targets[i]["boxes"][t][None]
            l1 += (found - box).abs().sum()
            giou += 1 - generalized_box_iou(box_cxcywh_to_xyxy(found), box_cxcywh_to_xyxy(box))[0, 0]
    weight = torch.tensor([1.0] * CLASSES + [0.1])
    n = max(sum(len(t["labels"]) for t in targets), 1)
    cardinality = torch.stack(
        [((logits[i].argmax(-1) != CLASSES).sum() - len(t["labels"])).abs().float() for i, t in enumerate(targets)]
    ).mean()
    return {
        "loss_ce": F.cross_entropy(logits.transpose(1, 2), wanted, weight),
        "loss_bbox": torch.as_tensor(l1 / n),
        "loss_giou": torch.as_tensor(giou / n),
        "cardinality_error": cardinality,
    }


@pytest.mark.parametrize("sizes", [(3, 0, 2), (1,), (0, 0), (7, 2)])
def test_every_layer_equals_the_loss_written_out(sizes):
    logits, boxes, targets = matching_scene(sizes=sizes, layers=3)
    losses = criterion()(outputs_of(logits, boxes), targets)
    matcher = HungarianMatcher(1, 5, 2)
    for suffix, layer in (("", 2), ("_0", 0), ("_1", 1)):
        indices = matcher({"pred_logits": logits[layer], "pred_boxes": boxes[layer]}, targets)
        for name, value in written_out(logits[layer], boxes[layer], targets, indices).items():
            torch.testing.assert_close(losses[name + suffix], value, msg=f"{name}{suffix}")
    assert "class_error_0" not in losses


def test_class_error_counts_matched_slots_only():
    logits, boxes, targets = matching_scene(sizes=(2,), layers=1)
    (queries, objects) = HungarianMatcher(1, 5, 2)({"pred_logits": logits[0], "pred_boxes": boxes[0]}, targets)[0]
    right = logits[0, 0, queries].argmax(-1) == targets[0]["labels"][objects]
    losses = criterion()(outputs_of(logits, boxes), targets)
    assert losses["class_error"].item() == pytest.approx(100 * (1 - right.float().mean().item()))


def test_a_batch_without_objects_trains_only_no_object():
    logits, boxes, targets = matching_scene(sizes=(0, 0), layers=2)
    logits.requires_grad_(), boxes.requires_grad_()
    losses = criterion()(outputs_of(logits, boxes), targets)
    sum(losses[name] for name in ("loss_ce", "loss_bbox", "loss_giou", "loss_ce_0")).backward()
    assert losses["loss_bbox"] == 0 and losses["loss_giou"] == 0
    assert logits.grad.abs().sum() > 0 and not boxes.grad.any()


def test_half_precision_outputs_are_compared_in_float32():
    logits, boxes, targets = matching_scene()
    losses = criterion()(outputs_of(logits.bfloat16(), boxes.bfloat16()), targets)
    assert all(value.dtype == torch.float32 for value in losses.values())


def test_one_copy_to_the_cpu_for_six_layers(monkeypatch):
    copies = []
    for name in ("cpu", "item", "tolist", "numpy", "__bool__", "__float__", "__int__"):
        original = getattr(torch.Tensor, name)

        def watched(self, *args, _name=name, _original=original, **kwargs):
            if not (_name == "numpy" and copies and copies[-1] == "cpu"):
                copies.append(_name)
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, watched)
    logits, boxes, targets = matching_scene(layers=6)
    criterion()(outputs_of(logits, boxes), targets)
    assert copies == ["cpu"]


def test_get_loss_unknown_name_is_refused_with_the_known_ones():
    logits, boxes, targets = matching_scene()
    with pytest.raises(ValueError, match="no loss 'colour': choose from .*boxes.*labels"):
        criterion(["labels", "colour"])(outputs_of(logits, boxes), targets)


def test_loss_weights_repeat_for_earlier_layers_except_masks():
    weights = {"labels": {"loss_ce": 1}, "cardinality": {}, "masks": {"loss_mask": 2}}
    assert loss_weights(weights, 3) == {"loss_ce": 1, "loss_mask": 2, "loss_ce_0": 1, "loss_ce_1": 1}
    assert loss_weights(weights, 1) == {"loss_ce": 1, "loss_mask": 2}


class Extended(SetCriterion):
    """One loss overridden and one added, in the reference's extension API."""

    def loss_boxes(self, outputs, targets, indices, num_boxes):
        return {"loss_bbox": outputs["pred_boxes"].sum() * 0 + 1}

    def loss_sizes(self, outputs, targets, indices, num_boxes):
        return {"loss_size": outputs["pred_boxes"][self._get_src_permutation_idx(indices)][:, 2:].sum() / num_boxes}


def test_criterion_subclass_losses_are_called_for_every_layer():
    logits, boxes, targets = matching_scene(sizes=(1, 2), layers=3)
    matcher = HungarianMatcher(1, 5, 2)
    losses = Extended(CLASSES, matcher, {}, 0.1, ["boxes", "sizes"])(outputs_of(logits, boxes), targets)
    for suffix, layer in (("", 2), ("_0", 0), ("_1", 1)):
        assert losses[f"loss_bbox{suffix}"] == 1
        pairs = matcher(layers_of(logits, boxes)[layer], targets)
        expected = sum(boxes[layer, i, queries, 2:].sum() for i, (queries, _) in enumerate(pairs)) / 3
        torch.testing.assert_close(losses[f"loss_size{suffix}"], expected)


@pytest.mark.parametrize("name", ["loss_boxes", "get_loss", "_get_src_permutation_idx"])
def test_criterion_method_overridden_on_the_instance_is_used(name):
    logits, boxes, targets = matching_scene(sizes=(1, 2), layers=3)
    one, calls = criterion(["boxes"]), []
    original = getattr(one, name)

    def watched(*args, **kwargs):
        calls.append(name)
        return original(*args, **kwargs)

    setattr(one, name, watched)
    one(outputs_of(logits, boxes), targets)
    assert len(calls) == 3


class Last(HungarianMatcher):
    """Always query 4, whatever it predicts; lists instead of tensors."""

    def forward(self, outputs, targets):
        return [([4], [0]) for _ in targets]


def test_matcher_subclass_or_instance_override_is_used():
    logits, boxes, targets = matching_scene(sizes=(1, 1), layers=2)
    expected = boxes[:, :, 4, 2:].sum((1, 2)) / 2
    subclassed = Extended(CLASSES, Last(), {}, 0.1, ["sizes"])
    patched = Extended(CLASSES, HungarianMatcher(), {}, 0.1, ["sizes"])
    patched.matcher.forward = Last().forward
    replaced = Extended(CLASSES, HungarianMatcher(), {}, 0.1, ["sizes"])
    replaced.matcher = Last()
    for one in (subclassed, patched, replaced):
        losses = one(outputs_of(logits, boxes), targets)
        torch.testing.assert_close(torch.stack([losses["loss_size_0"], losses["loss_size"]]), expected)


def test_matcher_of_ones_own_gets_all_outputs_of_its_layer():
    class Picky(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.seen = []

        def forward(self, outputs, targets):
            self.seen.append(sorted(outputs))
            taken = len(self.seen) % 2  # other pairs, and another number of them, at each layer
            return [(torch.arange(taken), torch.arange(taken)) for _ in targets]

    logits, boxes, targets = matching_scene(sizes=(2, 1), layers=2)
    outputs = outputs_of(logits, boxes) | {"pred_extra": boxes[1]}
    losses = SetCriterion(CLASSES, Picky(), {}, 0.1, ["boxes"])
    values = losses(outputs, targets)
    assert losses.matcher.seen == [["pred_boxes", "pred_extra", "pred_logits"], ["pred_boxes", "pred_logits"]]
    assert values["loss_bbox"] > 0 and values["loss_bbox_0"] == 0


def test_an_image_without_objects_may_have_boxes_without_a_shape():
    logits, boxes, targets = matching_scene(sizes=(2, 0))
    expected = criterion()(outputs_of(logits, boxes), targets)
    targets[1]["boxes"] = torch.as_tensor([])
    torch.testing.assert_close(criterion()(outputs_of(logits, boxes), targets), expected)


def test_the_weights_of_matching_and_loss_are_the_flags():
    flags = "--set_cost_class 2 --set_cost_bbox 3 --set_cost_giou 4 --bbox_loss_coef 6 --giou_loss_coef 7"
    more = "--eos_coef 0.2 --masks --hidden_dim 128 --nheads 8 --mask_loss_coef 8 --dice_loss_coef 9"
    _, built, _ = build_model(parse(f"{flags} {more}"))
    matcher, weights = built.matcher, built.weight_dict
    assert (matcher.cost_class, matcher.cost_bbox, matcher.cost_giou) == (2, 3, 4)
    assert [weights[f"loss_{name}"] for name in ("ce", "bbox", "giou", "bbox_0", "mask", "dice")] == [1, 6, 7, 6, 8, 9]
    assert built.empty_weight.tolist() == [1] * 91 + [pytest.approx(0.2)]
