"""Models of Hugging Face's transformers that are refused, and tools/convert.py's refusals: one sentence each."""

import json
import re
import sys

import pytest
import torch

from tests.helpers import small_state, write_transformers_folder
from tools import convert
from util import checkpoint
from util.checkpoint import load_checkpoint

REMEDY = "pip install safetensors"


@pytest.fixture
def folder(tmp_path):
    return write_transformers_folder(small_state(), tmp_path / "folder")


@pytest.fixture
def safetensors():
    reason = "needs safetensors: pip install -r requirements-convert.txt"
    return pytest.importorskip("safetensors.torch", reason=reason)


def change(file, **values):
    content = json.loads(file.read_text()) | values
    file.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))


def refusal(source, kind=ValueError):
    with pytest.raises(kind) as caught:
        load_checkpoint(source)
    return str(caught.value)


@pytest.mark.parametrize("values, words", [
    ({"model_type": "deformable_detr"}, "model_type is 'deformable_detr', another architecture: give a folder of Detr"),
    ({"model_type": "yolos"}, "model_type is 'yolos'"),
    ({"model_type": ...}, "model_type is None"),
    ({"id2label": {"0": "a", "1": "b"}}, "id2label has 2 labels, the class head 4 and \"no object\": list the labels"),
    ({"id2label": {"1": "a", "2": "b", "3": "c", "4": "d"}}, "list the labels 0 to 3"),
    ({"id2label": ...}, "id2label has 2 labels, the class head 4"),
    ({"activation_function": "gelu"}, "activation_function is 'gelu': this project supports 'relu'"),
    ({"decoder_ffn_dim": 128}, "decoder_ffn_dim 128 and encoder_ffn_dim 64"),
    ({"d_model": "wide"}, "d_model is 'wide': expected a whole number"),
    ({"backbone": "resnet50d"}, "the backbone resnet50d is none of this project: resnet18, "),
    ({"backbone_config": {"model_type": "swin"}}, "the backbone swin resnet18 is none"),
    ({"backbone_config": {"model_type": "resnet", "depths": [1, 1, 1, 1]}}, r"bottleneck blocks, \[1, 1, 1, 1\]"),
    ({"backbone_config": {"model_type": "resnet", "downsample_in_first_stage": True}}, "downsample_in_first_stage"),
    ({"backbone_kwargs": {"output_stride": 8}}, "output_stride is 8"),
    ({"backbone_config": "resnet"}, "an entry has another type than transformers gives it"),
])  # fmt: skip
def test_descriptions_of_other_networks_are_refused(folder, values, words):
    change(folder / "config.json", **values)
    assert re.match(rf"{folder}/config.json: .*{words}", refusal(folder))


@pytest.mark.parametrize("values, words", [
    ({"image_mean": [0.5, 0.5, 0.5]}, r"image_mean is \[0.5, 0.5, 0.5\]: models of this project take .*0.485"),
    ({"image_std": [1, 1, 1]}, "image_std is"),
    ({"do_normalize": False}, "not scaled to 0..1 and normalised"),
    ({"rescale_factor": 1}, "not scaled to 0..1 and normalised"),
    ({"size": {"height": 64, "width": 64}}, "size is .*give shortest_edge and longest_edge"),
    ({"image_mean": 0.5}, "an entry has another type"),
    ({"size": {"shortest_edge": 100, "longest_edge": 50}}, "size is"),
])  # fmt: skip
def test_other_preprocessing_is_refused(folder, values, words):
    change(folder / "preprocessor_config.json", **values)
    assert re.match(rf"{folder}/preprocessor_config.json: .*{words}", refusal(folder))


