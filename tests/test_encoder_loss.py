"""The loss on the encoder's output: which cell predicts which object, its values, and that the network is unchanged."""

import pytest
import torch

from models import build_model
from models.encoder_loss import IGNORED, cell_targets, encoder_losses
from models.training import TrainingCriterion, TrainingDETR
from tests.helpers import parse
from util.nested_tensor import nested_tensor_from_tensor_list

NO_PADDING = torch.zeros(1, 4, 8, dtype=torch.bool)  # cells of 1/8 x 1/4 of the image


def target(*objects):
    return {
        "labels": torch.tensor([label for label, _ in objects], dtype=torch.int64),
        "boxes": torch.tensor([box for _, box in objects]).reshape(-1, 4),
    }


def build():
    torch.manual_seed(0)
    model, criterion, _ = build_model(parse("--num_classes 5 --dropout 0"))
    return TrainingDETR(model, encoder_loss=True), TrainingCriterion(criterion, encoder_loss_coef=0.5)


def test_cell_targets_are_the_cells_in_the_middle_half_of_a_box():
    labels, boxes = cell_targets(NO_PADDING, [target((2, [0.5, 0.5, 0.5, 1.0]))], 5)
    wanted = torch.full((4, 8), 5)
    wanted[1:3, 3:5] = 2  # x in 0.375..0.625, y in 0.25..0.75
    assert torch.equal(labels.view(4, 8), wanted)
    assert torch.equal(boxes[labels == 2], torch.tensor([[0.5, 0.5, 0.5, 1.0]]).expand(4, 4))


def test_cell_targets_give_a_small_object_the_cell_it_lies_in():
    labels, _ = cell_targets(NO_PADDING, [target((1, [0.20, 0.30, 0.01, 0.01]))], 5)
    assert labels.view(4, 8)[1, 1] == 1 and (labels != 5).sum() == 1


def test_cell_targets_give_a_shared_cell_to_the_nearer_object_by_its_size():
    large, small = (1, [0.5, 0.5, 1.0, 1.0]), (3, [0.45, 0.4, 0.2, 0.2])
    for objects in ([large, small], [small, large]):
        labels, _ = cell_targets(NO_PADDING, [target(*objects)], 5)
        assert labels.view(4, 8)[1, 3] == 3 and (labels == 3).sum() == 1 and (labels == 1).sum() == 7


def test_cell_targets_count_places_without_the_padding():
    padding = torch.ones(2, 4, 8, dtype=torch.bool)
    padding[0, :2, :4] = False
    padding[1, :, :] = False
    labels, _ = cell_targets(padding, [target((0, [0.25, 0.25, 0.5, 0.5]))] * 2, 5)
    first, second = labels.view(2, 4, 8)
    assert (first[padding[0]] == IGNORED).all() and (first == 0).nonzero().tolist() == [[0, 0], [0, 1]]
    assert (second == 0).nonzero().tolist() == [[0, 1], [0, 2], [1, 1], [1, 2]]


def test_encoder_losses_are_zero_for_perfect_cells_only():
    criterion = build()[1].criterion
    labels, boxes = cell_targets(NO_PADDING, targets := [target((2, [0.5, 0.5, 0.5, 1.0]))], 5)
    logits = torch.nn.functional.one_hot(labels, 6) * 40.0
    outputs = {"pred_logits": logits, "pred_boxes": boxes.clone(), "padding": NO_PADDING}
    assert all(value < 1e-5 for value in encoder_losses(criterion, outputs, targets).values())
    outputs["pred_boxes"][labels == 2] += torch.tensor([0.1, 0, 0, 0])
    assert encoder_losses(criterion, outputs, targets)["loss_bbox"].item() == pytest.approx(0.1)
    outputs["pred_logits"] = logits.roll(1, dims=1)
    assert encoder_losses(criterion, outputs, targets)["loss_ce"] > 1


def test_encoder_losses_leave_out_the_padding_and_no_class():
    criterion = build()[1].criterion
    padding = NO_PADDING.clone()
    padding[:, :, 4:] = True
    targets = [target((0, [0.5, 0.5, 0.5, 1.0]))]
    outputs = {"pred_logits": torch.randn(1, 32, 6), "pred_boxes": torch.rand(1, 32, 4), "padding": padding}
    before = encoder_losses(criterion, outputs, targets)
    outputs["pred_logits"][padding.flatten(1)] += torch.randn(6)
    outputs["pred_boxes"][padding.flatten(1)] = 0.9
    assert encoder_losses(criterion, outputs, targets) == before
    outputs["pred_logits"][:, :, 0] += 1
    assert encoder_losses(criterion, outputs, targets)["loss_ce"] != before["loss_ce"]
    only_object = outputs["pred_logits"].clone()
    only_object[cell_targets(padding, targets, 5)[0] == 0] = torch.tensor([9.0, 0, 0, 0, 0, 0])
    after = encoder_losses(criterion, outputs | {"pred_logits": only_object}, targets)
    assert after["loss_ce"] < encoder_losses(criterion, outputs, targets)["loss_ce"]


def test_encoder_loss_leaves_the_networks_outputs_and_parameters_as_they_are():
    wrapped, criterion = build()
    samples = nested_tensor_from_tensor_list([torch.rand(3, 64, 80), torch.rand(3, 48, 96)])
    targets = [target((1, [0.5, 0.5, 0.2, 0.2])), target()]
    outputs = wrapped(samples, targets)
    torch.testing.assert_close(outputs["pred_boxes"], wrapped.detr(samples)["pred_boxes"])
    assert {name.removeprefix("detr.") for name in wrapped.state_dict()} == set(wrapped.detr.state_dict())
    assert outputs["encoder"]["pred_boxes"].shape == (2, outputs["encoder"]["padding"][0].numel(), 4)
    losses = criterion(outputs, targets)
    assert {"enc_loss_ce", "enc_loss_bbox", "enc_loss_giou"} <= set(losses) & set(criterion.weight_dict)
    assert criterion.weight_dict["enc_loss_bbox"] == 2.5 and criterion.weight_dict["loss_bbox"] == 5
    assert not any(name.startswith("enc_") for name in criterion(wrapped.detr(samples), targets))


def test_encoder_loss_without_objects_reaches_every_parameter():
    """Otherwise DistributedDataParallel waits for gradients that never come."""
    wrapped, criterion = build()
    losses = criterion(wrapped.train()(nested_tensor_from_tensor_list([torch.rand(3, 64, 64)]), [target()]), [target()])
    sum(losses[name] * weight for name, weight in criterion.weight_dict.items()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in wrapped.parameters() if p.requires_grad)
