"""From a checkpoint to boxes on pictures: the same numbers as evaluation, every file, every bad input in a sentence."""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import hubconf
import main as training
from models import build_model
from models.attention_maps import record_attention
from tests.helpers import parse
from tools import draw_panoptic, predict, show_predictions
from tools.predictor import Predictor
from util.checkpoint import save_checkpoint
from util.cli import exit_status

pytestmark = pytest.mark.slow

NAMES = {1: "cat", 3: "dog"}


def write_checkpoint(path, flags="--num_classes 4", **more):
    torch.manual_seed(0)
    args = parse(flags)
    state = {"model": build_model(args)[0].state_dict(), "args": vars(args), "class_names": NAMES, **more}
    save_checkpoint(state, path)
    return path


@pytest.fixture
def checkpoint(tmp_path):
    return write_checkpoint(tmp_path / "checkpoint.pth")


def run(*flags):
    return exit_status(lambda: predict.main([*map(str, flags), "--device", "cpu"]))


def test_numbers_are_those_of_evaluation(coco_root, checkpoint, tmp_path):
    flags = f"--coco_path {coco_root} --eval --resume {checkpoint} --output_dir {tmp_path / 'eval'} --batch_size 1"
    training.main(parse(f"--num_classes 4 {flags}"))
    images, annotations = coco_root / "val2017", coco_root / "annotations" / "instances_val2017.json"
    where = tmp_path / "found"
    flags = ("--checkpoint", checkpoint, "--threshold", 0, "--annotations", annotations, "--output", where, "--tf32")
    assert run(images, *flags) == 0

    def table(path):
        key = lambda r: (r["image_id"], -r["score"])  # noqa: E731
        rows = sorted(json.loads(path.read_text()), key=key)
        return [(r["image_id"], r["category_id"]) for r in rows], np.array([[*r["bbox"], r["score"]] for r in rows])

    ours, theirs = table(where / "predictions.json"), table(tmp_path / "eval" / "predictions_bbox.json")
    assert ours[0] == theirs[0] and len(ours[0]) == 3 * 8 and torch.backends.cudnn.allow_tf32
    np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-4, atol=1e-4)


def test_a_folder_becomes_pictures_a_table_and_one_page(coco_root, checkpoint, tmp_path, capsys):
    where = tmp_path / "found"
    assert run(coco_root / "val2017", "--checkpoint", checkpoint, "--threshold", 0, "--output", where) == 0
    assert not torch.backends.cudnn.allow_tf32
    text = capsys.readouterr().out
    assert re.search(r"000000000021.jpg +8  (cat|dog|class \d) 0\.\d\d", text)
    assert "written:" in text and "all: " in text
    assert sorted(p.name for p in (where / "pictures").iterdir()) == [f"0000000000{i}.jpg" for i in (21, 22, 23)]
    page = (where / "sheet.html").read_text()
    assert page.count("<figure>") == page.count("data:image/jpeg;base64,") == 3
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert {r["image_id"] for r in json.loads((where / "predictions.json").read_text())} == {21, 22, 23}


def test_the_same_in_three_lines_of_python(coco_root, checkpoint):
    predictor = Predictor.from_checkpoint(checkpoint, device="cpu")
    found = predictor(coco_root / "val2017" / "000000000021.jpg", threshold=0)
    assert found.boxes.shape == (8, 4) and found.name(1) == "cat" and found.name(2) == "class 2"
    assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)
    assert max(found.draw().size) == 480  # a small picture grows
    with Image.open(coco_root / "val2017" / "000000000021.jpg") as picture:
        torch.testing.assert_close(predictor(picture, threshold=0).boxes, found.boxes)
    assert len(predictor(found.image, threshold=1.0)) == 0
    with pytest.raises(ValueError, match="no masks: choose from boxes"):
        found.draw("masks")


def test_a_batch_of_images_gives_what_each_gives_alone(coco_root, checkpoint, tmp_path):
    predictor = Predictor.from_checkpoint(checkpoint, device="cpu")
    equal = [torch.randint(0, 256, (3, 40, 64), dtype=torch.uint8) for _ in range(3)]
    unequal = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in [(40, 64), (64, 64), (70, 33)]]
    for images, pixels in (equal, 1e-3), (unequal, 1.0):  # the network sees the padding beside an image's edge
        for alone, together in zip(
            [predictor(image, 0) for image in images], predictor.predict_batch(images, 0), strict=True
        ):
            torch.testing.assert_close(together.boxes, alone.boxes, rtol=0, atol=pixels)
            assert together.image.shape == alone.image.shape and len(together) == 8
    assert predictor.predict_batch([]) == []
    (coco_root / "val2017" / "broken.jpg").write_text("no picture")
    for size in (1, 2):
        flags = ("--checkpoint", checkpoint, "--threshold", 0, "--output", tmp_path / str(size), "--batch_size", size)
        assert run(coco_root / "val2017", *flags) == 1
    one, two = (json.loads((tmp_path / str(size) / "predictions.json").read_text()) for size in (1, 2))
    assert [(r["image_id"], r["category_id"]) for r in one] == [(r["image_id"], r["category_id"]) for r in two]


