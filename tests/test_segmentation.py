"""The mask head, its losses, and the two kinds of post-processing."""

import io
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from models import build_model
from models.criterion import SetCriterion
from models.panoptic import PostProcessPanoptic
from models.segmentation import (
    DETRsegm,
    MaskHeadSmallConv,
    MHAttentionMap,
    PostProcessSegm,
    dice_loss,
    sigmoid_focal_loss,
)
from tests.helpers import parse
from util.nested_tensor import nested_tensor_from_tensor_list

SMALL = "--masks --num_classes 5 --hidden_dim 128 --nheads 8 --dropout 0"
IMAGES = [torch.rand(3, 64, 96), torch.rand(3, 80, 70)]  # of different sizes: both are padded


def build(flags="", **new):
    torch.manual_seed(0)
    args = parse(f"{SMALL} {flags}")
    vars(args).update(new)
    return build_model(args)


def target(labels, height, width, masks=None):
    n = len(labels)
    generator = torch.Generator().manual_seed(n)
    boxes = 0.2 + 0.4 * torch.rand(n, 4, generator=generator)
    masks = torch.rand(n, height, width, generator=generator) > 0.5 if masks is None else masks
    return {"labels": torch.tensor(labels, dtype=torch.int64), "boxes": boxes, "masks": masks}


def gradients(model, criterion, outputs, targets):
    model.zero_grad()
    losses = criterion(outputs, targets)
    sum(losses[name] * weight for name, weight in criterion.weight_dict.items()).backward()
    return losses, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def draw_all(outputs):
    batch, queries = outputs["pred_logits"].shape[:2]
    image, query = torch.arange(batch).repeat_interleave(queries), torch.arange(queries).repeat(batch)
    return outputs["masks_of"](image, query).unflatten(0, (batch, queries))


@pytest.mark.parametrize("flags", ["--backbone resnet50", "--backbone resnet50 --dilation", "--backbone resnet101"])
def test_the_head_has_the_published_names_and_shapes_beside_its_detector(flags):
    model = build_model(parse(f"--masks --dataset_file coco_panoptic --hidden_dim 256 --nheads 8 {flags}"))[0]
    own = {name: "x".join(map(str, value.shape)) for name, value in model.state_dict().items()}
    head = [f"{name} {shape}" for name, shape in own.items() if not name.startswith("detr.")]
    published = (Path(__file__).parent / "data" / "mask_head.txt").read_text().splitlines()[1:]
    assert head == published
    assert own["detr.class_embed.weight"] == "251x256"


def test_evaluation_draws_every_query_and_training_the_same_on_request():
    model, _, _ = build()
    with torch.no_grad():
        masks = model.eval()(IMAGES)["pred_masks"]
        asked = model.train()(IMAGES)
    assert masks.shape == (2, 8, 20, 24) and "pred_masks" not in asked
    torch.testing.assert_close(draw_all(asked), masks, rtol=1e-4, atol=1e-5)
    some = asked["masks_of"](torch.tensor([1, 0, 1]), torch.tensor([5, 2, 0]))
    torch.testing.assert_close(some, masks[[1, 0, 1], [5, 2, 0]], rtol=1e-4, atol=1e-5)


