"""tools/convert.py, and models of Hugging Face's transformers wherever a checkpoint is read."""

import json
import os

import pytest
import torch
from PIL import Image

import hubconf
from models import build_model
from tests.helpers import parse
from tools import convert, predict
from tools.predictor import Predictor
from util.checkpoint import load_checkpoint
from util.nested_tensor import nested_tensor_from_tensor_list

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here may look for a network
INSTALL = "pip install -r requirements-convert.txt"
UMASK = os.umask(0)
os.umask(UMASK)
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
    ours, again = (tmp_path / folder / "model.safetensors" for folder in ("folder", "again"))
    assert ours.read_bytes() == again.read_bytes() and ours.stat().st_mode & 0o777 == 0o666 & ~UMASK
    convert.main(["--checkpoint", f"{tmp_path}/again", "--output", f"{tmp_path}/again.pth"])
    back = load_checkpoint(tmp_path / "again.pth")
    assert back["model"].keys() == model.state_dict().keys()
    assert all(torch.equal(value, back["model"][key]) for key, value in model.state_dict().items())
    again, postprocessor = hubconf.detr(tmp_path / "again.pth", return_postprocessor=True)
    compare(theirs, again, images)
    assert type(postprocessor).__name__ == ("PostProcessPanoptic" if "panoptic" in name else "PostProcess")
    names = back["class_names"]
    assert names[90] == "toothbrush" and 12 not in names and max(names) == (200 if "panoptic" in name else 90)


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


@pytest.mark.slow
def test_pipeline_of_transformers_gives_the_boxes_of_a_converted_checkpoint(transformers, tmp_path):
    args = parse("--num_classes 5 --min_size 96 --max_size 200")
    model = randomise(build_model(args)[0])
    model.class_embed.bias.data[2] += 3  # scores above the threshold
    names = {1: "cat", 2: "dog", 4: "cow"}
    torch.save({"model": model.state_dict(), "args": vars(args), "class_names": names}, tmp_path / "x.pth")
    convert.main(["--checkpoint", f"{tmp_path}/x.pth", "--output", f"{tmp_path}/folder"])
    image = Image.effect_noise((170, 110), 60).convert("RGB")
    detect = transformers.pipeline("object-detection", str(tmp_path / "folder"), device="cpu")
    theirs = sorted(detect(image, threshold=0.5), key=lambda found: -found["score"])
    ours = Predictor.from_checkpoint(tmp_path / "x.pth", "cpu")(image, 0.5)
    assert len(ours) == len(theirs) == 8
    for found, score, label, box in zip(theirs, ours.scores, ours.labels, ours.boxes, strict=True):
        assert found["label"] == ours.name(int(label)) == "dog" and abs(found["score"] - float(score)) < 1e-4
        edges = torch.tensor([found["box"][edge] for edge in ("xmin", "ymin", "xmax", "ymax")])
        assert (edges - box).abs().max() < 1 + 1e-3  # the pipeline cuts off fractions of pixels


@pytest.mark.slow
def test_predict_from_a_folder_of_transformers_writes_its_classes(transformers, tmp_path, capsys):
    theirs = small_model(transformers, "timm", masks=False, id2label={0: "cat", 1: "dog", 2: "N/A", 3: "cow"})
    theirs.class_labels_classifier.bias.data[1] += 3
    theirs.save_pretrained(tmp_path / "folder")
    processor = transformers.DetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 96})
    processor.save_pretrained(tmp_path / "folder")
    image = Image.effect_noise((96, 64), 60).convert("RGB")
    image.save(tmp_path / "photo.png")
    flags = ["--checkpoint", f"{tmp_path}/folder", "--device", "cpu", "--output", f"{tmp_path}/found"]
    assert predict.main([f"{tmp_path}/photo.png", *flags]) == 0
    assert "7 dog" in capsys.readouterr().out
    with torch.no_grad():
        outputs = theirs(**processor(image, return_tensors="pt"))
    (expected,) = processor.post_process_object_detection(outputs, 0.5, [(64, 96)])
    written = json.loads((tmp_path / "found" / "predictions.json").read_text())
    boxes = torch.tensor([[x, y, x + w, y + h] for x, y, w, h in (each["bbox"] for each in written)])
    order = expected["scores"].argsort(descending=True)
    torch.testing.assert_close(boxes, expected["boxes"][order], atol=0.02, rtol=0)