def test_without_pictures_and_with_workers_the_numbers_are_the_same(coco_root, checkpoint, tmp_path):
    (coco_root / "val2017" / "!first.jpg").write_text("no image")
    flags = (coco_root / "val2017", "--checkpoint", checkpoint, "--threshold", 0, "--batch_size", 2)
    assert run(*flags, "--output", tmp_path / "a") == 1
    assert run(*flags, "--output", tmp_path / "b", "--show", "none", "--num_workers", 1) == 1
    plain, fast = (json.loads((tmp_path / name / "predictions.json").read_text()) for name in "ab")
    assert plain == fast and len(fast) == 3 * 8 and "!first.jpg" not in {record["file_name"] for record in fast}
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["predictions.json"]


def test_the_faster_ways_find_the_same(coco_root, checkpoint, monkeypatch):
    image = next((coco_root / "val2017").iterdir())
    plain, fast = Predictor.from_checkpoint(checkpoint, "cpu"), Predictor.from_checkpoint(checkpoint, "cpu")
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **how: compiled.append(how))
    fast.compile("fixed")
    fast.compile("any")
    fast.amp = "bf16"
    a, b = plain(image, threshold=0), fast(image, threshold=0)
    assert compiled == [{"dynamic": False, "mode": "reduce-overhead"}, {"dynamic": True}]
    assert a.scores.tolist() != b.scores.tolist()
    torch.testing.assert_close(a.scores, b.scores, rtol=0.05, atol=0.01)


def test_an_official_checkpoint_with_a_namespace_is_rebuilt(tmp_path):
    old = {
        k: v
        for k, v in vars(parse()).items()
        if k not in ("num_classes", "backbone_weights", "backbone_norm", "finetune")
    }
    path = write_checkpoint(tmp_path / "official.pth", "--num_classes 91")
    state = torch.load(path, weights_only=True)
    torch.save({"model": state["model"], "args": argparse.Namespace(**old), "epoch": 499}, path)
    predictor = Predictor.from_checkpoint(path, device="cpu")
    assert predictor.model.class_embed.out_features == 92 and predictor.class_names[18] == "dog"


def test_a_published_model_by_name_with_a_local_file(coco_root, tmp_path):
    torch.manual_seed(0)
    torch.save({"model": hubconf.detr_resnet50_panoptic().state_dict()}, tmp_path / "bare.pth")
    predictor = Predictor.from_hub("detr_resnet50_panoptic", tmp_path / "bare.pth", device="cpu")
    assert predictor.class_names[200] == "rug-merged" and predictor.min_size == 800
    predictor.min_size = 64
    assert predictor(coco_root / "val2017" / "000000000021.jpg").kinds == ["boxes", "masks", "panoptic"]
    with pytest.raises(ValueError, match="no model 'detr': choose one of detr_resnet50"):
        Predictor.from_hub("detr")


def test_names_come_from_an_annotation_file(coco_root, checkpoint):
    path = coco_root / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text())
    content["categories"][0]["name"] = "tiger"
    path.write_text(json.dumps(content))
    args = predict.get_args_parser().parse_args(["x", "--checkpoint", str(checkpoint), "--annotations", str(path)])
    assert predict.build_predictor(args).class_names == {1: "tiger", 3: "dog"}


def test_ids_and_file_names(tmp_path, coco_root):
    folder = coco_root / "val2017"
    paths = predict.find_images([str(folder / "*21.jpg"), str(folder)])
    assert list(paths.values()) == [f"0000000000{i}.jpg" for i in (21, 22, 23)]
    assert len(predict.find_images([os.path.relpath(path) for path in paths] + [str(folder)])) == 3
    assert predict.image_ids(list(paths), None) == [21, 22, 23]
    assert predict.image_ids([folder / "a.jpg", folder / "7.jpg"], None) == [1, 2]
    with pytest.raises(ValueError, match="does not list 1 of the images: a.jpg"):
        predict.image_ids([folder / "a.jpg"], str(coco_root / "annotations" / "instances_val2017.json"))


