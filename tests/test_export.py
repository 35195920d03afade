"""Exported files: compared with the model in their own runtimes; bad input refused in a sentence."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from models.detr import PostProcess
from models.segmentation import PostProcessSegm
from tests.helpers import needs_onnx
from tools import export, export_check, export_graph, predict
from tools.export_graph import ExportGraph, example
from tools.predictor import Predictor
from util.cli import exit_status


def graph_of(checkpoints, name, postprocess=False):
    predictor = Predictor.from_checkpoint(checkpoints / f"{name}.pth", "cpu")
    return ExportGraph(predictor.model, name == "masks", postprocess).eval()


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
def test_files_of_pytorch_equal_the_model_at_other_sizes(exported, file_format, model, flags):
    path, status, text = exported(model, file_format, *flags)
    assert status == 0 and "all within the tolerances" in text
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
def test_onnx_file_equals_the_model_at_other_sizes(exported, model, flags):
    needs_onnx()
    path, status, text = exported(model, "onnx", *flags)
    assert status == 0 and text.count(" pixels\n") == len(export_check.SIZES)
    from tools.onnx_model import OnnxModel

    session = OnnxModel(path)
    assert [each.shape for each in session.session.get_inputs()][0] == ["batch", 3, "height", "width"]
    assert session.metadata["std"] == [0.229, 0.224, 0.225] and session.metadata["max_size"] == 96
    assert session.metadata["things"] == (None if model == "boxes" else list(range(91)))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "smaller"), [("fp16", 0.6), ("int8", 0.4)])
def test_quantized_onnx_file_is_smaller_and_close(exported, monkeypatch, kind, smaller):
    needs_onnx()
    plain = exported("boxes", "onnx")[0]
    monkeypatch.setattr(export, "write_graph", lambda _, __, path, *___: shutil.copy(plain, path))  # saves its tracing
    path, status, text = exported("boxes", "onnx", "--quantize", kind)
    assert status == 0 and "of the image's side" in text
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
def test_export_exits_with_1_above_the_tolerance(exported, monkeypatch):
    monkeypatch.setitem(export_check.EXACT, "torchscript", -1.0)
    _, status, text = exported("boxes", "torchscript", "--uint8")
    assert status == 1 and "do not use" in text


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
def test_an_opset_that_pytorch_cannot_write_is_refused(checkpoints, tmp_path, monkeypatch, capsys):
    needs_onnx()
    program = SimpleNamespace(model=SimpleNamespace(opset_imports={"": 20}))  # as PyTorch does: another one, no error
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: program)
    words = ["--checkpoint", f"{checkpoints}/boxes.pth", "--format", "onnx", "--output", f"{tmp_path}/m.onnx"]
    assert exit_status(lambda: export.main([*words, "--opset", "99"])) == 2
    assert "--opset 99: PyTorch could only write opset 20" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
