"""A batch of images of different sizes: one padded tensor, and a mask that is True on the padding."""

from typing import Optional

import torch
from torch import Tensor


class NestedTensor:
    """Images [B, C, H, W] padded at the right and bottom, and their mask [B, H, W] (True = padding).

    Feature maps travel through the backbone in the same form. TorchScript compiles this class.
    """

    def __init__(self, tensors: Tensor, mask: Tensor | None):
        self.tensors = tensors
        self.mask = mask

    def to(self, device: torch.device, non_blocking: bool = False) -> "NestedTensor":
        """Copy both tensors to a device."""
        mask = self.mask
        if mask is not None:
            mask = mask.to(device, non_blocking=non_blocking)
        return NestedTensor(self.tensors.to(device, non_blocking=non_blocking), mask)

    def pin_memory(self) -> "NestedTensor":
        """Copy both tensors to page-locked memory (a DataLoader with `pin_memory=True` calls this)."""
        mask = self.mask
        if mask is not None:
            mask = mask.pin_memory()
        return NestedTensor(self.tensors.pin_memory(), mask)

    def decompose(self) -> tuple[Tensor, Optional[Tensor]]:  # noqa: UP045  (TorchScript cannot read `|` inside a tuple)
        """Return the pair (tensors, mask)."""
        return self.tensors, self.mask

    def __repr__(self) -> str:
        return f"NestedTensor({self.tensors.shape})"


def nested_tensor_from_tensor_list(tensor_list: list[Tensor]) -> NestedTensor:
    """Pad images [C, h, w] with zeros to their common height and width.

    Takes a list of 3-D tensors, or (outside TorchScript) a 4-D tensor, whose images need no padding.
    Raises ValueError if there is no image, or one is not 3-D, or unlike the others in channels or dtype.
    """
    if not torch.jit.is_scripting():
        if isinstance(tensor_list, Tensor):
            images = tensor_list
            if images.ndim != 4:
                raise ValueError(f"expected a batch [B, C, H, W] or a list of [C, H, W], got {list(images.shape)}")
            mask = torch.zeros(
                (images.shape[0], images.shape[2], images.shape[3]), dtype=torch.bool, device=images.device
            )
            return NestedTensor(images, mask)
    if len(tensor_list) == 0:
        raise ValueError("a batch needs at least one image, the list is empty")
    first, height, width = tensor_list[0], 0, 0
    for image in tensor_list:
        if image.dim() != 3 or image.shape[0] != first.shape[0] or image.dtype != first.dtype:
            raise ValueError(
                f"expected images [C, H, W] of one C and dtype, got {first.shape}, {first.dtype} and "
                f"{image.shape}, {image.dtype}"
            )
        height, width = max(height, image.shape[1]), max(width, image.shape[2])
    size, device = [len(tensor_list), first.shape[0], height, width], first.device
    # Channels last is the layout of decoded images, so whole rows are copied, and the one that convolutions need.
    padded = torch.empty(size, dtype=first.dtype, device=device, memory_format=torch.channels_last).zero_()
    mask = torch.ones([size[0], height, width], dtype=torch.bool, device=device)
    for i, image in enumerate(tensor_list):
        padded[i, :, : image.shape[1], : image.shape[2]].copy_(image)
        mask[i, : image.shape[1], : image.shape[2]] = False
    return NestedTensor(padded, mask)


def collate_fn(batch: list) -> tuple:
    """Turn a list of (image, target) into (NestedTensor, tuple of targets), as DataLoader wants it."""
    images, targets = zip(*batch, strict=True)
    return nested_tensor_from_tensor_list(list(images)), targets
