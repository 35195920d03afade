"""Models of Hugging Face's transformers, read without that package: names and descriptions."""

import json
import re

import pytest
import torch
from PIL import Image

import hubconf
import main
from models.backbone import PIXEL_MEAN, PIXEL_STD
from models.weights import build_parts
from tests.helpers import parse, small_state, write_transformers_folder
from tools import convert, predict
from tools.predictor import Predictor
from util import huggingface_config
from util.checkpoint import load_checkpoint
from util.huggingface import BACKBONES, is_huggingface, to_huggingface, to_own
from util.huggingface_config import flags_of, sizes_of

MASKS = "--masks --hidden_dim 128 --nheads 8 --backbone resnet50 --dilation"


@pytest.fixture
def folder(tmp_path):
    return write_transformers_folder(small_state(), tmp_path / "folder")


@pytest.mark.parametrize("flags", ["", MASKS, "--position_embedding learned", "--backbone_norm batch"])
@pytest.mark.parametrize("layout", BACKBONES)
def test_names_there_and_back_give_the_same_bits(flags, layout):
    weights = small_state(flags)["model"]
    theirs = to_huggingface(weights, layout)
    assert is_huggingface(theirs) and not is_huggingface(weights)
    assert all(("stages" in name) == (layout == "transformers") for name in theirs if ".layer1." in name)
    assert not any("in_proj" in name or "num_batches_tracked" in name for name in theirs)
    back = to_own(theirs)
    kept = {name for name in weights if not name.endswith("num_batches_tracked")}
    assert back.keys() == kept and all(torch.equal(value, weights[name]) for name, value in back.items())


def test_projections_without_one_of_them_stay_and_are_named(folder):
    weights = torch.load(folder / "pytorch_model.bin")
    del weights["model.encoder.layers.0.self_attn.k_proj.bias"]
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"folder does not fit .*no transformer.encoder.layers.0.self_attn.in_proj_bi"):
        hubconf.detr(folder)


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["", MASKS])
@pytest.mark.parametrize("layout", BACKBONES)
def test_hub_entry_for_a_folder_builds_its_network(tmp_path, flags, layout, caplog):
    if layout == "transformers":
        flags = flags.replace("--dilation", "")
    caplog.set_level("INFO", "detr")
    state = small_state(f"{flags} --min_size 70 --max_size 90")
    folder = write_transformers_folder(state, tmp_path / "folder", layout)
    model, _ = hubconf.detr(folder, return_postprocessor=True)
    assert f"{folder}: converted from transformers (resnet" in caplog.text
    assert all(torch.equal(value, state["model"][name]) for name, value in model.state_dict().items())
    assert json.loads((folder / "config.json").read_text())["use_timm_backbone"] == (layout == "timm")
    found = load_checkpoint(folder / "pytorch_model.bin")
    assert found["class_names"] == {1: "cat", 3: "dog"}
    described = {name: state["args"][name] for name in found["args"] if name in state["args"]}
    for name in ("device", "frozen_weights", "dataset_file"):
        described.pop(name)
    assert {name: found["args"][name] for name in described} == described


def test_predict_from_a_folder_gives_the_boxes_of_its_checkpoint(folder, tmp_path, capsys):
    torch.save(small_state(), tmp_path / "own.pth")
    Image.effect_noise((90, 70), 60).convert("RGB").save(tmp_path / "photo.png")
    own, theirs = (Predictor.from_checkpoint(path, "cpu") for path in (tmp_path / "own.pth", folder))
    assert (theirs.min_size, theirs.max_size, theirs.class_names) == (64, 96, {1: "cat", 3: "dog"})
    expected, found = (predictor(tmp_path / "photo.png", 0.0) for predictor in (own, theirs))
    assert torch.equal(expected.boxes, found.boxes) and torch.equal(expected.scores, found.scores)
    flags = ["--checkpoint", str(folder), "--threshold", "0", "--device", "cpu", "--output", f"{tmp_path}/found"]
    assert predict.main([f"{tmp_path}/photo.png", *flags]) == 0
    assert re.search(r"photo.png +8  .*\b(cat|dog|class 0|class 2)\b", capsys.readouterr().out)


@pytest.mark.parametrize("flag", ["--eval --resume", "--finetune", "--resume"])
def test_main_takes_a_folder_for_each_flag_of_weights(folder, coco_root, flag, caplog):
    caplog.set_level("INFO", "detr")
    main.main(parse(f"--coco_path {coco_root} {flag} {folder} --epochs 1 --num_classes 4 --augment none"))
    assert "converted from transformers (resnet18, 4 classes)" in caplog.text
    wanted = "fine-tuning from .* of .* entries copied" if "finetune" in flag else f"weights from {folder}"
    assert re.search(wanted, caplog.text) and "re-initialised" not in caplog.text