def test_missing_files_are_named_with_what_to_do(folder, tmp_path):
    (folder / "config.json").rename(tmp_path / "config.json")
    for source in (folder, folder / "pytorch_model.bin"):
        text = refusal(source, FileNotFoundError)
        assert text.startswith(f"{folder}/config.json: no such file; it describes") and "copy it too" in text
    (folder / "config.json").write_text("{cut")
    assert re.match(rf"{folder}/config.json: not a readable JSON file .*download it again", refusal(folder))
    (folder / "pytorch_model.bin").unlink()
    text = refusal(folder, FileNotFoundError)
    assert "is a folder without model.safetensors or pytorch_model.bin" in text and "name a file in it" in text


def test_a_folder_without_a_class_head_is_refused(folder):
    weights = torch.load(folder / "pytorch_model.bin")
    torch.save({k: v for k, v in weights.items() if "class_labels" not in k}, folder / "pytorch_model.bin")
    assert "no class head among the weights: save DetrForObjectDetection" in refusal(folder)


@pytest.mark.parametrize("keep", [4, 5000, -100])
def test_a_truncated_safetensors_file_is_named(safetensors, folder, keep):
    weights = torch.load(folder / "pytorch_model.bin")
    path = folder / "model.safetensors"
    safetensors.save_file(weights, path)
    assert len(load_checkpoint(folder)["model"]) > 0
    path.write_bytes(path.read_bytes()[:keep])
    for source in (folder, path):
        assert re.match(rf"{path}: not a readable checkpoint \(.*incomplete or damaged, take another", refusal(source))


def test_a_pointer_in_place_of_safetensors_is_named(folder):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert re.match(rf"{folder}/model.safetensors: .*git lfs pull", refusal(folder))


def test_without_the_safetensors_package_the_remedy_is_said(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    (folder / "model.safetensors").write_bytes(b"x")
    assert refusal(folder, OSError) == f"{folder}/model.safetensors: safetensors files need a package: {REMEDY}"
    torch.save(small_state(), tmp_path / "own.pth")
    with pytest.raises(OSError, match=f"new/model.safetensors: .*{REMEDY}"):
        convert.main(["--checkpoint", f"{tmp_path}/own.pth", "--output", f"{tmp_path}/new"])
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("flags, layout, words", [
    ("--pre_norm", "timm", "--pre_norm: the DETR of transformers normalises after"),
    ("--backbone resnext50_32x4d", "transformers", "no resnext50_32x4d of its own: choose --backbone_layout timm"),
    ("--backbone resnet50 --dilation", "transformers", "no dilated resnet50 of its own"),
])  # fmt: skip
def test_convert_what_transformers_lacks_is_refused(safetensors, tmp_path, flags, layout, words):
    torch.save(small_state(flags), tmp_path / "own.pth")
    with pytest.raises(ValueError, match=words):
        convert.main(
            ["--checkpoint", f"{tmp_path}/own.pth", "--output", f"{tmp_path}/new", "--backbone_layout", layout]
        )
    assert not (tmp_path / "new").exists()


def test_convert_refuses_existing_output_and_weights_without_architecture(folder, tmp_path):
    source = ["--checkpoint", str(folder), "--output"]
    convert.main([*source, f"{tmp_path}/own.pth"])
    for output in (f"{tmp_path}/own.pth", str(folder)):
        with pytest.raises(ValueError, match=f"--output {output} exists: name a new"):
            convert.main([*source, output])
    torch.save(small_state()["model"], tmp_path / "bare.pth")
    with pytest.raises(ValueError, match=r"bare.pth does not say its architecture .*--model, one of detr_resnet50"):
        convert.main(["--checkpoint", f"{tmp_path}/bare.pth", "--output", f"{tmp_path}/new"])


def test_weights_behind_an_address_are_refused_since_their_description_is_elsewhere(folder, monkeypatch):
    monkeypatch.setattr(checkpoint, "download", lambda url: str(folder / "pytorch_model.bin"))
    text = refusal("https://host/pytorch_model.bin")
    assert text.startswith("https://host/pytorch_model.bin is a model of transformers: download its whole folder")
    assert (folder / "pytorch_model.bin").exists()
