import pytest
import torch

from util.nested_tensor import NestedTensor, collate_fn, nested_tensor_from_tensor_list


def test_images_are_padded_at_the_right_and_bottom():
    images = [torch.ones(3, 4, 6), torch.ones(3, 5, 2)]
    tensors, mask = nested_tensor_from_tensor_list(images).decompose()
    assert tensors.shape == (2, 3, 5, 6)
    assert tensors[0].sum() == 3 * 4 * 6 and tensors[0, :, 4].sum() == 0
    assert mask[0, :4].sum() == 0 and mask[0, 4].all()
    assert (~mask[1]).nonzero().max(0).values.tolist() == [4, 1]


def test_a_batch_needs_no_padding_and_keeps_its_type():
    batch = torch.zeros(2, 3, 4, 5, dtype=torch.uint8)
    nested = nested_tensor_from_tensor_list(batch)
    assert nested.tensors is batch and not nested.mask.any()


@pytest.mark.parametrize("wrong", [
    [torch.zeros(4, 5)], torch.zeros(3, 4, 5), [torch.zeros(3, 4, 5), torch.zeros(1, 4, 5)],
    [torch.zeros(3, 4, 5), torch.zeros(3, 4, 5, dtype=torch.uint8)],
])  # fmt: skip
def test_other_images_are_refused(wrong):
    with pytest.raises(ValueError, match="C, H, W"):
        nested_tensor_from_tensor_list(wrong)


def test_channels_are_innermost_and_gradients_pass():
    images = [torch.ones(3, 2, 2, requires_grad=True), torch.ones(3, 1, 3)]
    tensors, _ = nested_tensor_from_tensor_list(images).decompose()
    assert tensors.is_contiguous(memory_format=torch.channels_last)
    tensors.sum().backward()
    assert images[0].grad.sum() == 3 * 2 * 2


def test_collate_and_move():
    samples, targets = collate_fn([(torch.ones(3, 2, 2), {"a": 1}), (torch.ones(3, 1, 3), {"a": 2})])
    assert samples.to(torch.device("cpu")).tensors.shape == (2, 3, 2, 3)
    assert targets == ({"a": 1}, {"a": 2})
    assert NestedTensor(torch.ones(1), None).to(torch.device("cpu")).mask is None
