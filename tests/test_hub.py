"""The entry points of hubconf: names, architectures, weights from files, and what happens without a network."""

import argparse
from pathlib import Path

import pytest
import torch

import hubconf
from models import build_model
from models.detr import PostProcess, PostProcessPanoptic
from tests.helpers import parse
from util.flags import NEW_FLAGS

ROOT = Path(__file__).parents[1]
DETECTORS = ["detr_resnet50", "detr_resnet50_dc5", "detr_resnet101", "detr_resnet101_dc5"]
SEGMENTERS = ["detr_resnet50_panoptic", "detr_resnet50_dc5_panoptic", "detr_resnet101_panoptic"]


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    def refuse(url, *args, **kwargs):
        raise OSError("no network in tests")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


def load(name, **options):
    return torch.hub.load(str(ROOT), name, source="local", **options)


def test_the_panoptic_read_out_knows_cocos_things_and_its_threshold():
    model, read_out = load("detr_resnet50_panoptic", return_postprocessor=True, threshold=0.5)
    assert read_out.threshold == 0.5
    assert [i for i in range(250) if read_out.is_thing_map[i]] == list(range(91))
    with torch.no_grad():
        outputs = model.eval()([torch.zeros(3, 64, 64, dtype=torch.uint8)])
    assert outputs["pred_masks"].shape == (1, 100, 16, 16)


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """Our own weights in a file like the published ones: an argparse Namespace beside them. (file, state dict)."""
    torch.manual_seed(0)
    state = hubconf.detr_resnet50().state_dict()
    args = argparse.Namespace(backbone="resnet50", dilation=False, lr=1e-4, dataset_file="coco")
    path = tmp_path_factory.mktemp("official") / "detr-r50.pth"
    torch.save({"model": state, "args": args, "epoch": 299}, path)
    return path, state


@pytest.mark.parametrize("name", DETECTORS + SEGMENTERS)
def test_every_name_builds_locally_without_a_download(name):
    model = load(name)
    detr = getattr(model, "detr", model)
    assert detr.num_queries == 100
    assert detr.class_embed.out_features == (251 if "panoptic" in name else 92)
    dilated = detr.backbone[0].body.layer4[1].conv2.dilation == (2, 2)
    assert dilated == ("dc5" in name)
    assert len(detr.backbone[0].body.layer3) == (23 if "101" in name else 6)


def test_the_listing_shows_the_seven_names_and_their_help():
    entries = [name for name in vars(hubconf) if name.startswith("detr_")]
    assert sorted(entries) == sorted(DETECTORS + SEGMENTERS)
    assert all("COCO val5k" in getattr(hubconf, name).__doc__ for name in entries)


def test_postprocessors_come_along_when_asked():
    model, postprocess = load("detr_resnet50", return_postprocessor=True)
    with torch.no_grad():
        outputs = model.eval()([torch.zeros(3, 32, 32, dtype=torch.uint8)])
    (found,) = postprocess(outputs, torch.tensor([[64, 96]]))
    assert found["boxes"].shape == (100, 4) and "aux_outputs" not in outputs


def test_a_file_in_the_official_layout_loads_strictly_by_path(official):
    path, state = official
    model = load("detr_resnet50", pretrained=str(path))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_91_classes_into_2_keep_all_but_the_class_head_and_say_so(official, caplog):
    path, state = official
    caplog.set_level("INFO", "detr")
    model = load("detr_resnet50", pretrained=path, num_classes=2)
    assert model.class_embed.out_features == 3
    assert "class head re-initialised: 91 classes there, 2 here" in caplog.text
    own = model.state_dict()
    assert all(torch.equal(own[name], state[name]) for name in own if not name.startswith("class_embed"))


@pytest.mark.slow
def test_the_published_weights_are_asked_for_by_address_and_hash(official, monkeypatch):
    asked = []

    def download(url, target, hash_prefix=None, **_):
        asked.append((url, hash_prefix))
        Path(target).symlink_to(official[0])

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    with monkeypatch.context() as patch:
        patch.setattr("util.download.sha256", lambda _: "e632da11" + 56 * "0")
        hubconf.detr_resnet50(pretrained=True)
        hubconf.detr_resnet50(pretrained=True)  # from the cache
    assert asked == [("https://dl.fbaipublicfiles.com/detr/detr-r50-e632da11.pth", "e632da11")]
    with pytest.raises(ValueError, match="detr-r50-e632da11.pth: its contents do not have the hash in its name"):
        hubconf.detr_resnet50(pretrained=True)  # a file that somebody put there


