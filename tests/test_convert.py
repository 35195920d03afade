"""tools/convert.py, and models of Hugging Face's transformers wherever a checkpoint is read."""

import json
import os

import pytest
import torch

import hubconf
from models import build_model
from tests.helpers import parse
from tools import convert
from util.checkpoint import load_checkpoint
from util.nested_tensor import nested_tensor_from_tensor_list

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here may look for a network
INSTALL = "pip install -r requirements-convert.txt"
HUB_NAMES = convert.HUB_NAMES
SMALL = {
    "d_model": 128, "encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
    "encoder_attention_heads": 8, "decoder_attention_heads": 8, "num_queries": 7,
}  # fmt: skip


@pytest.fixture
def transformers():
    pytest.importorskip("safetensors", reason=f"needs safetensors: {INSTALL}")
    pytest.importorskip("timm", reason=f"needs timm: {INSTALL}")
    return pytest.importorskip("transformers", reason=f"needs transformers: {INSTALL}")


def randomise(model):
    """Give the norms of a backbone statistics as if it were trained; the branches of its blocks stay small."""
    generator = torch.Generator().manual_seed(1)
    for name, value in model.state_dict().items():
        if ("bn" in name or "downsample.1" in name or "normalization" in name) and value.dim() == 1:
            noise = torch.rand(value.shape, generator=generator) * 0.5
            centre = 1.0 if name.endswith("var") or (name.endswith("weight") and "bn3" not in name) else 0.0
            value.copy_(centre + noise)
    return model.eval()


@pytest.fixture
def images():
    """Two normalised images of different sizes, so that both are padded."""
    generator = torch.Generator().manual_seed(0)
    return nested_tensor_from_tensor_list([torch.randn(3, *size, generator=generator) for size in ((64, 96), (96, 70))])


@torch.no_grad()
def compare(theirs, ours, images):
    there = theirs(pixel_values=images.tensors, pixel_mask=(~images.mask).long())
    here = ours.eval()(images)
    pairs = [(there.logits, here["pred_logits"]), (there.pred_boxes, here["pred_boxes"])]
    if "pred_masks" in here:
        pairs.append((there.pred_masks, here["pred_masks"]))
    for a, b in pairs:
        torch.testing.assert_close(a.reshape(b.shape), b, atol=1e-4, rtol=1e-4)
    assert len(pairs) == 2 + ("Segmentation" in type(theirs).__name__)


def auto_load(transformers, folder):
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    model, report = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("name", HUB_NAMES)
def test_convert_published_shapes_both_ways_give_equal_outputs_and_bits(transformers, tmp_path, images, name):
    torch.manual_seed(0)
    model = randomise(getattr(hubconf, name)())
    torch.save({"model": model.state_dict()}, tmp_path / "published.pth")
    convert.main(["--checkpoint", f"{tmp_path}/published.pth", "--model", name, "--output", f"{tmp_path}/folder"])
    theirs = auto_load(transformers, tmp_path / "folder")
    compare(theirs, model, images)

    theirs.save_pretrained(tmp_path / "again")
    convert.main(["--checkpoint", f"{tmp_path}/again", "--output", f"{tmp_path}/again.pth"])
    back = load_checkpoint(tmp_path / "again.pth")
    assert back["model"].keys() == model.state_dict().keys()
    assert all(torch.equal(value, back["model"][key]) for key, value in model.state_dict().items())
    compare(theirs, hubconf.detr(tmp_path / "again.pth"), images)
    assert back["class_names"][90] == "toothbrush" and 12 not in back["class_names"]


def small_model(transformers, layout, masks, **options):
    if layout == "timm":
        config = transformers.DetrConfig(backbone="resnet50", use_pretrained_backbone=False, **SMALL, **options)
    else:
        stages = [f"stage{i}" for i in range(1, 5)]
        body = transformers.ResNetConfig(depths=[3, 4, 23, 3] if masks else [3, 4, 6, 3], out_features=stages)
        config = transformers.DetrConfig(
            use_timm_backbone=False, backbone=None, backbone_config=body, use_pretrained_backbone=False,
            **SMALL, **options,
        )  # fmt: skip
    torch.manual_seed(0)
    cls = transformers.DetrForSegmentation if masks else transformers.DetrForObjectDetection
    return randomise(cls(config))


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("layout", ["timm", "transformers"])
@pytest.mark.slow
def test_load_checkpoint_of_transformers_gives_its_outputs(transformers, tmp_path, images, layout, masks):
    dilated = {"dilation": True} if layout == "timm" else {}
    theirs = small_model(transformers, layout, masks, id2label={0: "cat", 1: "dog", 2: "N/A", 3: "cow"}, **dilated)
    theirs.save_pretrained(tmp_path)
    compare(theirs, hubconf.detr(tmp_path), images)
    state = load_checkpoint(tmp_path / "model.safetensors")
    assert state["class_names"] == {0: "cat", 1: "dog", 3: "cow"} and state["args"]["num_classes"] == 4
    torch.save(theirs.state_dict(), tmp_path / "modules.bin")  # names of the modules: release 5 saves others
    modules = load_checkpoint(tmp_path / "modules.bin")["model"]
    assert all(torch.equal(value, modules[key]) for key, value in state["model"].items())


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["timm", "transformers"])
@pytest.mark.parametrize("flags", ["", "--masks --hidden_dim 128 --nheads 8 --backbone resnet50",
                                   "--position_embedding learned"])  # fmt: skip
def test_convert_own_checkpoint_gives_its_outputs(transformers, tmp_path, images, layout, flags):
    args = parse(f"{flags} --num_classes 5")
    model = randomise(build_model(args)[0])
    names = {1: "cat", 4: "dög"}
    torch.save({"model": model.state_dict(), "args": vars(args), "class_names": names}, tmp_path / "x.pth")
    folder = tmp_path / "folder"
    convert.main(["--checkpoint", f"{tmp_path}/x.pth", "--output", str(folder), "--backbone_layout", layout])
    theirs = auto_load(transformers, folder)
    compare(theirs, model, images)
    assert theirs.config.id2label == {0: "N/A", 1: "cat", 2: "N/A", 3: "N/A", 4: "dög"}
    state = load_checkpoint(folder)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in state["model"].items())
    assert state["class_names"] == names
    for flag in ("backbone", "hidden_dim", "nheads", "enc_layers", "dec_layers", "dim_feedforward", "num_queries",
                 "masks", "position_embedding", "num_classes", "min_size", "max_size", "dilation"):  # fmt: skip
        assert state["args"][flag] == getattr(args, flag), flag
