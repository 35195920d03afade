"""Programs that use exported files: predict.py, and those in docs/export.md."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers import needs_onnx
from tools import predict
from tools.predictor import Predictor
from util.cli import exit_status

ROOT = Path(__file__).parents[1]
NAMES = {1: "cat", 3: "dog"}


@pytest.mark.slow
@pytest.mark.parametrize(("model", "flags"), [("boxes", ["--padding_mask"]), ("masks", ["--uint8"])])
def test_predict_with_onnx_equals_the_checkpoint(exported, checkpoints, coco_root, tmp_path, model, flags):
    needs_onnx()
    found = {}
    for name, file in ("torch", checkpoints / f"{model}.pth"), ("onnx", exported(model, "onnx", *flags)[0]):
        words = ["--checkpoint", str(file), "--threshold", "0.3", "--device", "cpu", "--output", str(tmp_path / name)]
        assert predict.main([str(coco_root / "val2017"), *words, "--batch_size", "2"]) == 0
        found[name] = json.loads((tmp_path / name / "predictions.json").read_text())
    assert len(found["onnx"]) == len(found["torch"]) > 0
    for a, b in zip(found["onnx"], found["torch"], strict=True):
        assert a["category_id"] == b["category_id"] and a.get("segmentation") == b.get("segmentation")
        np.testing.assert_allclose([*a["bbox"], a["score"]], [*b["bbox"], b["score"]], rtol=1e-4, atol=1e-4)
    files = [sorted(p.relative_to(tmp_path / name) for p in (tmp_path / name).rglob("*.*")) for name in found]
    assert files[0] == files[1] and len(files[0]) >= 5
    for file in files[0]:
        if file.suffix in (".png", ".jpg") and model == "masks":
            a, b = (np.asarray(Image.open(tmp_path / name / file), int) for name in found)
            assert (abs(a - b) > 8).mean() < 0.01, file


@pytest.mark.slow
def test_onnx_model_takes_images_of_different_sizes_with_a_padding_mask_only(exported, checkpoints):
    needs_onnx()
    from tools.onnx_model import onnx_predictor

    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in ((40, 64), (64, 64))]
    padded = onnx_predictor(exported("boxes", "onnx", "--padding_mask")[0], "cpu", {1: "tiger"})
    assert padded.class_names == {1: "tiger"} and (padded.min_size, padded.max_size) == (64, 96)
    wanted = Predictor.from_checkpoint(checkpoints / "boxes.pth", "cpu").predict_batch(images, 0)
    for a, b in zip(padded.predict_batch(images, 0), wanted, strict=True):
        torch.testing.assert_close(a.boxes, b.boxes, rtol=0, atol=1e-3)
    alone = onnx_predictor(exported("boxes", "onnx")[0], "cpu")
    with pytest.raises(ValueError, match="images of one size only.*--padding_mask"):
        alone.predict_batch(images)
    assert len(predict.predict_each(alone, images, 0)) == 2  # one by one
    with pytest.raises(ValueError, match="export it without --postprocess"):
        onnx_predictor(exported("boxes", "onnx", "--postprocess")[0])


# The programs in the docs


@pytest.mark.slow
def test_python_program_of_the_docs_prints_the_objects(exported, checkpoints, coco_root, tmp_path):
    needs_onnx()
    code = re.search(r"```python\n(import json.*?)```", (ROOT / "docs" / "export.md").read_text(), re.S).group(1)
    (tmp_path / "model.onnx").write_bytes(exported("boxes", "onnx", "--postprocess")[0].read_bytes())
    photo = coco_root / "val2017" / "000000000021.jpg"
    (tmp_path / "photo.jpg").write_bytes(photo.read_bytes())
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    wanted = Predictor.from_checkpoint(checkpoints / "boxes.pth", "cpu")(photo, 0.5)
    lines = re.findall(r"^(.+) (0\.\d\d|1\.00) \[(.+)\]$", done.stdout, re.M)
    assert len(lines) == len(wanted) > 0
    for name, score, box in lines:  # Pillow's bilinear filter is not bit for bit torchvision's
        near = [abs(np.array(box.split(","), float) - other).max() for other in wanted.boxes.numpy()]
        i = int(np.argmin(near))
        assert near[i] < 1 and abs(float(score) - wanted.scores[i]) < 0.03
        assert name == NAMES.get(int(wanted.labels[i]), str(int(wanted.labels[i])))


@pytest.mark.slow
def test_libtorch_program_compiles_and_equals_the_predictor(exported, checkpoints, coco_root, tmp_path):
    torch_folder = Path(torch.__path__[0])
    for program in ("cmake", "c++"):
        if shutil.which(program) is None:
            pytest.skip(f"needs {program}")
    if not (torch_folder / "include" / "torch" / "script.h").is_file():
        pytest.skip("this PyTorch has no C++ headers")
    configure = ["cmake", "-S", ROOT / "tools" / "libtorch", "-B", tmp_path / "build", f"-DTORCH={torch_folder}"]
    for command in (configure, ["cmake", "--build", tmp_path / "build"]):
        subprocess.run(command, check=True, capture_output=True)
    photo = coco_root / "val2017" / "000000000021.jpg"
    with Image.open(photo) as image:
        image.convert("RGB").save(tmp_path / "photo.ppm")
    path, *_ = exported("boxes", "torchscript", "--postprocess", "--uint8")
    program = [tmp_path / "build" / "detect", path]
    done = subprocess.run([*program, tmp_path / "photo.ppm", "0.3"], capture_output=True, text=True, check=True)
    found = sorted([float(word) for word in line.split()] for line in done.stdout.splitlines())
    wanted = Predictor.from_checkpoint(checkpoints / "boxes.pth", "cpu")(tmp_path / "photo.ppm", 0.3)
    rows = zip(wanted.labels.tolist(), wanted.scores.tolist(), wanted.boxes.tolist(), strict=True)
    expected = sorted([label, score, *box] for label, score, box in rows)
    assert len(expected) > 0
    np.testing.assert_allclose(found, expected, rtol=0, atol=0.006)
    wrong = subprocess.run([*program, photo, "0.5"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "not an 8-bit binary PPM" in wrong.stderr


@pytest.mark.slow
def test_onnx_files_that_do_not_fit_are_refused(exported, coco_root, tmp_path, capsys):
    needs_onnx()
    import onnx

    (tmp_path / "text.onnx").write_text("no model")
    foreign = onnx.load(exported("boxes", "onnx")[0])
    del foreign.metadata_props[:]
    onnx.save(foreign, tmp_path / "foreign.onnx")
    for flags, message in (
        ("gone.onnx", "gone.onnx: no such ONNX file"),
        ("text.onnx", "text.onnx: ONNX Runtime cannot load it"),
        ("foreign.onnx", "foreign.onnx: no metadata of version 1"),
        ("text.onnx --amp bf16", "--amp: for PyTorch checkpoints only"),
    ):
        words = [str(coco_root / "val2017"), "--output", str(tmp_path / "found"), "--checkpoint"]
        file, *more = flags.split()
        assert exit_status(lambda words=[*words, str(tmp_path / file), *more]: predict.main(words)) == 2
        assert message in capsys.readouterr().err