def test_two_images_of_one_name_keep_their_pictures(coco_root, checkpoint, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "000000000021.jpg").write_bytes((coco_root / "val2017" / "000000000021.jpg").read_bytes())
    assert run(coco_root / "val2017", other, "--checkpoint", checkpoint, "--output", tmp_path / "found") == 0
    assert (tmp_path / "found" / "pictures" / "000000000021_2.jpg").is_file()


def test_a_photo_is_turned_when_asked(checkpoint, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 32)).save(tmp_path / "photo.jpg", exif=exif)
    for flags, size in (([], (480, 240)), (["--upright"], (240, 480))):
        assert run(tmp_path / "photo.jpg", "--checkpoint", checkpoint, "--output", tmp_path / "found", *flags) == 0
        with Image.open(tmp_path / "found" / "pictures" / "photo.jpg") as picture:
            assert picture.size == size


def test_an_unreadable_image_is_told_and_the_rest_goes_on(coco_root, checkpoint, tmp_path, capsys):
    (coco_root / "val2017" / "000000000022.jpg").write_text("hello")
    assert run(coco_root / "val2017", "--checkpoint", checkpoint, "--output", tmp_path / "found") == 1
    assert re.fullmatch(r"error: .*000000000022.jpg: not a readable image.*\n", capsys.readouterr().err)
    assert (tmp_path / "found" / "sheet.html").read_text().count("<figure>") == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("gone.jpg --checkpoint CHECKPOINT", "gone.jpg: no such file"),
        ("EMPTY --checkpoint CHECKPOINT", "no images in this folder"),
        ("IMAGES --checkpoint gone.pth", "gone.pth: no such checkpoint"),
        ("IMAGES --checkpoint TEXT", "not a readable checkpoint"),
        ("IMAGES --checkpoint CUT", "cut.pth: not a readable checkpoint"),
        ("IMAGES --checkpoint OTHER", "no class head 'class_embed'"),
        ("IMAGES --checkpoint MISFIT", "misfit.pth does not fit this model"),
        ("IMAGES --checkpoint BARE", "does not say its architecture"),
        ("IMAGES", "which model"),
        ("IMAGES --checkpoint CHECKPOINT --show masks", "gives no masks"),
        ("IMAGES --checkpoint CHECKPOINT --output IMAGES", "could be overwritten"),
        ("IMAGES --checkpoint CHECKPOINT --batch_size 0", "--batch_size 0: at least 1"),
    ],
)
def test_bad_input_ends_in_a_sentence(flags, message, coco_root, checkpoint, tmp_path, capsys):
    state = torch.load(checkpoint, weights_only=True)
    places = {
        name: tmp_path / f"{name.lower()}.pth" for name in ("CHECKPOINT", "CUT", "OTHER", "MISFIT", "BARE", "TEXT")
    }
    places |= {"IMAGES": coco_root / "val2017", "EMPTY": tmp_path / "empty"}
    places["EMPTY"].mkdir()
    places["CUT"].write_bytes(checkpoint.read_bytes()[:50_000])
    places["TEXT"].write_text("hello, I am no checkpoint")
    torch.save({"model": {"fc.weight": torch.zeros(3)}, "args": {}}, places["BARE"])
    torch.save({"model": {"fc.weight": torch.zeros(3)}, "args": {"backbone": "resnet18"}}, places["OTHER"])
    torch.save({**state, "args": {**state["args"], "enc_layers": 2}}, places["MISFIT"])
    words = [str(places.get(word, word)) for word in flags.split()]
    assert run("--output", tmp_path / "found", *words) == 2
    errors = capsys.readouterr().err
    assert message in errors and errors.startswith("error: ") and "Traceback" not in errors


