"""Models of Hugging Face's transformers, read without that package: names, descriptions, and what is refused."""

import json
import re
import sys

import pytest
import torch
from PIL import Image

import hubconf
import main
from models import build_model
from models.backbone import PIXEL_MEAN, PIXEL_STD
from models.weights import build_parts
from tests.helpers import parse
from tools import convert, predict
from tools.predictor import Predictor
from util import huggingface_config
from util.checkpoint import load_checkpoint
from util.huggingface import BACKBONES, is_huggingface, to_huggingface, to_own
from util.huggingface_config import config_of, flags_of, processor_of, sizes_of

REMEDY = "pip install safetensors"
MASKS = "--masks --hidden_dim 128 --nheads 8 --backbone resnet50 --dilation"


def small_state(flags=""):
    torch.manual_seed(0)
    args = parse(f"{flags} --num_classes 4")
    return {"model": build_model(args)[0].state_dict(), "args": vars(args), "class_names": {1: "cat", 3: "dog"}}


def write_folder(state, folder, layout="timm"):
    """Write a folder of transformers with pytorch_model.bin, which needs no other package."""
    folder.mkdir()
    config = config_of(state["args"], 4, state["class_names"], layout == "transformers")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(processor_of(state["args"])))
    torch.save(to_huggingface(state["model"], layout), folder / "pytorch_model.bin")
    return folder


@pytest.fixture
def folder(tmp_path):
    return write_folder(small_state(), tmp_path / "folder")


def change(file, **values):
    content = json.loads(file.read_text()) | values
    file.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))


def refusal(source, kind=ValueError):
    with pytest.raises(kind) as caught:
        load_checkpoint(source)
    return str(caught.value)


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


@pytest.mark.parametrize("flags", ["", MASKS])
@pytest.mark.parametrize("layout", BACKBONES)
def test_hub_entry_for_a_folder_builds_its_network(tmp_path, flags, layout, caplog):
    if layout == "transformers":
        flags = flags.replace("--dilation", "")
    caplog.set_level("INFO", "detr")
    state = small_state(f"{flags} --min_size 70 --max_size 90")
    folder = write_folder(state, tmp_path / "folder", layout)
    model, _ = hubconf.detr(folder, return_postprocessor=True)
    assert f"{folder}: converted from transformers (resnet" in caplog.text
    assert all(torch.equal(value, state["model"][name]) for name, value in model.state_dict().items())
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
    folder = write_folder(small_state("--hidden_dim 128 --nheads 8"), tmp_path / "folder")
    args = parse(f"--hidden_dim 128 --nheads 8 --masks --frozen_weights {folder} --num_classes 4")
    model, _, _ = build_parts(args, torch.device("cpu"))
    assert f"detector from {folder}, frozen" in caplog.text
    assert torch.equal(model.detr.class_embed.weight, load_checkpoint(folder)["model"]["class_embed.weight"])


def test_hub_weights_take_a_folder(tmp_path):
    model = hubconf.detr_resnet50(num_classes=4)
    state = {"model": model.state_dict(), "args": convert.hub_flags("detr_resnet50"), "class_names": {}}
    state["args"] |= {"min_size": 64, "max_size": 96}
    loaded = hubconf.detr_resnet50(pretrained=write_folder(state, tmp_path / "r50"), num_classes=4)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


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
    ({"size": {"shortest_edge": 100, "longest_edge": 50}}, "size is"),
])  # fmt: skip
def test_other_preprocessing_is_refused(folder, values, words):
    change(folder / "preprocessor_config.json", **values)
    assert re.match(rf"{folder}/preprocessor_config.json: .*{words}", refusal(folder))


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


def test_a_folder_without_class_names_gives_none(folder):
    change(folder / "config.json", id2label={str(i): f"LABEL_{i}" for i in range(4)})
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