def test_drawing_only_matched_queries_gives_the_loss_and_gradients_of_drawing_all():
    model, criterion, _ = build()
    targets = [target([1, 4, 2], 64, 96), target([3], 80, 70)]
    few, few_gradients = gradients(model, criterion, model(IMAGES), targets)
    outputs = model(IMAGES)
    outputs["pred_masks"] = draw_all(outputs)
    del outputs["masks_of"]
    every, every_gradients = gradients(model, criterion, outputs, targets)
    assert few.keys() == every.keys() and {"loss_mask", "loss_dice"} <= few.keys()
    for name in few:
        torch.testing.assert_close(few[name], every[name], rtol=1e-5, atol=1e-6)
    assert few_gradients.keys() == every_gradients.keys()
    for name in few_gradients:
        torch.testing.assert_close(few_gradients[name], every_gradients[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("labels", [[[], []], [[], [2]]])
def test_images_without_objects_train_and_reach_every_parameter(labels):
    model, criterion, _ = build()
    targets = [target(labels[0], 64, 96), target(labels[1], 80, 70)]
    losses, reached = gradients(model, criterion, model(IMAGES), targets)
    assert torch.isfinite(torch.stack(list(losses.values()))).all()
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert reached.keys() == trainable
    if not labels[1]:
        assert losses["loss_mask"] == 0 and losses["loss_dice"] == 0
        assert all(not reached[name].any() for name in reached if name.startswith("mask_head"))


def test_one_query_and_masks_of_one_pixel_train():
    model, criterion, _ = build("--num_queries 1")
    dot = torch.zeros(2, 64, 96, dtype=torch.bool)
    dot[:, 3, 5] = True  # the same pixel for both: they overlap wholly
    losses, _ = gradients(model, criterion, model(IMAGES[:1]), [target([1, 2], 64, 96, dot)])
    assert torch.isfinite(torch.stack(list(losses.values()))).all() and losses["loss_dice"] > 0


def test_targets_are_padded_to_the_largest_and_need_masks():
    _, criterion, _ = build()
    logits, boxes = torch.randn(2, 8, 6), torch.rand(2, 8, 4) / 4 + 0.3
    masks = torch.full((2, 8, 20, 24), -9.0)
    targets = [target([1], 64, 96, torch.zeros(1, 64, 96, dtype=torch.bool)), target([2], 80, 70)]
    outputs = {"pred_logits": logits, "pred_boxes": boxes, "pred_masks": masks}
    losses = criterion(outputs, targets)
    share = targets[1]["masks"].sum() / (80 * 96)  # of the padded area, to be found missing
    expected = 0.25 * (9 * share + 0) / 2  # -log(sigmoid(-9)) is 9, and (1 - p)^2 is 1
    torch.testing.assert_close(losses["loss_mask"], expected, rtol=1e-2, atol=1e-4)
    with pytest.raises(ValueError, match="'masks'.*every target"):
        criterion(outputs, [{k: v for k, v in t.items() if k != "masks"} for t in targets])


def test_each_mask_is_held_against_its_own_object():
    _, criterion, _ = build()
    torch.manual_seed(1)
    outputs = {"pred_logits": torch.randn(2, 8, 6), "pred_boxes": torch.rand(2, 8, 4) / 4 + 0.3}
    outputs["pred_masks"] = torch.randn(2, 8, 20, 24)
    earlier = {"pred_logits": torch.randn(2, 8, 6), "pred_boxes": torch.rand(2, 8, 4) / 4 + 0.3}  # matches otherwise
    targets = [target([1, 4, 2], 80, 96), target([3, 0], 80, 96)]
    losses = criterion({**outputs, "aux_outputs": [earlier]}, targets)
    focal = dice = 0.0
    for i, (queries, objects) in enumerate(criterion.matcher(outputs, targets)):
        for query, k in zip(queries, objects, strict=True):
            mask = nn.functional.interpolate(outputs["pred_masks"][i, query][None, None], (80, 96), mode="bilinear")
            wanted = targets[i]["masks"][k].float().reshape(1, -1)
            focal += sigmoid_focal_loss(mask.reshape(1, -1), wanted, 5)
            dice += dice_loss(mask.reshape(1, -1), wanted, 5)
    torch.testing.assert_close(losses["loss_mask"], focal, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(losses["loss_dice"], dice, rtol=1e-5, atol=1e-7)


def test_a_frozen_detector_neither_learns_nor_moves():
    model, criterion, _ = build("--frozen_weights somewhere --backbone_norm batch --dropout 0.5")
    model.train()
    before = {name: value.clone() for name, value in model.detr.state_dict().items()}
    first, second = model(IMAGES), model(IMAGES)
    assert torch.equal(first["pred_boxes"], second["pred_boxes"])  # no dropout
    _, reached = gradients(model, criterion, second, [target([1], 64, 96), target([2, 3], 80, 70)])
    assert reached.keys() == {name for name, _ in model.named_parameters() if not name.startswith("detr.")}
    assert all(torch.equal(value, before[name]) for name, value in model.detr.state_dict().items())
    assert model.mask_head.training and not model.eval().mask_head.training


def test_masks_run_in_the_models_precision_and_come_back_in_float32():
    model, _, _ = build()
    seen = []
    model.mask_head.out_lay.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model.train()(IMAGES)
    masks = outputs["masks_of"](torch.tensor([0]), torch.tensor([3]))
    assert masks.dtype == torch.float32 and seen == [torch.bfloat16]


def test_torchscript_gives_the_same():
    model = build()[0].eval()
    batch = nested_tensor_from_tensor_list(IMAGES)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(model)
    with torch.no_grad():
        expected, found = model(batch), scripted(batch)
    for name in ("pred_logits", "pred_boxes", "pred_masks"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)


def test_attention_shares_one_over_heads_and_cells_and_none_with_padding():
    torch.manual_seed(0)
    attention = MHAttentionMap(16, 16, 4)
    q, k, mask = torch.randn(2, 3, 16), torch.randn(2, 16, 5, 6), torch.zeros(2, 5, 6, dtype=torch.bool)
    mask[1, :, 4:] = True
    maps = attention(q, k, mask)
    assert maps.shape == (2, 3, 4, 5, 6)
    torch.testing.assert_close(maps.sum((2, 3, 4)), torch.ones(2, 3))
    assert not maps[1, :, :, :, 4:].any() and maps[0].all()
    # one head, by hand
    queries, keys = attention.q_linear(q)[0, 1, 4:8], attention.k_linear(k[0].flatten(1).T)[:, 4:8]
    scores = keys @ queries / 2
    torch.testing.assert_close(maps[0, 1, 1].flatten() / maps[0, 1, 1].sum(), scores.softmax(0))


def test_the_head_is_one_convolution_of_features_and_maps_side_by_side():
    torch.manual_seed(0)
    head = MaskHeadSmallConv(136, [32, 16, 8], 128)
    x, maps = torch.randn(2, 128, 3, 4), torch.rand(2, 5, 8, 3, 4)
    fpns = [torch.randn(2, 32, 6, 8), torch.randn(2, 16, 12, 16), torch.randn(2, 8, 24, 31)]
    image = torch.arange(2).repeat_interleave(5)
    y = head.gn1(head.lay1(torch.cat([x[image], maps.flatten(0, 1)], 1))).relu()
    y = head.gn2(head.lay2(y)).relu()
    for adapter, fpn, lay, gn in zip(
        (head.adapter1, head.adapter2, head.adapter3), fpns, (head.lay3, head.lay4, head.lay5),
        (head.gn3, head.gn4, head.gn5), strict=True,
    ):  # fmt: skip
        y = adapter(fpn)[image] + nn.functional.interpolate(y, size=fpn.shape[-2:], mode="nearest")
        y = gn(lay(y)).relu()
    torch.testing.assert_close(head(x, maps, fpns), head.out_lay(y), rtol=1e-4, atol=1e-4)


def test_widths_that_cannot_be_grouped_are_refused():
    with pytest.raises(ValueError, match="multiple of 128.*width of 64"):
        MaskHeadSmallConv(72, [32, 16, 8], 64)
    with pytest.raises(ValueError, match="cannot be split into 3 heads"):
        MHAttentionMap(16, 16, 3)


def test_losses_by_hand():
    logits, wanted = torch.tensor([[0.0, 2.0], [-1.0, 3.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    p = logits.sigmoid()
    right = torch.where(wanted > 0, p, 1 - p)
    focal = torch.where(wanted > 0, 0.25, 0.75) * (1 - right) ** 2 * -right.log()
    torch.testing.assert_close(sigmoid_focal_loss(logits, wanted, 3), focal.mean(1).sum() / 3)
    torch.testing.assert_close(sigmoid_focal_loss(logits, wanted, 1, alpha=-1, gamma=0), -right.log().mean(1).sum())
    dice = 1 - (2 * (p * wanted).sum(1) + 1) / (p.sum(1) + wanted.sum(1) + 1)
    torch.testing.assert_close(dice_loss(logits, wanted, 2), dice.sum() / 2)
    assert dice_loss(torch.full((1, 4), -99.0), torch.zeros(1, 4), 1) == 0  # nothing for nothing is perfect


def test_instance_masks_leave_the_padding_and_reach_the_original_size():
    masks = torch.full((2, 20, 8, 8), -5.0)  # a batch padded to 32 x 32
    masks[0, :, :4] = 5.0
    masks[1, 3, :, :2] = 5.0  # the left quarter of the padded width
    results = [{"scores": torch.rand(20)}, {"scores": torch.rand(20)}]
    original, entered = torch.tensor([[64, 60], [50, 32]]), torch.tensor([[32, 32], [25, 16]])
    drawn = PostProcessSegm()(results, {"pred_masks": masks}, original, entered)
    assert drawn[0]["masks"].shape == (20, 1, 64, 60) and drawn[0]["masks"].dtype == torch.uint8
    assert drawn[0]["masks"][:, 0, :32].all() and not drawn[0]["masks"][:, 0, 32:].any()
    assert drawn[1]["masks"][3, 0, :, :16].all() and not drawn[1]["masks"][3, 0, :, 16:].any()
    assert "masks" not in results[0] and drawn[1]["scores"] is results[1]["scores"]
    pairs = PostProcessSegm()(results, {"pred_masks": masks}, [(64, 60), (50, 32)], list(entered))
    assert all(torch.equal(a["masks"], b["masks"]) for a, b in zip(drawn, pairs, strict=True))
    with pytest.raises(ValueError, match="2 results, 1 original"):
        PostProcessSegm()(results, {"pred_masks": masks}, original[:1], entered)


def panoptic_outputs(classes, size=8, probability=0.95):
    """Outputs whose query k is surely of a class (5 is "no object"), and draws column k and no other."""
    logits = torch.full((1, len(classes), 6), 0.0)
    for k, c in enumerate(classes):
        logits[0, k, c] = np.log(5 * probability / (1 - probability))
    masks = torch.full((1, len(classes), size, size), -5.0)
    for k in range(len(classes)):
        masks[0, k, :, k :: len(classes)] = 5.0
    return {"pred_logits": logits, "pred_masks": masks, "pred_boxes": torch.rand(1, len(classes), 4)}


def read_map(result):
    rgb = np.asarray(Image.open(io.BytesIO(result["png_string"])), np.int64)
    return rgb @ [1, 256, 256**2]


READ = PostProcessPanoptic({1: True, 2: True, 3: False, 4: False})


def test_queries_of_one_stuff_are_one_segment_and_of_one_thing_are_several():
    outputs = panoptic_outputs([3, 1, 3, 1])
    (found,) = READ(outputs, [(8, 8)])
    ids = read_map(found)
    assert [(s["category_id"], s["isthing"]) for s in found["segments_info"]] == [(3, False), (1, True), (1, True)]
    assert [s["id"] for s in found["segments_info"]] == [0, 1, 2]
    # Once merged, the second query of the stuff is gone, and its pixels are shared out anew: all other masks are equal
    # there, so the first one takes them.
    assert np.array_equal(np.unique(ids), [0, 1, 2]) and (ids[:, 0::4] == 0).all() and (ids[:, 2::4] == 0).all()
    assert [s["area"] for s in found["segments_info"]] == [32, 16, 16]


def test_unsure_queries_and_no_object_are_left_out_and_nothing_is_a_valid_answer():
    for outputs in (panoptic_outputs([1, 3], probability=0.84), panoptic_outputs([5, 5])):
        (found,) = READ(outputs, [(8, 8)], [(5, 7)], first_id=1)
        assert found["segments_info"] == [] and read_map(found).shape == (5, 7) and not read_map(found).any()
    assert len(READ(panoptic_outputs([1, 3], probability=0.86), [(8, 8)])[0]["segments_info"]) == 2


def test_segments_of_four_pixels_go_and_their_pixels_fall_to_others():
    outputs = panoptic_outputs([1, 2])
    outputs["pred_masks"][0, 0], outputs["pred_masks"][0, 1] = -5.0, 5.0
    outputs["pred_masks"][0, 0, 0, :4] = 9.0
    (found,) = READ(outputs, [(8, 8)])
    assert [(s["category_id"], s["area"]) for s in found["segments_info"]] == [(2, 64)]
    outputs["pred_masks"][0, 0, 1, 0] = 9.0
    (found,) = READ(outputs, [(8, 8)])
    assert [(s["category_id"], s["area"]) for s in found["segments_info"]] == [(1, 5), (2, 59)]


def test_ids_can_leave_zero_to_void_and_pass_255():
    (found,) = READ(panoptic_outputs([1, 3]), [(8, 8)], first_id=255)
    assert np.array_equal(np.unique(read_map(found)), [255, 256])
    assert [s["id"] for s in found["segments_info"]] == [255, 256]
    one = READ(panoptic_outputs([2]), torch.tensor([[8, 8]]), torch.tensor([[16, 4]]), first_id=1)[0]
    assert (read_map(one) == 1).all() and one["segments_info"][0]["area"] == 64


def test_neighbours_in_a_padded_batch_do_not_change_a_map():
    outputs = panoptic_outputs([1, 3, 2, 4])
    alone = READ(outputs, [(32, 32)], [(50, 40)])[0]
    padded = torch.full((1, 4, 12, 16), -1.0)
    padded[..., :8, :8] = outputs["pred_masks"]
    padded[..., 8:, :8], padded[..., :8, 8:] = outputs["pred_masks"][..., -1:, :], outputs["pred_masks"][..., :, -1:]
    outputs["pred_masks"] = padded
    both = READ(outputs, [(32, 32)], [(50, 40)], padded_size=(48, 64))[0]
    assert both["segments_info"] == alone["segments_info"] and both["png_string"] == alone["png_string"]
    with pytest.raises(ValueError, match="2 input sizes"):
        READ(outputs, [(32, 32), (32, 32)])


def test_post_processors_follow_the_data():
    assert build()[2].keys() == {"bbox", "segm"}
    things = build(dataset_file="coco_panoptic")[2]["panoptic"].is_thing_map
    assert things[90] and not things.get(91) and build(thing_classes=[1, 7])[2]["panoptic"].is_thing_map == {1: 1, 7: 1}


def test_detrsegm_by_itself_returns_all_masks_in_training_too():
    """What code written against DETR expects of the class; build_model asks for matched masks only."""
    model, criterion, _ = build()
    plain = DETRsegm(model.detr)
    plain.load_state_dict(model.state_dict())
    outputs = plain.train()(IMAGES)
    assert "masks_of" not in outputs
    torch.testing.assert_close(outputs["pred_masks"], draw_all(model.train()(IMAGES)))


class OwnMasks(SetCriterion):
    """A mask loss of one's own, on `pred_masks`, as forks write it."""

    def loss_masks(self, outputs, targets, indices, num_boxes):
        return {"loss_mask": outputs["pred_masks"][self._get_src_permutation_idx(indices)].abs().mean()}


def test_criterion_subclass_finds_matched_masks_in_pred_masks():
    model, criterion, _ = build()
    own = OwnMasks(5, criterion.matcher, {}, 0.1, ["masks"])
    targets = [target([1, 4, 2], 64, 96), target([3], 80, 70)]
    outputs = model.train()(IMAGES)
    found = own(outputs, targets)["loss_mask"]
    every = draw_all(outputs)
    pairs = criterion.matcher(outputs, targets)
    expected = torch.cat([every[i, queries].flatten() for i, (queries, _) in enumerate(pairs)]).abs().mean()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