def test_masks_and_panoptic_are_drawn_and_written(coco_root, tmp_path, monkeypatch):
    flags = "--masks --num_classes 4 --hidden_dim 128 --nheads 8 --dataset_file coco_panoptic"
    path = write_checkpoint(tmp_path / "masks.pth", flags)
    predictor = Predictor.from_checkpoint(path, device="cpu")
    found = predictor(coco_root / "val2017" / "000000000021.jpg", threshold=0)
    assert found.masks.shape == (8, 48, 64) and found.masks.dtype == torch.bool
    assert found.kinds == ["boxes", "masks", "panoptic"]
    assert set(np.unique(found.segment_ids)) - {0} == {segment["id"] for segment in found.segments}
    some = predictor(found.image, threshold=float(found.scores[2]))  # the masks are those of the queries kept, in order
    assert len(some) == 3 and torch.equal(some.masks, found.masks[:3])
    assert predictor(found.image, threshold=1.0).masks.shape == (0, 48, 64)
    small, padded, postprocessor = found.image[:, :40, :50], [], predictor.postprocessors["panoptic"]
    read = postprocessor.forward
    monkeypatch.setattr(
        postprocessor, "forward", lambda *a, **how: padded.append(how["padded_size"]) or read(*a, **how)
    )
    alone, (_, together) = predictor(small, threshold=0), predictor.predict_batch([found.image, small], threshold=0)
    assert together.masks.shape == (8, 40, 50) and (together.masks == alone.masks).float().mean() > 0.9
    assert together.segment_ids.shape == (40, 50) and padded == [(64, 80), (64, 85)]
    for each in predictor.predict_batch([found.image] * 2, threshold=0):
        assert torch.equal(each.masks, found.masks) and (each.segment_ids == found.segment_ids).mean() > 0.9
    for kind in found.kinds:
        assert found.draw(kind).size == (480, 360)
    assert run(coco_root / "val2017", "--checkpoint", path, "--threshold", 0, "--output", tmp_path / "found") == 0
    records = json.loads((tmp_path / "found" / "predictions.json").read_text())
    assert records[0]["segmentation"]["size"] == [48, 64]
    panoptic = json.loads((tmp_path / "found" / "panoptic.json").read_text())["annotations"]
    with Image.open(tmp_path / "found" / "panoptic" / panoptic[0]["file_name"]) as file:
        ids = np.array(file, np.int64) @ [1, 256, 256**2]
    assert (ids == found.segment_ids).all() and panoptic[0]["segments_info"] == found.segments


def test_maps_of_an_evaluation_are_drawn_beside_their_images(coco_root, tmp_path, capsys):
    record = {"image_id": 21, "file_name": "000000000021.png", "segments_info": [{"id": 7, "category_id": 1}]}
    (tmp_path / "maps").mkdir()
    Image.new("RGB", (64, 48), (7, 0, 0)).save(tmp_path / "maps" / "000000000021.png")
    content = {"annotations": [record], "categories": [{"id": 1, "name": "cat"}]}
    (tmp_path / "maps" / "predictions.json").write_text(json.dumps(content))
    flags = ["--images", str(coco_root / "val2017"), "--height", "96", "--output", str(tmp_path / "sheet.png")]
    assert exit_status(lambda: draw_panoptic.main([str(tmp_path / "maps"), *flags])) == 0
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 2 * 128 and sheet.height > 96
    assert exit_status(lambda: draw_panoptic.main([str(tmp_path), *flags])) == 2
    assert "predictions.json: no such file" in capsys.readouterr().err


def test_a_sheet_of_truth_beside_predictions(coco_root, tmp_path, capsys):
    records = [{"image_id": i, "category_id": 1, "bbox": [5, 5, 20, 20], "score": 0.9} for i in (21, 22)]
    (tmp_path / "found.json").write_text(json.dumps(records))
    annotations = coco_root / "annotations" / "instances_val2017.json"
    flags = ["--annotations", annotations, "--images", coco_root / "val2017", "--output", tmp_path / "sheet.png"]

    def sheet(predictions):
        return exit_status(lambda: show_predictions.main([*map(str, flags), "--predictions", str(predictions)]))

    assert sheet(tmp_path / "found.json") == 0
    assert "2 of 3 images" in capsys.readouterr().out
    with Image.open(tmp_path / "sheet.png") as picture:
        assert picture.width > 1600
    for content, message in (
        ("[]", "holds no detection"),
        ("{}", "not a COCO result file"),
        ("[{}]", "entry 0 is not"),
    ):
        (tmp_path / "bad.json").write_text(content)
        assert sheet(tmp_path / "bad.json") == 2
        assert message in capsys.readouterr().err


def test_a_run_knows_its_own_files(coco_root, tmp_path):
    training.main(parse(f"--num_classes 4 --coco_path {coco_root} --output_dir {tmp_path / 'run'} --epochs 1"))
    assert exit_status(lambda: show_predictions.main(["--run", str(tmp_path / "run"), "--threshold", "0"])) == 0
    with Image.open(tmp_path / "run" / "predictions.png") as picture:
        assert picture.height > 600  # three images, two in a row


