import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import datasets.transforms as T

DATA = Path(__file__).parent / "data"


def scene(height=40, width=60):
    image = torch.arange(3 * height * width).reshape(3, height, width).remainder(251).to(torch.uint8)
    target = {
        "boxes": torch.tensor([[5.0, 10, 25, 30], [30, 0, 60, 40], [40, 30, 50, 36]]),
        "labels": torch.tensor([1, 2, 3]),
        "area": torch.tensor([400.0, 1200, 60]),
        "iscrowd": torch.zeros(3, dtype=torch.int64),
        "masks": torch.zeros(3, height, width, dtype=torch.bool),
        "size": torch.tensor([height, width]),
        "note": "somebody's own",
    }
    for mask, (x0, y0, x1, y1) in zip(target["masks"], target["boxes"].int().tolist(), strict=True):
        mask[y0:y1, x0:x1] = True
    return image, target


def as_pil(image):
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def test_resize_rule_is_the_references_on_every_size():
    rows = json.loads((DATA / "resize_rule.json").read_text())
    assert len(rows) > 400
    for w, h, size, limit, out_h, out_w in rows:
        assert T.resized_size(h, w, size, limit) == (out_h, out_w), (w, h, size, limit)


def test_crop_drops_what_is_outside_and_clips_the_rest():
    image, before = scene()
    copy = {name: value.clone() if torch.is_tensor(value) else value for name, value in before.items()}
    cropped, after = T.crop(image, before, (5, 10, 20, 25))
    assert torch.equal(cropped, image[:, 5:25, 10:35])
    assert after["boxes"].tolist() == [[0, 5, 15, 20], [20, 0, 25, 20]]
    assert after["labels"].tolist() == [1, 2] and after["area"].tolist() == [225, 100]
    assert after["size"].tolist() == [20, 25] and after["masks"].shape == (2, 20, 25)
    assert after["note"] == "somebody's own"
    for name, value in copy.items():
        assert torch.equal(before[name], value) if torch.is_tensor(value) else before[name] == value


def test_hflip_mirrors_boxes_with_their_masks():
    image, target = scene()
    flipped, after = T.hflip(image, target)
    assert torch.equal(flipped, image.flip(-1))
    for mask, (x0, y0, x1, y1) in zip(after["masks"], after["boxes"].int().tolist(), strict=True):
        assert mask[y0:y1, x0:x1].all() and mask.sum() == (y1 - y0) * (x1 - x0)


def test_resize_scales_boxes_area_and_masks():
    image, target = scene()
    resized, after = T.resize(image, target, 80, 110)
    assert resized.shape == (3, 73, 109) and after["size"].tolist() == [73, 109]
    assert after["boxes"][0].tolist() == pytest.approx([5 * 109 / 60, 10 * 73 / 40, 25 * 109 / 60, 30 * 73 / 40])
    assert after["area"][0].item() == pytest.approx(400 * 109 / 60 * 73 / 40)
    assert after["masks"].shape == (3, 73, 109) and after["masks"].dtype == torch.bool
    assert T.resize(image, None, (30, 20))[0].shape == (3, 20, 30)


def test_pad_adds_at_the_right_and_bottom():
    image, target = scene()
    padded, after = T.pad(image, target, (7, 3))
    assert torch.equal(padded[:, :40, :60], image) and padded[:, 40:].sum() == padded[:, :, 60:].sum() == 0
    assert after["size"].tolist() == [43, 67] and after["masks"].shape == (3, 43, 67)
    assert torch.equal(after["boxes"], target["boxes"])


@pytest.mark.parametrize("operation", [
    lambda image, target: T.crop(image, target, (3, 4, 30, 50)),
    T.hflip,
    lambda image, target: T.resize(image, target, 71, 100),
    lambda image, target: T.pad(image, target, (5, 6)),
])  # fmt: skip
def test_pil_images_and_tensors_come_out_alike(operation):
    image, target = scene()
    tensor, a = operation(image, target)
    pil, b = operation(as_pil(image), target)
    assert np.abs(np.asarray(pil).astype(int) - tensor.permute(1, 2, 0).numpy().astype(int)).max() <= 1
    assert all(torch.equal(a[name], b[name]) for name in a if name != "note")


def test_normalize_makes_boxes_relative_and_shifts_pixels():
    image, target = T.ToTensor()(as_pil(scene()[0]), scene()[1])
    normalised, after = T.Normalize([0.5] * 3, [0.25] * 3)(image, target)
    torch.testing.assert_close(normalised, (image - 0.5) / 0.25)
    assert after["boxes"][0].tolist() == pytest.approx([15 / 60, 20 / 40, 20 / 60, 20 / 40])


def test_random_classes_stay_in_their_bounds():
    random.seed(0)
    image, target = scene()
    for _ in range(20):
        _, h, w = T.RandomSizeCrop(16, 50)(image, target)[0].shape
        assert 16 <= h <= 40 and 16 <= w <= 50
        assert T.RandomResize([20, 30], 50)(image, target)[0].shape[1] in (20, 30)
        assert T.RandomPad(8)(image, target)[0].shape[1] <= 48
    assert T.RandomCrop((8, 9))(image, target)[0].shape == (3, 8, 9)
    assert torch.equal(T.CenterCrop((20, 30))(image, target)[0], image[:, 10:30, 15:45])
    assert T.RandomHorizontalFlip(1.0)(image, target)[0][0, 0, 0] == image[0, 0, -1]
    first, second = (lambda i, t: ("first", t)), (lambda i, t: ("second", t))
    assert T.RandomSelect(first, second, p=1)(image, target)[0] == "first"
    assert T.RandomSelect(first, second, p=0)(image, target)[0] == "second"
    erased = T.RandomErasing(p=1)(image.float() + 1, target)[0]
    assert (erased == 0).any() and erased.shape == image.shape
    with pytest.raises(ValueError, match="100 x 100"):
        T.RandomCrop((100, 100))(image, target)


def test_resized_crop_enlarges_a_region_to_the_size_of_the_whole_image():
    random.seed(0)
    ramp = torch.arange(60.0).expand(3, 40, 60)  # a pixel's value is its column
    target = {"boxes": torch.tensor([[20.0, 10, 40, 30]]), "labels": torch.tensor([1])}
    whole, _ = T.resize(ramp, target, 80)
    widths = []
    for _ in range(200):
        image, found = T.RandomResizedCrop(0.6, 80)(ramp, target)
        assert image.shape == whole.shape == (3, 80, 120) and found["size"].tolist() == [80, 120]
        widths.append(float(image[0, 0, -1] - image[0, 0, 0]) / 59)
        x0, _, x1, _ = found["boxes"][0].tolist()
        if 0 < x0 < x1 < 120:  # the box still has its left and right edge, at columns 20 and 40
            edges = image[0, 0, [round(x0), round(x1) - 1]]
            assert edges.tolist() == pytest.approx([20, 39], abs=1)
    assert 0.55 < min(widths) < 0.65 and sum(width > 0.99 for width in widths) > 80
    assert torch.equal(T.RandomResizedCrop(0.6, 80, p=0)(ramp, None)[0], whole)
    pixel = torch.zeros(3, 1, 1)
    assert {T.RandomResizedCrop(0.1, 5, p=1)(pixel, None)[0].shape for _ in range(20)} == {(3, 5, 5)}


def test_an_image_smaller_than_the_crop_is_kept_whole():
    image, target = scene(10, 12)
    assert T.RandomSizeCrop(384, 600)(image, target)[0].shape == (3, 10, 12)


def test_one_pixel_survives():
    assert T.resize(torch.zeros(3, 1, 1, dtype=torch.uint8), None, 5)[0].shape == (3, 5, 5)
    assert T.resize(torch.zeros(3, 1, 4000, dtype=torch.uint8), None, 800, 1333)[0].shape == (3, 1, 1333)


def test_seeded_repeats_itself_and_leaves_the_generators_alone():
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    outside = draw()
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    with T.seeded(1, 2, 3):
        inside = draw()
    assert draw() == outside
    with T.seeded(1, 2, 3):
        assert draw() == inside
    with T.seeded(1, 2, 4):
        assert draw() != inside


def test_random_draws_differ():
    image = torch.arange(3 * 40 * 60).float().view(3, 40, 60)
    random.seed(0)
    crops = [T.RandomSizeCrop(8, 30)(image, None)[0] for _ in range(200)]
    assert {crop.shape[1] for crop in crops} == {crop.shape[2] for crop in crops} == set(range(8, 31))
    assert len({crop[0, 0, 0].item() for crop in crops}) > 150  # corners anywhere
    assert {T.RandomResize([20, 30])(image, None)[0].shape[1] for _ in range(20)} == {20, 30}
    padded = {T.RandomPad(3)(image, None)[0].shape[1:] for _ in range(200)}
    assert padded == {(40 + rows, 60 + columns) for rows in range(4) for columns in range(4)}
    first = sum(T.RandomSelect(lambda *_: (1, 0), lambda *_: (0, 0))(0, 0)[0] for _ in range(4000))
    assert first == pytest.approx(2000, abs=150)


def test_objects_whose_mask_leaves_the_crop_are_dropped_without_boxes_too():
    masks = torch.zeros(2, 10, 10, dtype=torch.bool)
    masks[0, :3, :3] = masks[1, 7:, 7:] = True
    _, after = T.crop(torch.zeros(3, 10, 10), {"masks": masks, "labels": torch.tensor([1, 2])}, (0, 0, 5, 5))
    assert after["labels"].tolist() == [1] and len(after["masks"]) == 1


def test_a_crop_larger_than_the_image_is_refused():
    for transform in (T.CenterCrop((12, 8)), T.RandomCrop((12, 8))):
        with pytest.raises(ValueError, match="12 x 8 .* out of 10 x 10"):
            transform(torch.zeros(3, 10, 10), None)


def test_bytes_become_the_floats_that_pil_images_become():
    pixels = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)
    from_pil, _ = T.ToTensor()(Image.fromarray(pixels), None)
    from_bytes, _ = T.ToTensor()(torch.from_numpy(pixels).permute(2, 0, 1), None)
    assert type(from_pil) is torch.Tensor and torch.equal(from_pil, from_bytes)
    assert torch.equal(from_pil, torch.from_numpy(pixels).permute(2, 0, 1) / 255)
