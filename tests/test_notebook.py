"""The notebooks: each runs to its end without a network, and the demo's 50 lines are our DETR R50."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hubconf
import main
from datasets.coco_names import COCO_NAMES
from datasets.json_file import read_json
from datasets.panoptic_eval import PanopticEvaluator
from tests.helpers import parse
from tools.predictor import Predictor

pytestmark = pytest.mark.slow

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
NOTEBOOK = NOTEBOOKS / "detr_demo.ipynb"
NOWHERE = "http://127.0.0.1:9"  # a proxy that refuses: no test reaches the network


@pytest.fixture(scope="module")
def cells():
    content = json.loads(NOTEBOOK.read_text())
    return ["".join(cell["source"]) for cell in content["cells"] if cell["cell_type"] == "code"]


def test_runs_from_top_to_bottom_without_a_network(cells, tmp_path):
    script = tmp_path / "notebook.py"
    script.write_text("\n".join([*cells, 'plt.savefig("drawn.png")']))
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "no_proxy", "NO_PROXY")}
    env |= {"http_proxy": NOWHERE, "https_proxy": NOWHERE, "TORCH_HOME": str(tmp_path), "MPLBACKEND": "agg"}
    run = subprocess.run([sys.executable, "-I", script.name], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "The model stays UNTRAINED" in run.stdout and "41.5 million parameters" in run.stdout
    assert "here is a drawing instead" in run.stdout
    assert run.stdout.count("  at [") == 3
    assert (tmp_path / "drawn.png").stat().st_size > 5000


def test_the_simplified_model_is_ours(cells):
    scope = {}
    exec("\n".join(cells[:3]), scope)
    code = [line for line in cells[2].splitlines() if line.strip() and '"""' not in line]
    assert len(code) <= 50
    torch.manual_seed(0)
    ours = hubconf.detr_resnet50().eval()
    simple = scope["DETR"]().eval()
    simple.load_state_dict(ours.state_dict())
    image = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        logits, boxes = simple(image)
        expected = ours(image)
    torch.testing.assert_close(logits, expected["pred_logits"][0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(boxes, expected["pred_boxes"][0], rtol=1e-4, atol=1e-4)


def test_the_names_are_cocos(cells):
    text = next(cell for cell in cells if "NAMES =" in cell)
    scope = {}
    exec(text[text.index("NAMES") : text.index(".split()") + 8], scope)
    assert {i: name.replace("_", " ") for i, name in enumerate(scope["NAMES"]) if name != "-"} == {
        i: name for i, name in COCO_NAMES.items() if i <= 90
    }


SHAPES = "--coco_path {0}/data --shapes_train 16 --shapes_val 2 --shapes_size 64 --shapes_classes 2 --augment flip"
TRAINING = "--lr 1e-3 --batch_size 4 --backbone_norm batch --lr_backbone 1e-3 --dropout 0 --pre_norm"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a training of seconds, with data/ and boxes/ and masks/checkpoint.pth."""
    for package in ("nbclient", "ipykernel"):
        pytest.importorskip(package, reason=f"needs {package}: pip install -r requirements-dev.txt")
    root = tmp_path_factory.mktemp("notebooks")
    flags = f"{SHAPES} {TRAINING}".format(root)
    main.main(parse(f"--dataset_file shapes {flags} --epochs 1 --output_dir {root}/boxes"))
    head = "--masks --hidden_dim 128 --nheads 8 --dataset_file shapes_panoptic"
    main.main(parse(f"{flags} {head} --epochs 6 --eval_every 6 --output_dir {root}/masks"))
    return root


def execute(name, choice, monkeypatch, tmp_path):
    """Run a notebook in Jupyter, its first code cell replaced by the values of `choice`; return text and pictures."""
    import nbclient
    import nbformat

    book = nbformat.read(NOTEBOOKS / name, as_version=4)
    first = next(cell for cell in book.cells if cell.cell_type == "code")
    assert [line.split(" = ")[0] for line in first.source.splitlines()] == list(choice)
    first.source = "\n".join(f"{key} = {value!r}" for key, value in choice.items())
    for variable in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(variable, NOWHERE)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    nbclient.NotebookClient(book, timeout=300, resources={"metadata": {"path": NOTEBOOKS}}).execute()
    outputs = [output for cell in book.cells for output in cell.get("outputs", ())]
    errors = [output.text for output in outputs if output.get("name") == "stderr"]
    assert not [text for text in errors if "Warning" in text], errors
    text = "".join(output.text for output in outputs if output.output_type == "stream")
    return text, sum("image/png" in output.get("data", ()) for output in outputs)


@pytest.mark.parametrize("name", sorted(path.name for path in NOTEBOOKS.glob("*.ipynb")))
def test_notebook_has_no_outputs_in_the_repository(name):
    for cell in json.loads((NOTEBOOKS / name).read_text())["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None, f"{cell['id']}: strip its outputs"


def test_demo_notebook_in_jupyter_reads_weights_and_image_from_paths(run, monkeypatch, tmp_path):
    torch.manual_seed(0)
    model = hubconf.detr_resnet50()
    torch.nn.init.constant_(model.class_embed.bias, -30)
    torch.nn.init.constant_(model.class_embed.bias[18], 30)  # every query finds a dog
    torch.save({"model": model.state_dict()}, tmp_path / "r50.pth")
    photo = next((run / "data" / "val2017").iterdir())
    choice = {"WEIGHTS": str(tmp_path / "r50.pth"), "IMAGE": str(photo)}
    text, pictures = execute("detr_demo.ipynb", choice, monkeypatch, tmp_path)
    assert "weights loaded: " in text and "UNTRAINED" not in text and "drawing" not in text
    assert text.count("dog             1.00") == 100 and pictures == 1


def test_hands_on_notebook_shows_predictions_and_attention(run, monkeypatch, tmp_path):
    photo = sorted((run / "data" / "val2017").iterdir())[0]
    checkpoint = str(run / "boxes" / "checkpoint.pth")
    choice = {"CHECKPOINT": checkpoint, "IMAGE": str(photo), "SIDE": 64, "THRESHOLD": 0.0}
    text, pictures = execute("hands_on.ipynb", choice, monkeypatch, tmp_path)
    found = Predictor.from_checkpoint(checkpoint, "cpu")(photo, threshold=0)
    for label, score in zip(found.labels.tolist(), found.scores.tolist(), strict=True):
        assert f"{found.name(label)} {score:.2f}" in text
    assert "2 decoder layers, each [1, 4, 8, " in text and "1 encoder layers, each [1, 4, " in text
    assert pictures == 5  # the photograph, the boxes; queries, heads, cells
    choice |= {"THRESHOLD": 1.0, "CHECKPOINT": str(run / "masks" / "checkpoint.pth")}
    text, pictures = execute("hands_on.ipynb", choice, monkeypatch, tmp_path)
    assert "the three best predictions are shown instead" in text and pictures == 5


def write_truth(folder, file_name, found, categories):
    """Write as the truth the segments that were found, the first of them with another class; return the file."""
    first, *others = found.segments
    other = next(c["id"] for c in categories if c["id"] != first["category_id"])
    segments = [{**segment, "iscrowd": 0} for segment in ({**first, "category_id": other}, *others)]
    content = {
        "images": [{"id": 5, "file_name": file_name}],
        "annotations": [{"image_id": 5, "file_name": "5.png", "segments_info": segments}],
        "categories": categories,
    }
    (folder / "annotations").mkdir()
    (folder / "panoptic_mine").mkdir()
    (folder / "panoptic_mine" / "5.png").write_bytes(found.panoptic_png)
    (folder / "annotations" / "panoptic_mine.json").write_text(json.dumps(content))
    return folder / "annotations" / "panoptic_mine.json"


def test_panoptic_notebook_shows_segments_and_the_pq_of_the_image(run, monkeypatch, tmp_path):
    photo = sorted((run / "data" / "val2017").iterdir())[0]
    checkpoint = str(run / "masks" / "checkpoint.pth")
    found = Predictor.from_checkpoint(checkpoint, "cpu")(photo, threshold=0.2)
    assert len(found.segments) > 1
    categories = read_json(run / "data" / "annotations" / "panoptic_val2017.json")["categories"]
    truth = write_truth(tmp_path, photo.name, found, categories)
    evaluator = PanopticEvaluator(truth, tmp_path / "panoptic_mine", None)
    evaluator.update([{"image_id": 5, "png_string": found.panoptic_png, "segments_info": found.segments}])
    evaluator.synchronize_between_processes()
    quality = evaluator.summarize()["All"]["pq"]
    choice = {"CHECKPOINT": checkpoint, "IMAGE": str(photo), "TRUTH": str(truth), "SIDE": 64, "THRESHOLD": 0.2}
    text, pictures = execute("panoptic.ipynb", choice, monkeypatch, tmp_path)
    assert f"{len(found.segments)} segments with scores above 0.2" in text
    assert 0 < quality < 1 and f"PQ of this image: {100 * quality:.1f}" in text
    assert pictures == 4  # the photograph, the masks, the segments, the true segments
    text, pictures = execute("panoptic.ipynb", choice | {"TRUTH": None}, monkeypatch, tmp_path)
    assert "no TRUTH given" in text and pictures == 3