def test_a_sheet_without_its_files_ends_in_a_sentence(capsys):
    assert exit_status(lambda: show_predictions.main(["--images", "x"])) == 2
    assert "--annotations is missing: give --run" in capsys.readouterr().err


def test_the_flags_of_predict_reach_the_predictor(coco_root, checkpoint, tmp_path, monkeypatch):
    seen, predict_files = [], predict.predict_files
    monkeypatch.setattr(
        predict, "predict_files", lambda predictor, *more: seen.append(predictor) or predict_files(predictor, *more)
    )
    monkeypatch.setattr(torch.nn.Module, "compile", lambda _, **how: seen.append(how))
    flags = f"{coco_root}/val2017 --checkpoint {checkpoint} --output {tmp_path}/o --device cpu"
    assert predict.main(f"{flags} --min_size 40 --max_size 50 --amp bf16 --compile".split()) == 0
    assert seen[0] == {"dynamic": True} and (seen[1].min_size, seen[1].max_size, seen[1].amp) == (40, 50, "bf16")


def test_predictor_takes_paths_pictures_tensors_and_arrays(coco_root, checkpoint):
    predictor, path = Predictor.from_checkpoint(checkpoint, "cpu"), coco_root / "val2017" / "000000000021.jpg"
    with Image.open(path) as picture:
        array = np.array(picture)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    expected = predictor(str(path), 0).scores
    for image in (path, Image.fromarray(array), tensor, array, array[:, ::-1][:, ::-1]):
        torch.testing.assert_close(predictor(image, 0).scores, expected)
    assert predictor(array[..., 0], 0).image.shape == tensor.shape
    for image in (array / 255, array[..., :2], tensor.float(), tensor[0]):
        with pytest.raises(ValueError, match="expected uint8"):
            predictor(image)


def test_attention_is_drawn_for_each_object_and_point_on_pictures_and_page(coco_root, checkpoint, tmp_path, capsys):
    where = tmp_path / "found"
    flags = ("--checkpoint", checkpoint, "--threshold", 0, "--output", where, "--batch_size", 3, "--show", "attention")
    assert run(coco_root / "val2017", *flags, "--points", "5,5", "60,40") == 0
    assert sorted(p.name for p in (where / "pictures").iterdir()) == [f"0000000000{i}.jpg" for i in (21, 22, 23)]
    with Image.open(where / "pictures" / "000000000021.jpg") as picture:  # 1 + 8 objects + 2 points, four in a row
        assert picture.width > 4 * 360 and 3 * 270 < picture.height < 4 * 270
    assert (where / "sheet.html").read_text().count('<figure class="wide">') == 3
    assert len(json.loads((where / "predictions.json").read_text())) == 3 * 8
    assert run(coco_root / "val2017", *flags, "--points", "5,5", "64,40") == 1  # images of 64 x 48 pixels
    assert "21.jpg: 1 of --points lie outside its 64 x 48 pixels" in capsys.readouterr().err
    with Image.open(where / "pictures" / "000000000021.jpg") as picture:  # 1 + 8 objects + 1 point
        last_row = np.asarray(picture)[-200:]
        assert last_row[:, 400:700].mean() < 200 and last_row[:, 800:].mean() > 250
    assert len(json.loads((where / "predictions.json").read_text())) == 3 * 8


@pytest.mark.parametrize(("flags", "message"), [
    ("--points 5,5", "add --show attention"),
    ("--show attention --compile", "leave out --compile"), ("--show attention --tile 64", "leave out --compile"),
])  # fmt: skip
def test_attention_flags_that_do_not_fit_together_are_refused(flags, message, capsys):
    assert run("x.jpg", "--checkpoint", "x.pth", *flags.split()) == 2
    assert message in capsys.readouterr().err


def test_attention_of_a_batch_is_that_of_each_query_and_image(coco_root, checkpoint):
    predictor = Predictor.from_checkpoint(checkpoint, device="cpu")
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in [(64, 96), (96, 64)]]
    with pytest.raises(ValueError, match="no attention was recorded: set"):
        predictor(images[0], 0).draw("attention")
    predictor.attention = True
    with torch.no_grad(), record_attention(predictor.model) as maps:
        logits = predictor.model(images)["pred_logits"]
    for i, found in enumerate(predictor.predict_batch(images, 0)):
        best = logits[i].softmax(-1)[:, :-1].max(-1).values.argsort(descending=True)
        torch.testing.assert_close(found.attention.objects, maps["decoder"][-1][i].mean(0)[best])
        torch.testing.assert_close(found.attention.cells, maps["encoder"][-1][i].mean(0))
        assert found.attention.covered == pytest.approx([(2 / 3, 1), (1, 2 / 3)][i])
        assert found.kinds == ["attention", "boxes"] and max(found.draw().size) == 480
    with pytest.raises(ValueError, match=r"\[\(64, 1\)\] lie outside the image of \[64, 96\] pixels"):
        found.draw("attention", [(64, 1)])


