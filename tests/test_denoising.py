"""Denoising queries: what they are, what they may see, their losses, and that the network is unchanged."""

import pytest
import torch

from models import build_model
from models.denoising import DenoisingQueries
from models.training import TrainingCriterion, TrainingDETR
from tests.helpers import parse
from util.nested_tensor import nested_tensor_from_tensor_list

BATCH = nested_tensor_from_tensor_list([torch.rand(3, 64, 80), torch.rand(3, 48, 96)])


def objects(*counts):
    generator = torch.Generator().manual_seed(0)
    return [
        {"labels": torch.randint(0, 5, (n,), generator=generator),
         "boxes": torch.rand(n, 4, generator=generator) * 0.3 + 0.3}
        for n in counts
    ]  # fmt: skip


def build(groups=3, **noise):
    torch.manual_seed(0)
    model, criterion, _ = build_model(parse("--num_classes 5 --dropout 0"))
    queries = DenoisingQueries(model.transformer.d_model, 5, groups, **noise)
    return TrainingDETR(model, queries), TrainingCriterion(criterion, groups)


def test_denoising_object_queries_answer_as_without_it():
    wrapped, _ = build()
    outputs = wrapped(BATCH, objects(2, 3))
    plain = wrapped.detr(BATCH)
    for name in ("pred_logits", "pred_boxes"):
        torch.testing.assert_close(outputs[name], plain[name])
        torch.testing.assert_close(outputs["aux_outputs"][0][name], plain["aux_outputs"][0][name])


def test_denoising_groups_do_not_see_each_other():
    wrapped, _ = build(groups=2)
    wrapped.eval()
    targets = objects(2, 2)
    torch.manual_seed(1)
    labels, boxes = wrapped.queries.noised(targets)
    wrapped.queries.noised = lambda _: (labels, boxes)
    before = wrapped(BATCH, targets)["denoising"]["pred_boxes"]
    boxes[:, 4:] += 0.2  # the second group
    after = wrapped(BATCH, targets)["denoising"]["pred_boxes"]
    torch.testing.assert_close(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4:], after[:, 4:])


def corners(boxes):
    return torch.cat([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], -1)


def test_noised_boxes_stay_within_the_noise_and_negatives_lie_beyond_it():
    wrapped, _ = build(groups=50, box_noise=0.4, label_noise=0.0)
    targets = objects(2, 2)
    for target in targets:
        target["boxes"][:, 2:] = torch.tensor([0.2, 0.3])  # so that no shifted corner leaves the image
    labels, boxes = wrapped.queries.noised(targets)
    assert labels.shape == (2, 50 * 2 * 2) and boxes.min() >= 0 and boxes.max() <= 1
    wanted = torch.stack([target["boxes"] for target in targets])
    shift = (corners(boxes).view(2, 50, 2, 2, 4) - corners(wanted)[:, None, None]).abs()
    share = shift / torch.tensor([0.1, 0.15, 0.1, 0.15])
    positive, negative = share[:, :, 0], share[:, :, 1]
    assert positive.max() <= 0.4 + 1e-5 and 0.4 - 1e-5 <= negative.min() and negative.max() <= 0.8 + 1e-5
    assert torch.equal(labels.view(2, 100, 2), torch.stack([t["labels"] for t in targets])[:, None].expand(-1, 100, -1))


def test_denoising_loss_of_perfect_answers_is_zero_and_of_swapped_ones_is_not():
    _, criterion = build(groups=2)
    targets = objects(2, 1)
    logits = torch.full((2, 8, 6), -20.0)
    boxes = torch.rand(2, 8, 4) * 0.2 + 0.4
    logits[..., 5] = 20  # "no object"
    for i, target in enumerate(targets):
        for first in (0, 4):  # two objects and two negatives in each of two groups
            for k, (label, box) in enumerate(zip(target["labels"], target["boxes"], strict=True)):
                logits[i, first + k, 5], logits[i, first + k, label], boxes[i, first + k] = -20, 20, box
    plain = {"pred_logits": torch.zeros(2, 8, 6), "pred_boxes": torch.full((2, 8, 4), 0.5)}
    layer = {"pred_logits": logits, "pred_boxes": boxes}
    losses = criterion({**plain, "denoising": {**layer, "aux_outputs": [layer]}}, targets)
    for name in ("dn_loss_ce", "dn_loss_bbox", "dn_loss_giou", "dn_loss_bbox_0"):
        assert losses[name].item() == pytest.approx(0, abs=1e-5), name
    layer["pred_boxes"] = boxes.flip(1)
    assert criterion({**plain, "denoising": layer}, targets)["dn_loss_bbox"] > 0.1
    assert criterion.weight_dict["dn_loss_bbox_0"] == 5 and criterion.weight_dict["loss_bbox_0"] == 5


@pytest.mark.parametrize("counts", [(0, 0), (0, 3)])
def test_denoising_without_objects_reaches_every_parameter(counts):
    """Otherwise DistributedDataParallel waits for gradients that never come."""
    wrapped, criterion = build()
    losses = criterion(wrapped.train()(BATCH, objects(*counts)), objects(*counts))
    sum(losses[name] * weight for name, weight in criterion.weight_dict.items()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in wrapped.parameters() if p.requires_grad)
    assert wrapped.queries.box_embed.weight.grad.any()


def test_denoising_criterion_in_evaluation_gives_the_networks_losses_only():
    wrapped, criterion = build()
    losses = criterion(wrapped.detr(BATCH), objects(2, 3))
    assert not any(name.startswith("dn_") for name in losses) and "loss_ce_0" in losses
