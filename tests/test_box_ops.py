import pytest
import torch

from util import box_ops


def test_conventions_turn_into_each_other():
    boxes = torch.tensor([[10.0, 20.0, 4.0, 6.0]])
    assert box_ops.box_cxcywh_to_xyxy(boxes).tolist() == [[8, 17, 12, 23]]
    assert box_ops.box_xyxy_to_cxcywh(box_ops.box_cxcywh_to_xyxy(boxes)).tolist() == boxes.tolist()


def test_iou_and_giou_of_boxes_worked_out_by_hand():
    a = torch.tensor([[0.0, 0, 2, 2]])
    b = torch.tensor([[0.0, 0, 2, 2], [1, 1, 3, 3], [4, 0, 6, 2]])
    iou, union = box_ops.box_iou(a, b)
    assert iou.tolist()[0] == pytest.approx([1, 1 / 7, 0])
    assert union.tolist()[0] == pytest.approx([4, 7, 8])
    # enclosing boxes: 4, 9, 12
    assert box_ops.generalized_box_iou(a, b).tolist()[0] == pytest.approx([1, 1 / 7 - 2 / 9, -4 / 12])


def test_pairs_agree_with_torchvision():
    from torchvision import ops

    corners = torch.rand(2, 5, 2, generator=torch.Generator().manual_seed(0))
    a = torch.cat([corners[0], corners[0] + 0.1 + corners[1]], 1)
    b = a.flip(0) * 0.7
    torch.testing.assert_close(box_ops.generalized_box_iou(a, b), ops.generalized_box_iou(a, b))
    diagonal = box_ops.elementwise_giou(a, b)
    torch.testing.assert_close(diagonal, box_ops.generalized_box_iou(a, b).diagonal())


def test_masks_to_boxes_with_an_empty_mask_and_one_pixel():
    masks = torch.zeros(3, 6, 8, dtype=torch.bool)
    masks[0, 2:5, 1:4] = True
    masks[1, 3, 7] = True
    assert box_ops.masks_to_boxes(masks).tolist() == [[1, 2, 3, 4], [7, 3, 7, 3], [0, 0, 0, 0]]
    assert box_ops.masks_to_boxes(masks[:0]).shape == (0, 4)
