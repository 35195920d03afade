"""The table of the published models: what is counted, timed and evaluated, on small images. No time is asserted."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import hubconf
from tests.helpers import write_panoptic
from tools import model_table
from util.cli import exit_status

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
SMALL = "--device cpu --min_size 64 --max_size 96 --num_workers 0 --models"


def run(flags):
    return exit_status(lambda: model_table.main(flags.split()))


def row_of(text):
    """The cells of the table's last row."""
    return [cell.strip() for cell in text.strip().splitlines()[-1].strip("|").split("|")]


class Layers(nn.Module):
    """A convolution of 3 to 8 channels, and attention of the pixels with each other."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(3, 8, 3, padding=1).requires_grad_(False)

    def forward(self, images):
        x = self.convolution(images[0][None]).flatten(2).transpose(1, 2)[:, None]
        return nn.functional.scaled_dot_product_attention(x, x, x)


def test_gflops_are_multiply_adds_counted_once_as_the_mean_over_images():
    small, large = (torch.zeros(3, 4, 5), {}), (torch.zeros(3, 8, 5), {})
    expected = [20 * 3 * 9 * 8 + 2 * 20 * 20 * 8, 40 * 3 * 9 * 8 + 2 * 40 * 40 * 8]
    counted = model_table.count_gflops(Layers(), [small, small, large, small], CPU)
    assert counted * 1e9 == pytest.approx((3 * expected[0] + expected[1]) / 4)


def networks(model):
    """The shapes of a model's weights, and the dilations of its convolutions."""
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    return shapes, [m.dilation for m in model.modules() if isinstance(m, nn.Conv2d)]


def test_models_of_the_table_are_those_of_hubconf_with_their_files(monkeypatch):
    asked = []
    monkeypatch.setattr(hubconf, "_load", lambda model, file, pretrained: asked.append((file, model)))
    for name, (file, flags, _) in model_table.MODELS.items():
        model = getattr(hubconf, name)()
        assert asked[-1][0] == file
        args = model_table.training_flags(model_table.get_args_parser().parse_args(["--device", "cpu"]), flags)
        ours = model_table.build_model(args)[0]
        shapes, dilations = zip(*(networks(each) for each in (ours, model)), strict=True)
        assert shapes[0] == shapes[1] and dilations[0] == dilations[1]
    assert set(model_table.MODELS) == {name for name in dir(hubconf) if name.startswith("detr_")}


def test_published_figures_are_those_of_the_pages():
    root = Path(model_table.__file__).parents[1]
    pages = (root / "README.md").read_text() + (root / "docs" / "masks.md").read_text()
    for file, flags, (_, _, seconds, size, score) in model_table.MODELS.values():
        if model_table.PANOPTIC in flags:
            name = file.removeprefix("detr-").split("-panoptic")[0].upper()
            assert re.search(rf"\| {name} \| [\d.]+ \| [\d.]+ \| {score} \| {size} MB \|", pages)
        else:
            assert f"| {score} | {seconds:.3f} | {size} MB | `https://dl.fbaipublicfiles.com/detr/{file}` |" in pages


def test_table_on_noise_prints_ours_beside_the_published(capsys, tmp_path):
    assert run(f"{SMALL} detr_resnet50 --count 2 --output {tmp_path / 'table.md'}") == 0
    text = capsys.readouterr().out
    assert "2 images of noise, 640x480 pixels; CPU, 1 threads; torch" in text
    assert text.endswith((tmp_path / "table.md").read_text())
    name, *cells = row_of(text)
    assert name == "detr_resnet50" and cells[1::2] == ["41", "86", "0.036", "159", "42.0"]
    assert cells[0] == "41.5" and float(cells[2]) > 1 and float(cells[4]) > 0 and cells[6] == "159"
    assert cells[8] == "-"


def test_table_with_data_and_weights_has_the_file_and_ap(coco_root, tmp_path, monkeypatch, capsys):
    file = model_table.MODELS["detr_resnet50"][0]
    torch.save(
        {"model": hubconf.detr_resnet50(num_classes=4).state_dict(), "more": torch.zeros(2**20)}, tmp_path / file
    )
    ran, evaluate = [], model_table.evaluate
    monkeypatch.setattr(model_table, "evaluate", lambda *parts: ran.append(evaluate(*parts)) or ran[0])
    assert run(f"{SMALL} detr_resnet50 --coco_path {coco_root} --weights {tmp_path}") == 0
    text = capsys.readouterr().out
    cells = row_of(text)
    assert f"3 images of {coco_root}; CPU" in text  # val has no more
    assert cells[7] == f"{(tmp_path / file).stat().st_size / 2**20:.0f}" and int(cells[7]) > 160
    assert cells[9] == f"{100 * ran[0][0]['coco_eval_bbox'][0]:.1f}" and len(ran) == 1
    monkeypatch.setattr(model_table, "evaluate", lambda *parts: ({"coco_eval_bbox": [0.4206]}, None))
    assert run(f"{SMALL} detr_resnet50 --coco_path {coco_root} --weights {tmp_path}") == 0
    assert row_of(capsys.readouterr().out)[9:] == ["42.1", "42.0"]


def test_table_with_panoptic_data_has_pq(tmp_path, monkeypatch, capsys):
    ids = torch.ones(48, 64, dtype=torch.int64)
    ids[:20] = 2
    write_panoptic(tmp_path / "data", {1: (ids.numpy(), {1: (1, 0), 2: (7, 0)})})
    file = model_table.MODELS["detr_resnet50_panoptic"][0]
    torch.save(hubconf.detr_resnet50_panoptic().state_dict(), tmp_path / file)
    flags = f"{SMALL} detr_resnet50_panoptic --weights {tmp_path} --coco_panoptic_path {tmp_path}/data"
    monkeypatch.setattr(model_table, "images_of", lambda options: [(torch.zeros(3, 64, 64), {})])
    assert run(f"{flags} --coco_path {tmp_path}/data") == 0
    assert row_of(capsys.readouterr().out)[7:] == ["164", "165", "0.0", "43.4"]
    monkeypatch.setattr(
        model_table, "evaluate", lambda *parts: ({"coco_eval_bbox": [0.3], "PQ_all": {"pq": 0.4}}, None)
    )
    assert run(f"{flags} --coco_path {tmp_path}/data") == 0
    assert row_of(capsys.readouterr().out)[9:] == ["40.0", "43.4"]


def test_table_without_a_models_weights_says_so(tmp_path, capsys):
    assert run(f"{SMALL} detr_resnet50 --count 1 --weights {tmp_path}") == 0
    text = capsys.readouterr().out
    assert "detr-r50-e632da11.pth: no such file, so detr_resnet50 has random weights" in text
    assert row_of(text)[9] == "-"


@pytest.mark.parametrize(("flags", "message"), [
    ("--count 0", "--count and --min_size are at least 1"),
    ("--min_size 64 --max_size 32", "--max_size is not below"),
    ("--noise_size 640", "--noise_size 640: give WIDTHxHEIGHT"),
    ("--noise_size 0x5", "--noise_size 0x5: give WIDTHxHEIGHT"),
    ("--weights gone", "--weights gone: no such folder"),
    ("--coco_path gone", "gone"),
])  # fmt: skip
def test_table_with_meaningless_flags_is_refused(flags, message, capsys):
    assert run(f"--device cpu {flags}") == 2
    assert message in capsys.readouterr().err