def test_frozen_weights_take_a_folder(tmp_path, caplog):
    caplog.set_level("INFO", "detr")
    folder = write_transformers_folder(small_state("--hidden_dim 128 --nheads 8"), tmp_path / "folder")
    args = parse(f"--hidden_dim 128 --nheads 8 --masks --frozen_weights {folder} --num_classes 4")
    model, _, _ = build_parts(args, torch.device("cpu"))
    assert f"detector from {folder}, frozen" in caplog.text
    assert torch.equal(model.detr.class_embed.weight, load_checkpoint(folder)["model"]["class_embed.weight"])


@pytest.mark.slow
def test_hub_weights_take_a_folder_and_a_published_file_gets_cocos_names(tmp_path):
    torch.save(hubconf.detr_resnet50().state_dict(), tmp_path / "published.pth")
    state = convert.load_described(str(tmp_path / "published.pth"), "detr_resnet50")
    assert max(state["class_names"]) == 90 and state["args"]["num_classes"] == 91
    state["args"] |= {"min_size": 64, "max_size": 96}
    folder = write_transformers_folder(state, tmp_path / "r50", classes=91)
    loaded = hubconf.detr_resnet50(pretrained=folder).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in state["model"].items())


def test_mean_and_deviation_are_those_of_the_backbone():
    assert (huggingface_config.MEAN, huggingface_config.STD) == (PIXEL_MEAN, PIXEL_STD)


@pytest.mark.parametrize("processor, sizes", [
    ({}, (800, 1333)), ({"size": 600, "max_size": 1000}, (600, 1000)),
    ({"size": {"shortest_edge": 480, "longest_edge": 640}}, (480, 640)),
])  # fmt: skip
def test_sizes_of_old_and_new_descriptions_are_read(processor, sizes):
    assert tuple(sizes_of(processor).values()) == sizes


@pytest.mark.parametrize("values, wanted", [
    ({"backbone": "resnet101", "dilation": True, "use_timm_backbone": True}, ("resnet101", True)),
    ({"backbone": "resnet50", "backbone_config": None, "scale_embedding": False}, ("resnet50", False)),
    ({"backbone_config": {"model_type": "timm_backbone", "backbone": "resnet50.a1_in1k", "output_stride": 16}},
     ("resnet50", True)),
    ({"dilation": True, "backbone_kwargs": {"output_stride": 32}, "backbone": "resnet50"}, ("resnet50", False)),
    ({"backbone": "microsoft/resnet-101", "use_timm_backbone": False}, ("resnet101", False)),
    ({"backbone_config": {"model_type": "resnet", "layer_type": "basic", "depths": [2, 2, 2, 2],
                          "hidden_sizes": [64, 128, 256, 512]}, "dilation": None}, ("resnet18", False)),
])  # fmt: skip
def test_backbones_of_old_and_new_descriptions_are_read(values, wanted):
    flags = flags_of({"model_type": "detr", **values}, masks=False)
    assert (flags["backbone"], flags["dilation"]) == wanted
    assert (flags["hidden_dim"], flags["nheads"], flags["num_queries"]) == (256, 8, 100)


def test_things_and_stuff_of_own_data_stay(tmp_path):
    state = small_state(MASKS)
    state["args"]["thing_classes"] = [1, 2]
    folder = write_transformers_folder(state, tmp_path / "folder")
    _, postprocessor = hubconf.detr(folder, return_postprocessor=True)
    assert list(postprocessor.is_thing_map) == [1, 2]


def test_a_folder_without_class_names_gives_none(folder):
    content = json.loads((folder / "config.json").read_text())
    content["id2label"] = {str(i): f"LABEL_{i}" for i in range(4)}
    (folder / "config.json").write_text(json.dumps(content))
    assert "class_names" not in load_checkpoint(folder)


@pytest.fixture
def safetensors():
    reason = "needs safetensors: pip install -r requirements-convert.txt"
    return pytest.importorskip("safetensors.torch", reason=reason)


def test_safetensors_with_own_names_need_no_description(safetensors, tmp_path):
    weights = small_state()["model"]
    for name in ("own.safetensors", "own.bin"):  # the format shows in the contents too
        safetensors.save_file(weights, tmp_path / name)
        loaded = load_checkpoint(tmp_path / name)["model"]
        assert all(torch.equal(value, loaded[key]) for key, value in weights.items())
