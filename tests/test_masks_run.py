"""Masks through the loops: AP of masks, two stages from the command line, and what they leave behind."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import main
from datasets import build_dataset
from datasets.coco import load_coco_api
from datasets.coco_eval import CocoEvaluator
from datasets.masks import decode_mask, read_segment_ids
from datasets.shapes import generate
from engine import evaluate
from tests.helpers import parse
from util.checkpoint import load_checkpoint
from util.run import epoch_score

pytestmark = pytest.mark.slow

HEAD = "--hidden_dim 128 --nheads 8 --dataset_file shapes_panoptic --shapes_classes 2"
DATA = "--shapes_train 4 --shapes_val 3 --shapes_size 64"


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    root = tmp_path_factory.mktemp("masks") / "shapes"
    generate(root, {"train": 4, "val": 3}, 64, 2)
    return root


def evaluated(truth, results, backend):
    evaluator = CocoEvaluator(truth, ["segm", "bbox"], backend)
    evaluator.update(results)
    evaluator.synchronize_between_processes()
    evaluator.accumulate()
    evaluator.summarize()
    return evaluator


@pytest.mark.parametrize("backend", ["pycocotools", "hotcoco"])
def test_true_masks_score_1_and_worse_ones_less(shapes, backend, tmp_path):
    truth = load_coco_api(shapes / "annotations/instances_train2017.json")
    results = {}
    for image_id, annotations in truth.imgToAnns.items():
        kept = [a for a in annotations if not a["iscrowd"]]
        boxes = torch.tensor([a["bbox"] for a in kept], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        height, width = truth.imgs[image_id]["height"], truth.imgs[image_id]["width"]
        masks = np.array([truth.annToMask(a) for a in kept]).reshape(-1, 1, height, width)
        labels = torch.tensor([a["category_id"] for a in kept], dtype=torch.int64)
        results[image_id] = {"boxes": boxes, "labels": labels, "scores": torch.ones(len(kept))}
        results[image_id]["masks"] = torch.from_numpy(masks)
    evaluator = evaluated(truth, results, backend)
    assert evaluator.coco_eval["segm"].stats[0] == pytest.approx(1) == evaluator.coco_eval["bbox"].stats[0]
    evaluator.save_predictions(tmp_path)
    left = json.loads((tmp_path / "predictions_segm.json").read_text())
    drawn = decode_mask(left[0]["segmentation"], *results[left[0]["image_id"]]["masks"].shape[-2:])
    assert np.array_equal(drawn, results[left[0]["image_id"]]["masks"][0, 0])
    for result in results.values():
        result["masks"] = result["masks"].clone()
        result["masks"][..., ::2] = 0  # every second column is lost: IoU is about a half
    half = evaluated(truth, results, backend)
    assert half.coco_eval["segm"].stats[0] < 0.3 and half.coco_eval["bbox"].stats[0] == pytest.approx(1)


@pytest.fixture(scope="module")
def stages(shapes):
    """A box run of one epoch, and a mask run of one on top of it."""
    out, common = shapes.parent, f"{HEAD} {DATA} --coco_path {shapes} --epochs 1"
    main.main(parse(f"{common} --output_dir {out}/boxes"))
    main.main(parse(f"{common} --masks --frozen_weights {out}/boxes/checkpoint.pth --output_dir {out}/masks"))
    return out, common


def test_only_the_head_trained_and_the_log_tells_all(stages):
    out, _ = stages
    boxes = torch.load(out / "boxes/checkpoint.pth", weights_only=True)["model"]
    masks = torch.load(out / "masks/checkpoint.pth", weights_only=True)["model"]
    assert all(torch.equal(masks[f"detr.{name}"], value) for name, value in boxes.items())
    (log,) = map(json.loads, (out / "masks/log.txt").read_text().splitlines())
    for name in ("train_loss_mask", "train_loss_dice", "test_loss_mask_unscaled", "test_loss_dice"):
        assert log[name] > 0
    assert len(log["test_coco_eval_masks"]) == len(log["test_coco_eval_bbox"]) == 12
    for group in ("all", "th", "st"):
        assert log[f"test_PQ_{group}"].keys() == {"pq", "sq", "rq", "n"}
    assert "test_coco_eval_masks" not in json.loads((out / "boxes/log.txt").read_text())


def test_the_panoptic_maps_are_left_on_disk(stages):
    folder = stages[0] / "masks/panoptic_eval"
    records = json.loads((folder / "predictions.json").read_text())["annotations"]
    assert len(records) == 3 == len(list(folder.glob("*.png")))
    for record in records:
        ids = np.asarray(Image.open(folder / record["file_name"]), np.int64) @ [1, 256, 65536]
        assert set(np.unique(ids)) - {0} == {s["id"] for s in record["segments_info"]}


def test_no_segment_has_the_id_of_void_and_small_batches_or_large_give_the_same(stages, tmp_path):
    out, common = stages
    maps = []
    for size in (1, 3):
        args = parse(f"{common} --masks --batch_size {size} --eval_padding_free")
        data = build_dataset("val", args)
        args.num_classes, args.thing_classes = data.num_classes, data.thing_classes
        device = torch.device("cpu")
        checkpoint = load_checkpoint(out / "masks/checkpoint.pth")
        model, criterion, post = main.build_parts(args, device, checkpoint, "checkpoint.pth")
        post["panoptic"].threshold = 0.0  # all but "no object"
        model.detr.class_embed.bias.data[-1] = -99.0
        loader = main.build_val_loader(data, args, device)
        evaluate(model, criterion, post, loader, data.coco, device, tmp_path / str(size))
        folder = tmp_path / str(size) / "panoptic_eval"
        maps.append(json.loads((folder / "predictions.json").read_text())["annotations"])
        for record in maps[-1]:
            assert record["segments_info"] and min(s["id"] for s in record["segments_info"]) == 1
            assert read_segment_ids(folder / record["file_name"]).min() >= 1
    assert maps[0] == maps[1]


def test_a_mask_run_goes_on_and_evaluates_from_its_own_checkpoint(stages):
    out, common = stages
    more = common.replace("--epochs 1", "--epochs 2")
    frozen = f"--masks --frozen_weights {out}/boxes/checkpoint.pth"
    main.main(parse(f"{more} {frozen} --resume {out}/masks/checkpoint.pth --output_dir {out}/masks"))
    assert len((out / "masks/log.txt").read_text().splitlines()) == 2
    main.main(parse(f"{common} --masks --eval --resume {out}/masks/checkpoint.pth"))


def test_a_bare_box_model_is_accepted_and_one_that_does_not_fit_is_explained(stages, tmp_path):
    out, common = stages
    state = torch.load(out / "boxes/checkpoint.pth", weights_only=True)["model"]
    torch.save({"model": state}, tmp_path / "bare.pth")
    args = parse(f"{common} --masks --frozen_weights {tmp_path}/bare.pth")
    args.num_classes, args.thing_classes = 5, [1, 2]
    model = main.build_parts(args, torch.device("cpu"))[0]
    assert torch.equal(model.detr.class_embed.weight, state["class_embed.weight"])
    args.num_classes = 7
    with pytest.raises(ValueError, match=r"bare.pth.*class_embed.weight is \[6, 128\], the model has \[8, 128\]"):
        main.build_parts(args, torch.device("cpu"))


def test_instances_without_stuff_train_masks_too(shapes, tmp_path):
    flags = f"{HEAD} {DATA} --coco_path {shapes} --epochs 1 --masks --batch_size 4 --output_dir {tmp_path}/out"
    main.main(parse(flags.replace("shapes_panoptic", "shapes")))
    (log,) = map(json.loads, (tmp_path / "out/log.txt").read_text().splitlines())
    assert "test_coco_eval_masks" in log and "test_PQ_all" not in log
    assert not (tmp_path / "out/panoptic_eval").exists()


def test_epoch_score_is_pq_else_mask_ap_else_box_ap():
    log = {"test_coco_eval_bbox": [0.1], "test_coco_eval_masks": [0.2], "test_PQ_all": {"pq": 0.3}}
    assert epoch_score(log) == 0.3
    log.pop("test_PQ_all")
    assert epoch_score(log) == 0.2
    log.pop("test_coco_eval_masks")
    assert epoch_score(log) == 0.1 and epoch_score({}) == -1
