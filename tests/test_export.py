"""Exported files: compared with the model in their own runtimes, used by the docs' programs, refused in a sentence."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from models import build_model
from models.detr import PostProcess
from models.segmentation import PostProcessSegm
from tests.helpers import parse
from tools import export, export_check, export_graph, predict
from tools.export_graph import ExportGraph, example
from tools.predictor import Predictor
from util.checkpoint import save_checkpoint
from util.cli import exit_status

ROOT = Path(__file__).parents[1]
NAMES = {1: "cat", 3: "dog"}
BOXES = "--num_classes 4"
MASKS = f"{BOXES} --masks --hidden_dim 128 --nheads 8 --dataset_file coco_panoptic"
WHY = "needs onnxruntime: pip install -r requirements-export.txt"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """One checkpoint with boxes and one with masks, of models that are sure of some objects."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, flags in ("boxes", BOXES), ("masks", MASKS):
        torch.manual_seed(0)
        args = parse(flags)
        model = build_model(args)[0]
        detr = getattr(model, "detr", model)
        detr.class_embed.bias.data[3] += 3
        detr.query_embed.weight.data *= 10  # so that the queries differ
        state = {"model": model.state_dict(), "args": vars(args), "class_names": NAMES}
        save_checkpoint(state, folder / f"{name}.pth")
    return folder


@pytest.fixture(scope="module")
def exported(checkpoints):
    """A function that exports once for all tests of this module: (model, format, flags) -> (file, exit status)."""
    files = {}

    def run(model, file_format, *flags):
        key = (model, file_format, *flags)
        if key not in files:
            path = checkpoints / f"{len(files)}{export_graph.SUFFIXES[file_format]}"
            words = ["--checkpoint", f"{checkpoints}/{model}.pth", "--format", file_format, "--output", str(path)]
            files[key] = (path, exit_status(lambda: export.main([*words, *flags])))
        return files[key]

    return run


def graph_of(checkpoints, name, postprocess=False):
    predictor = Predictor.from_checkpoint(checkpoints / f"{name}.pth", "cpu")
    return ExportGraph(predictor.model, name == "masks", postprocess).eval()


def needs_onnx():
    for name in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(name, reason=WHY)


# The graph


@pytest.mark.slow
def test_graph_gives_the_models_outputs_for_a_padded_batch(checkpoints):
    graph = graph_of(checkpoints, "masks")
    images, mask = example((2, 64, 96), with_mask=True, uint8=False)
    with torch.no_grad():
        found = graph(images, mask)
        height, width = 48, 64  # of the second image; the rest is padding
        wanted = graph.model([images[0], images[1, :, :height, :width]])
    assert list(found) == export_graph.output_names(graph)
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name])


@pytest.mark.slow
def test_post_processing_in_the_graph_equals_the_post_processors(checkpoints):
    inputs = example((2, 64, 96), with_mask=True, uint8=True)
    with torch.no_grad():
        outputs, found = graph_of(checkpoints, "masks")(*inputs), graph_of(checkpoints, "masks", True)(*inputs)
    sizes = [(64, 96), (48, 64)]
    results = PostProcessSegm()(PostProcess()(outputs, sizes), outputs, [(64, 96), (64, 96)], [(64, 96), (64, 96)])
    assert list(found) == ["scores", "labels", "boxes", "masks"]
    for i, result in enumerate(results):
        for name in ("scores", "labels", "boxes"):
            torch.testing.assert_close(found[name][i], result[name])
        assert torch.equal(found["masks"][i], result["masks"][:, 0].bool())


@pytest.mark.slow
def test_uint8_input_equals_normalised_floats(checkpoints):
    graph = graph_of(checkpoints, "boxes")
    images, mask = example((2, 64, 96), with_mask=True, uint8=True)
    mean, std = (torch.tensor(values)[:, None, None] for values in (export.PIXEL_MEAN, export.PIXEL_STD))
    floats = ((images / 255 - mean) / std).masked_fill(mask[:, None], 0)
    with torch.no_grad():
        a, b = graph(images, mask), graph(floats, mask)
    torch.testing.assert_close(a["pred_boxes"], b["pred_boxes"])


# Files, each in its own runtime


@pytest.mark.slow
@pytest.mark.parametrize("file_format", ["torch-export", "torchscript"])
@pytest.mark.parametrize(("model", "flags"), [("boxes", ["--postprocess"]), ("masks", ["--padding_mask", "--uint8"])])
def test_files_of_pytorch_equal_the_model_at_other_sizes(exported, file_format, model, flags, capsys):
    path, status = exported(model, file_format, *flags)
    assert status == 0 and "all within the tolerances" in capsys.readouterr().out
    if file_format == "torch-export":
        extra = {"detr.json": ""}
        torch.export.load(path, extra_files=extra)
    else:
        extra = {"detr.json": ""}
        with export_graph.quiet():
            scripted = torch.jit.load(path, _extra_files=extra)
        assert "boxes" in " ".join(scripted(*example((1, 64, 96), True, "--uint8" in flags)))  # always takes a mask
    metadata = json.loads(extra["detr.json"])
    assert metadata["class_names"] == {"1": "cat", "3": "dog"} and metadata["min_size"] == 64
    assert metadata["input"] == ("uint8" if "--uint8" in flags else "float32") and metadata["format_version"] == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "flags"),
    [("boxes", ["--postprocess"]), ("masks", ["--uint8"]), ("masks", ["--postprocess", "--padding_mask"])],
)
def test_onnx_file_equals_the_model_at_other_sizes(exported, model, flags, capsys):
    needs_onnx()
    path, status = exported(model, "onnx", *flags)
    text = capsys.readouterr().out
    assert status == 0 and text.count(" pixels\n") == len(export_check.SIZES)
    from tools.onnx_model import OnnxModel

    session = OnnxModel(path)
    assert [each.shape for each in session.session.get_inputs()][0] == ["batch", 3, "height", "width"]
    assert session.metadata["std"] == [0.229, 0.224, 0.225] and session.metadata["max_size"] == 96
    assert session.metadata["things"] == (None if model == "boxes" else list(range(91)))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "smaller"), [("fp16", 0.6), ("int8", 0.4)])