def listed(tmp_path, *names):
    images = [{"id": 10 + k, "file_name": name} for k, name in enumerate(names)]
    content = {"images": images, "annotations": [], "categories": [{"id": 1, "name": "cat"}]}
    (tmp_path / "list.json").write_text(json.dumps(content))
    return str(tmp_path / "list.json")


@pytest.mark.parametrize(("names", "paths", "relative", "expected"), [
    (["day/1.jpg", "night/1.jpg"], ["i/night/1.jpg", "i/day/1.jpg"], ["night/1.jpg", "day/1.jpg"], [11, 10]),
    (["day/1.jpg", "night/1.jpg"], ["i/night/1.jpg"], ["1.jpg"], [11]),
    (["1.jpg", "day/1.jpg"], ["i/day/1.jpg", "i/1.jpg"], ["day/1.jpg", "1.jpg"], [11, 10]),
])  # fmt: skip
def test_image_ids_are_matched_by_relative_path(names, paths, relative, expected, tmp_path):
    assert predict.image_ids([tmp_path / path for path in paths], listed(tmp_path, *names), relative) == expected


@pytest.mark.parametrize(("names", "paths", "message"), [
    (["day/1.jpg", "night/1.jpg"], ["dusk/1.jpg"], "does not list 1 of the images"),
    (["1.jpg"], ["day/1.jpg", "night/1.jpg"], "are both 1.jpg"),
    (["1.jpg", "day/1.jpg"], ["i/day/1.jpg"], "could be any of day/1.jpg, 1.jpg"),
    (["1.jpg", "1.jpg"], ["1.jpg"], "same file name"),
])  # fmt: skip
def test_image_ids_that_are_ambiguous_are_refused(names, paths, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        predict.image_ids([tmp_path / path for path in paths], listed(tmp_path, *names))


def test_image_ids_of_equal_numbers_stay_distinct(tmp_path):
    assert predict.image_ids([tmp_path / "7.jpg", tmp_path / "007.jpg"], None) == [1, 2]


def test_output_names_never_collide_nor_leave_the_folder(tmp_path):
    folder = predict.OutputFolder(tmp_path / "out")
    names = ["a.jpg", "sub/a.jpg", "a_2.jpg", "A.png", "../../x.jpg", "..", "b\udce9\x1b.jpg", "y" * 300 + ".jpg"]
    stems = [folder.stem(name) for name in names]
    assert len({stem.lower() for stem in stems}) == len(stems) and max(map(len, stems)) <= 100
    assert all(re.fullmatch(r"\w[\w.-]*", stem, re.ASCII) for stem in stems)


def test_text_from_data_reaches_terminal_and_page_escaped(coco_root, tmp_path, capsys):
    names = dict.fromkeys(range(4), "\x1b[31m<b>cat")
    path = write_checkpoint(tmp_path / "names.pth", class_names=names)
    (coco_root / "val2017" / "000000000021.jpg").rename(coco_root / "val2017" / "<i>\x1b[2J\udce9.jpg")
    (coco_root / "val2017" / "\x1bbad.jpg").write_text("no image")
    assert run(coco_root / "val2017", "--checkpoint", path, "--threshold", 0, "--output", tmp_path / "found") == 1
    output = capsys.readouterr()
    page = (tmp_path / "found" / "sheet.html").read_text()
    for text in (output.out, output.err, page):
        assert "\x1b" not in text and "\\x1b" in text
    assert "<b>cat" not in page and "&lt;b&gt;cat" in page and "<i>" not in page
    assert run("\x1bgone.jpg", "--checkpoint", path) == 2
    assert "\x1b" not in capsys.readouterr().err


@pytest.mark.parametrize("flags", [[], ["--upright"]])
def test_predict_with_one_bad_image_keeps_the_others(flags, coco_root, checkpoint, tmp_path, monkeypatch, capsys):
    Image.new("L", (300, 300)).save(coco_root / "val2017" / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    where = tmp_path / "found"
    assert run(coco_root / "val2017", "--checkpoint", checkpoint, "--threshold", 0, "--output", where, *flags) == 1
    assert "bomb.png" in capsys.readouterr().err
    assert len(json.loads((where / "predictions.json").read_text())) == 3 * 8


def test_predict_when_the_network_fails_on_one_image_keeps_the_others(coco_root, checkpoint, tmp_path, monkeypatch):
    predict_batch, sizes = Predictor.predict_batch, []

    def out_of_memory(self, images, threshold=None):
        sizes.append(len(images))
        if any(image.float().mean() < 1 for image in images):
            raise RuntimeError("out of memory")
        return predict_batch(self, images, threshold)

    monkeypatch.setattr(Predictor, "predict_batch", out_of_memory)
    Image.new("RGB", (64, 48)).save(coco_root / "val2017" / "000000000022.jpg")
    flags = ("--checkpoint", checkpoint, "--threshold", 0, "--output", tmp_path / "found", "--batch_size", 3)
    assert run(coco_root / "val2017", *flags) == 1
    records = json.loads((tmp_path / "found" / "predictions.json").read_text())
    assert {record["image_id"] for record in records} == {21, 23} and sizes == [3, 1, 1, 1]


def test_predict_when_interrupted_writes_the_results_so_far(coco_root, checkpoint, tmp_path, monkeypatch):
    predict_files = predict.predict_files

    def interrupted(*arguments):
        yield next(predict_files(*arguments))
        raise KeyboardInterrupt

    monkeypatch.setattr(predict, "predict_files", interrupted)
    flags = ("--checkpoint", checkpoint, "--threshold", 0, "--output", tmp_path / "found")
    assert run(coco_root / "val2017", *flags) == 130
    assert len(json.loads((tmp_path / "found" / "predictions.json").read_text())) == 8


@pytest.mark.parametrize("flags", ["--threshold nan", "--threshold 1.5", "--min_size -5", "--max_size 0",
                                   "--num_workers -1", "--every 0"])  # fmt: skip
def test_predict_with_a_meaningless_number_is_refused(flags, capsys):
    assert run("x.jpg", "--checkpoint", "x.pth", *flags.split()) == 2
    assert " ".join(flags.split()) in capsys.readouterr().err


def test_tools_run_from_another_folder(tmp_path):
    folder = Path(predict.__file__).parent
    scripts = [path for path in sorted(folder.glob("*.py")) if '__name__ == "__main__"' in path.read_text()]
    line = "sys.path.insert(0, str(Path(__file__).resolve().parents[1]))"
    assert len(scripts) >= 7 and all(script.read_text().count(line) == 1 for script in scripts)
    done = subprocess.run([sys.executable, folder / "predict.py", "gone.jpg"], cwd=tmp_path, capture_output=True)
    assert done.returncode == 2 and done.stderr.startswith(b"error: which model?")


@pytest.mark.parametrize("change", [
    {"bbox": [1, 2, 3]}, {"bbox": [1, 2, 3, float("nan")]}, {"bbox": None}, {"score": "0.5"}, {"score": float("inf")},
    {"image_id": "21"}, {"category_id": None}, {"bbox": [1, 2, 3, 10**400]},
])  # fmt: skip
def test_sheet_of_a_result_file_with_a_bad_entry_is_refused(coco_root, tmp_path, change, capsys):
    good = {"image_id": 21, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.9}
    assert sheet(coco_root, tmp_path, [good]) == 0
    assert sheet(coco_root, tmp_path, [good, good | change]) == 2
    assert "entry 1 is not a detection" in capsys.readouterr().err


def sheet(coco_root, tmp_path, records, *more):
    (tmp_path / "found.json").write_text(json.dumps(records))
    annotations = coco_root / "annotations/instances_val2017.json"
    flags = ["--annotations", annotations, "--images", coco_root / "val2017", "--output", tmp_path / "s.png", *more]
    return exit_status(lambda: show_predictions.main([*map(str, flags), "--predictions", str(tmp_path / "found.json")]))


def test_sheet_of_predictions_with_other_ids_is_refused(coco_root, tmp_path, capsys):
    record = {"image_id": 21, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.9}
    assert sheet(coco_root, tmp_path, [record | {"image_id": 99}]) == 2
    assert "holds no detection in an image of" in capsys.readouterr().err
    assert sheet(coco_root, tmp_path, [record | {"category_id": 80}]) == 2
    assert "no detection is of a category of" in capsys.readouterr().err
    assert sheet(coco_root, tmp_path, [record, record | {"category_id": 80}]) == 0
    assert "detections of categories that" in capsys.readouterr().out


def test_sheet_reads_images_only_inside_their_folder(coco_root, tmp_path, capsys):
    path = coco_root / "annotations/instances_val2017.json"
    content = json.loads(path.read_text())
    content["images"][0]["file_name"] = "../val2017/000000000021.jpg"
    path.write_text(json.dumps(content))
    record = {"image_id": 21, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.9}
    assert sheet(coco_root, tmp_path, [record]) == 2
    assert "lies outside" in capsys.readouterr().err
    assert sheet(coco_root, tmp_path, [record], "--allow", "outside_paths") == 0


@pytest.mark.parametrize("name", ["image", "map"])
def test_panoptic_sheet_reads_files_only_inside_their_folders(tmp_path, name, capsys):
    record = {"image_id": 1, "file_name": "../1.png", "segments_info": []}
    (tmp_path / "found").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "1.jpg")
    content = {"annotations": [record], "categories": [{"id": 1, "name": "a"}]}
    (tmp_path / "found/predictions.json").write_text(json.dumps(content))
    folder = tmp_path / "found" if name == "image" else tmp_path
    if name == "map":
        truth = {**content, "annotations": [], "images": [{"id": 1, "file_name": "1.jpg"}]}
        (tmp_path / "truth.json").write_text(json.dumps(truth))
    more = ["--truth", str(tmp_path / "truth.json")] if name == "map" else []
    flags = [str(tmp_path / "found"), "--images", str(folder), "--output", str(tmp_path / "s.png"), *more]
    assert exit_status(lambda: draw_panoptic.main(flags)) == 2
    assert "1.png lies outside" in capsys.readouterr().err or name == "image"


@pytest.mark.parametrize(
    "content", [[1], {"annotations": [5], "categories": []}, {"annotations": [], "categories": [1]}]
)
def test_panoptic_sheet_of_another_format_is_refused(tmp_path, content):
    (tmp_path / "predictions.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="not in COCO's panoptic format"):
        draw_panoptic.read_panoptic(tmp_path / "predictions.json")


def test_predictor_with_meaningless_numbers_is_refused(checkpoint):
    predictor = Predictor.from_checkpoint(checkpoint, "cpu")
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    for threshold in (float("nan"), -0.1, 1.1):
        with pytest.raises(ValueError, match="a score between 0 and 1"):
            predictor(image, threshold)
    for sizes in ((-5, 100), (0, 10), (100, 50)):
        with pytest.raises(ValueError, match="min_size"):
            Predictor(predictor.model, predictor.postprocessors, {}, *sizes, device="cpu")


def test_predictions_that_are_not_finite_are_an_error_of_their_image(checkpoint):
    predictor = Predictor.from_checkpoint(checkpoint, "cpu")
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    (found,) = predict.predict_each(predictor, [image], 0)
    assert not isinstance(found, str)
    predictor.model.bbox_embed.layers[-1].bias.data.fill_(float("nan"))
    assert predict.predict_each(predictor, [image], 0) == ["no prediction: the model's numbers are not finite"]


def test_large_images_are_predicted_on_when_allowed(coco_root, checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    flags = (coco_root / "val2017", "--checkpoint", checkpoint, "--output", tmp_path / "o", "--show", "none")
    assert run(*flags) == 1 and "--allow large_images reads it" in capsys.readouterr().err
    assert run(*flags, "--allow", "large_images") == 0


def test_pictures_of_a_run_on_data_without_coco_files_are_refused_in_a_sentence(tmp_path, monkeypatch):
    torch.save({"model": {}, "args": {"dataset_file": "mine"}}, tmp_path / "checkpoint.pth")
    monkeypatch.setattr(show_predictions, "build_dataset", lambda part, args: [])
    with pytest.raises(ValueError, match="not read from COCO's files: give the four file flags"):
        show_predictions.files_of_run(tmp_path)


def test_threshold_is_a_number_or_the_best_one_of_a_report(tmp_path):
    (tmp_path / "report.json").write_text('{"best": {"threshold": 0.42}}')
    assert predict.read_threshold(str(tmp_path / "report.json")) == 0.42
    assert predict.read_threshold("0.3") == 0.3 and predict.read_threshold(None) is None
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(ValueError, match="other.json: neither a number nor a report"):
        predict.read_threshold(str(tmp_path / "other.json"))
    with pytest.raises(FileNotFoundError):
        predict.read_threshold("half")
