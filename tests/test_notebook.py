"""The demo notebook: it runs without a network and without this project, and its 50 lines are our DETR R50."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hubconf
from datasets.coco_names import COCO_NAMES

pytestmark = pytest.mark.slow

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "detr_demo.ipynb"
NOWHERE = "http://127.0.0.1:9"  # a proxy that refuses: no test reaches the network


@pytest.fixture(scope="module")
def cells():
    content = json.loads(NOTEBOOK.read_text())
    assert not any(cell.get("outputs") for cell in content["cells"]), "outputs are left out of the repository"
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
    exec("\n".join(cells[:2]), scope)
    code = [line for line in cells[1].splitlines() if line.strip() and '"""' not in line]
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
