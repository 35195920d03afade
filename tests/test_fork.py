"""A fork with its own dataset, head, matcher, loss, post-processor and training script runs on unchanged files."""

import math

import pytest

from tests.fork import dataset, main
from util.checkpoint import load_checkpoint


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """No ImageNet weights: the fork does not know the flag that would switch them off."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))

    def refuse(*args, **kwargs):
        raise OSError("no network in tests")

    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)


def test_fork_trains_and_evaluates_with_its_own_loss_in_the_log(coco_root, tmp_path):
    flags = ["--coco_path", str(coco_root), "--output_dir", str(tmp_path)]
    log = main.main(main.get_args_parser().parse_args(flags))
    for name in ("loss", "loss_quality", "loss_quality_0", "loss_quality_unscaled", "class_error"):
        assert math.isfinite(log[f"train_{name}"]) and math.isfinite(log[f"test_{name}"]), name
    assert "train_loss_quality_1" not in log and len(log["test_coco_eval_bbox"]) == 12
    state = load_checkpoint(tmp_path / "checkpoint.pth")
    assert "quality_embed.layers.1.weight" in state["model"]


def test_fork_dataset_items_are_normalised_floats_with_its_own_entry(coco_root):
    args = main.get_args_parser().parse_args(["--coco_path", str(coco_root)])
    image, target = dataset.build("train", args)[0]
    assert image.is_floating_point() and image.min() < -0.5
    assert len(target["quality"]) == len(target["boxes"]) == 2
    assert target["boxes"].max() <= 1
