"""Each row of docs/extending.md: its edits are applied to a copy of the project, and its command is run there."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import TINY

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text()
SECTIONS = {
    title: text for title, text in re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
}
PARTS = ("models", "datasets", "util", "engine.py", "main.py")

pytestmark = pytest.mark.slow


@pytest.fixture
def project(tmp_path):
    """A copy of the project's Python files."""
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / part, tmp_path / part)
    return tmp_path


def apply_edits(section, project):
    """Apply the edits of a section: ```diff blocks with a line `# file` on top, and ```python blocks of new files."""
    blocks = re.findall(r"^```(diff|python)\n# (\S+\.py)\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    assert blocks, "the section shows no edit"
    for kind, name, body in blocks:
        path = project / name
        if kind == "python":
            path.write_text(body)
            continue
        lines = body.splitlines(keepends=True)
        before = "".join(line[1:] for line in lines if not line.startswith("+"))
        after = "".join(line[1:] for line in lines if not line.startswith("-"))
        text = path.read_text()
        assert text.count(before) == 1, f"{name} has these lines {text.count(before)} times:\n{before}"
        path.write_text(text.replace(before, after))


def run(project, coco_root, section):
    """Run the section's command, with the flags of a tiny model; return what it printed."""
    (flags,) = re.findall(r"^```\npython main.py(.*?)\n```", section, re.MULTILINE | re.DOTALL)
    command = [
        sys.executable,
        "main.py",
        *TINY.split(),
        "--coco_path",
        str(coco_root),
        "--output_dir",
        str(project / "out"),
    ]
    done = subprocess.run([*command, "--epochs", "1", *flags.split()], cwd=project, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + (project / "out" / "log.txt").read_text()


@pytest.mark.parametrize("title", SECTIONS)
def test_extending_row_works_as_documented(title, project, coco_root):
    section = SECTIONS[title]
    apply_edits(section, project)
    (expected,) = re.findall(r"<!-- expect: (.*?) -->", section)
    printed = run(project, coco_root, section)
    assert re.search(expected, printed), f"no {expected} in:\n{printed[-4000:]}"