def test_an_address_that_does_not_answer_is_told_with_the_remedy():
    with pytest.raises(OSError, match="detr-r101-2c7b67e5.pth could not be downloaded .*pretrained='path/to/detr-r101"):
        load("detr_resnet101", pretrained=True)


@pytest.mark.parametrize(
    ("classes", "message"), [(91, "detr-r50.pth does not fit this model"), (2, "another backbone")]
)
def test_a_file_of_another_architecture_is_refused_in_a_sentence(official, classes, message):
    with pytest.raises(ValueError, match=message):
        load("detr_resnet101", pretrained=official[0], num_classes=classes)


def test_a_truncated_file_is_refused_in_a_sentence(official, tmp_path):
    path = tmp_path / "cut.pth"
    path.write_bytes(official[0].read_bytes()[:1_000_000])
    with pytest.raises(ValueError, match="cut.pth: not a readable checkpoint"):
        load("detr_resnet50", pretrained=path)


PUBLISHED = {
    "detr_resnet50": "detr-r50-e632da11.pth",
    "detr_resnet50_dc5": "detr-r50-dc5-f0fb7ef5.pth",
    "detr_resnet101": "detr-r101-2c7b67e5.pth",
    "detr_resnet101_dc5": "detr-r101-dc5-a2e86def.pth",
    "detr_resnet50_panoptic": "detr-r50-panoptic-00ce5173.pth",
    "detr_resnet50_dc5_panoptic": "detr-r50-dc5-panoptic-da08f1b1.pth",
    "detr_resnet101_panoptic": "detr-r101-panoptic-40021d53.pth",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_each_name_asks_for_its_own_file(name, monkeypatch):
    asked = []
    monkeypatch.setattr(hubconf, "_load", lambda model, file, pretrained: asked.append(file))
    model, read_out = getattr(hubconf, name)(return_postprocessor=True)
    assert asked == [PUBLISHED[name]] and getattr(read_out, "threshold", 0.85) == 0.85
    trained = [name for name, p in model.named_parameters() if "body" in name and p.requires_grad]
    assert {name.split(".body.")[1].split(".")[0] for name in trained} == {"layer2", "layer3", "layer4"}


@pytest.mark.parametrize("name", ["detr_resnet50", "detr_resnet50_panoptic"])
@pytest.mark.parametrize("classes", [0, -1])
def test_numbers_of_classes_below_one_are_refused(name, classes):
    with pytest.raises(ValueError, match=f"num_classes={classes}: .*at least 1"):
        getattr(hubconf, name)(num_classes=classes)


@pytest.mark.parametrize("threshold", [float("nan"), -0.1, 1.5])
def test_thresholds_that_are_no_score_are_refused(threshold):
    with pytest.raises(ValueError, match=f"threshold={threshold}"):
        hubconf.detr_resnet50_panoptic(threshold=threshold)


@pytest.mark.parametrize("flags", ["--dilation --backbone resnet50 --nheads 2", "--masks --hidden_dim 128 --nheads 8"])
@pytest.mark.parametrize("kind", [dict, argparse.Namespace])  # of this project's checkpoints, of DETR's
@pytest.mark.slow
def test_entry_for_any_checkpoint_builds_what_it_describes(flags, kind, tmp_path):
    args = parse(f"{flags} --num_classes 5 --dataset_file coco_panoptic")
    model = build_model(args)[0].eval()
    saved = kind(**{name: value for name, value in vars(args).items() if name not in NEW_FLAGS})
    torch.save({"model": model.state_dict(), "args": saved}, tmp_path / "any.pth")
    folder = Path(hubconf.__file__).parent
    file = str(tmp_path / "any.pth")
    ours, postprocessor = torch.hub.load(folder, "detr", file, return_postprocessor=True, source="local")
    images = torch.rand(1, 3, 64, 96)
    expected, got = model(images), ours.eval()(images)
    assert torch.equal(expected["pred_logits"], got["pred_logits"]) and ("pred_masks" in got) == args.masks
    assert isinstance(postprocessor, PostProcessPanoptic if args.masks else PostProcess)
    assert type(torch.hub.load(folder, "detr", file, source="local")) is type(model)


def test_entry_for_any_checkpoint_refuses_one_that_does_not_say_its_architecture(tmp_path):
    torch.save({"model": build_model(parse())[0].state_dict()}, tmp_path / "bare.pth")
    with pytest.raises(ValueError, match="bare.pth does not say its architecture"):
        hubconf.detr(tmp_path / "bare.pth")