def test_quantized_onnx_file_is_smaller_and_close(exported, monkeypatch, kind, smaller, capsys):
    needs_onnx()
    plain, _ = exported("boxes", "onnx")
    monkeypatch.setattr(export, "write_graph", lambda _, __, path, *___: shutil.copy(plain, path))  # saves its tracing
    path, status = exported("boxes", "onnx", "--quantize", kind)
    assert status == 0 and "of the image's side" in capsys.readouterr().out
    assert path.stat().st_size < smaller * plain.stat().st_size
    from tools.onnx_model import OnnxModel

    assert OnnxModel(path).metadata == OnnxModel(plain).metadata


SPOILT = {
    False: {"pred_boxes": lambda x: x + 0.1, "pred_masks": lambda x: -x, "pred_logits": lambda x: x * torch.nan},
    True: {"boxes": lambda x: x + 9, "masks": lambda x: ~x, "labels": lambda x: 3 - x},
}


@pytest.mark.slow
@pytest.mark.parametrize("postprocess", [False, True])
@pytest.mark.parametrize("quantize", [None, "fp16", "int8"])
def test_a_file_that_differs_is_reported(checkpoints, postprocess, quantize, capsys):
    graph = graph_of(checkpoints, "masks", postprocess)

    def reported(name, change):
        def exported(*inputs):
            outputs = graph(*inputs)
            return {**outputs, name: change(outputs[name])}

        passed = export_check.compare_sizes(graph, exported, "onnx", quantize, True, True, [(2, 64, 96)])
        return not passed and "ABOVE THE TOLERANCE" in capsys.readouterr().out

    for name, change in SPOILT[postprocess].items():
        assert reported(name, change), name
        assert reported(name, lambda x: x[:, :2]), name
        assert not reported(name, lambda x: x), name


@pytest.mark.slow
def test_export_exits_with_1_above_the_tolerance(exported, monkeypatch, capsys):
    monkeypatch.setitem(export_check.EXACT, "torchscript", -1.0)
    assert exported("boxes", "torchscript", "--uint8")[1] == 1
    assert "do not use" in capsys.readouterr().out


@pytest.mark.slow
def test_a_write_that_fails_leaves_the_earlier_file(checkpoints, tmp_path, monkeypatch, capsys):
    def fail(graph, file_format, path, *_):
        path.write_text("half a file")
        raise OSError(28, "no space left")

    monkeypatch.setattr(export, "write_graph", fail)
    output = tmp_path / "m.ts"
    output.write_text("earlier")
    words = ["--checkpoint", f"{checkpoints}/boxes.pth", "--format", "torchscript", "--output", str(output)]
    assert exit_status(lambda: export.main(words)) == 2
    assert "no space left" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [output] and output.read_text() == "earlier"


# predict.py with an ONNX file


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
    path, _ = exported("boxes", "torchscript", "--postprocess", "--uint8")
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


# Bad input


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--format onnx --output m.onnx", "which model? Give --checkpoint FILE"),
        ("--format onnx --output m.pt --checkpoint x.pth", "--output m.pt: the name of a onnx file ends in .onnx"),
        ("--format torchscript --output no/m.ts --checkpoint x.pth", "--output no/m.ts: no such folder"),
        ("--format torchscript --output m.ts --checkpoint x.pth", "x.pth: no such checkpoint"),
        (
            "--format torchscript --output m.ts --quantize int8 --checkpoint x.pth",
            "--quantize int8 is for --format onnx",
        ),
        ("--format torch-export --output m.pt2 --opset 20 --checkpoint x.pth", "--opset 20 is for --format onnx"),
        ("--format onnx --output m.onnx --opset 11 --checkpoint x.pth", "--opset 11: PyTorch writes 18 or later"),
    ],
)
def test_bad_flags_of_export_end_in_a_sentence(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert exit_status(lambda: export.main(flags.split())) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error


def test_a_missing_package_is_named_with_the_remedy(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export_graph, "find_spec", lambda name: None if name == "onnxscript" else name)
    (tmp_path / "m.onnx").write_text("no model")
    words = [f"--checkpoint={tmp_path}/x.pth", "--format=onnx", f"--output={tmp_path}/m.onnx"]
    image = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(image)
    for run in (
        lambda: export.main(words),
        lambda: predict.main([str(image), f"--checkpoint={tmp_path}/m.onnx", f"--output={tmp_path}/p"]),
    ):
        assert exit_status(run) == 2
        error = capsys.readouterr().err
        assert "(onnxscript): pip install -r requirements-export.txt" in error


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


@pytest.mark.slow
def test_an_opset_that_pytorch_cannot_write_is_refused(checkpoints, tmp_path, monkeypatch, capsys):
    needs_onnx()
    program = SimpleNamespace(model=SimpleNamespace(opset_imports={"": 20}))  # as PyTorch does: another one, no error
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: program)
    words = ["--checkpoint", f"{checkpoints}/boxes.pth", "--format", "onnx", "--output", f"{tmp_path}/m.onnx"]
    assert exit_status(lambda: export.main([*words, "--opset", "99"])) == 2
    assert "--opset 99: PyTorch could only write opset 20" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
