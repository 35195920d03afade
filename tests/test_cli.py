"""The command lines: help without PyTorch, errors in one sentence, and faults with their traceback."""

import subprocess
import sys
from pathlib import Path

import pytest

from util.cli import exit_status

ROOT = Path(__file__).parent.parent


def command(*words, **options):
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, **options)


def test_help_and_misspelt_flags_are_answered_without_pytorch(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('imported')")
    environment = {"PYTHONPATH": str(tmp_path), "COLUMNS": "80"}
    done = command(ROOT / "main.py", "--help", env=environment)
    assert done.returncode == 0 and "--coco_path" in done.stdout
    assert max(map(len, done.stdout.split("optimisation:")[1].splitlines())) <= 80
    assert "\npython main.py --coco_path /data/coco --eval --resume FILE_OR_URL" in done.stdout
    done = command(ROOT / "main.py", "--batchsize", "2", env=environment)
    assert done.returncode == 2 and "--batchsize" in done.stderr
    assert "imported" in command(ROOT / "main.py", env=environment).stderr


@pytest.mark.slow
def test_main_ends_with_one_sentence_for_an_error_that_a_user_can_correct(tmp_path):
    for flags in (["--coco_path", "gone", "--backbone_weights", "none"], ["--lr", "nan"]):
        done = command(ROOT / "main.py", *flags, cwd=tmp_path)
        assert done.returncode == 2
        assert done.stderr.splitlines()[-1].startswith("error: ") and "Traceback" not in done.stderr


def test_exit_status_shows_the_traceback_of_a_fault_in_the_code():
    with pytest.raises(ValueError, match="unpack"):
        exit_status(lambda: [a for a, b in [(1, 2, 3)]])
    with pytest.raises(ZeroDivisionError):
        exit_status(lambda: 1 / 0)


def test_exit_status_of_errors_interruption_and_success(capsys):
    def refuse():
        raise ValueError("no \x1b[31m such flag")

    def interrupt():
        raise KeyboardInterrupt

    assert exit_status(refuse) == 2
    assert capsys.readouterr().err == "error: no \\x1b[31m such flag\n"
    assert exit_status(lambda: open("/gone/file")) == 2
    assert exit_status(interrupt) == 130
    assert exit_status(lambda: None) == 0 and exit_status(lambda: 1) == 1


def test_project_file_names_what_exists():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    setuptools = project["tool"]["setuptools"]
    assert all((ROOT / package / "__init__.py").is_file() for package in setuptools["packages"])
    scripts = {path.stem for path in ROOT.glob("*.py")}
    assert set(setuptools["py-modules"]) == scripts
    for target in project["project"]["scripts"].values():
        module, function = target.split(":")
        assert callable(getattr(__import__(module, fromlist=[function]), function))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, message",
    [
        ("train", "unrecognized arguments: --nonsense"),
        ("predict", "the following arguments are required: inputs"),
    ],
)
def test_installed_commands_run_the_scripts(name, message, tmp_path):
    code = f"import sys; sys.argv[1:] = ['--nonsense']; from util import cli; cli.{name}()"
    done = command("-c", code, env={"PYTHONPATH": str(ROOT)}, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr
