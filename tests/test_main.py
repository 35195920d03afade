"""Whole runs, small: train, stop, resume, evaluate, and what is left on disk."""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import engine
import main
import run_with_submitit
from tests.helpers import TINY, loader_of, parse
from util.interruption import SIGNALS, Interruption
from util.recipes import parse_args
from util.run import Run

pytestmark = pytest.mark.slow

DATA = Path(__file__).parent / "data"


def run(flags):
    main.main(parse(flags))


def test_flags_keep_the_published_names_and_defaults():
    own = {a.option_strings[0]: [a.dest, a.default] for a in main.get_args_parser()._actions}
    for flag, expected in json.loads((DATA / "flags.json").read_text()).items():
        assert own[flag] == expected, flag


def test_every_flag_is_explained_and_names_are_told_in_the_help():
    assert all(action.help for action in main.get_args_parser()._actions)
    text = subprocess.run([sys.executable, "main.py", "--help"], capture_output=True, text=True, check=True).stdout
    assert "--coco_path" in text and "optimisation:" in text and "(default: 0.0001)" in text


@pytest.mark.parametrize("flags, words", [
    ("--frozen_weights x.pth", "add --masks"), ("--nheads 5", "--nheads 5"), ("--device gpu", "--device gpu"),
    ("--resume auto", "--output_dir"), ("--min_size 900 --max_size 800", "--max_size 800"),
    ("--hidden_dim 34 --nheads 2", "multiple of 4"), ("--dropout 1", "--dropout 1.0: give less than 1"),
    ("--decoder_delay 1", "--decoder_delay 1.0: a share"),
    ("--eval --masks --frozen_weights x.pth", "give --resume"), ("--epochs 3 --start_epoch 3", "--start_epoch 3"),
    ("--backbone_norm batch --lr_backbone 0", "lr_backbone"), ("--masks", "--masks with --hidden_dim 32"),
    ("--position_embedding learned --max_size 1601", "--max_size 1601: learned .* 32 pixels; give 1600 or less"),
    ("--position_embedding learned --max_size 801 --dilation", "give 800 or less"),
    ("--position_embedding learned --max_size 201 --masks --hidden_dim 128 --nheads 8", "give 200 or less"),
])  # fmt: skip
def test_contradictions_are_refused_in_a_sentence(flags, words):
    with pytest.raises(ValueError, match=words):
        run(flags)


def test_an_evaluation_package_that_is_not_installed_is_refused_at_the_start(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install hotcoco"):
        run("--coco_eval hotcoco --coco_path nowhere")


@pytest.mark.parametrize("value", ["nan", "inf", "-1"])
@pytest.mark.parametrize("parse_flags, check", [
    (parse, main.check_flags),
    (lambda text: run_with_submitit.parse_args(text.split()), run_with_submitit.main),
], ids=["main", "submitit"])  # fmt: skip
def test_numbers_that_no_flag_takes_are_refused_by_name_and_value(parse_flags, check, value):
    numbers = {name: type(number) for name, number in vars(parse_flags("")).items() if type(number) in (int, float)}
    numbers |= {"num_classes": int, **({"mem_gb": int} if check is run_with_submitit.main else {})}
    for name, kind in numbers.items():
        if kind is float or value == "-1":
            with pytest.raises(ValueError, match=rf"--{name} {value}(\.0)?: give "):
                check(parse_flags(f"--{name} {value}"))


@pytest.mark.parametrize("flag", ["epochs", "batch_size", "print_freq", "num_classes", "min_size", "nheads", "lr_drop"])
def test_zero_is_refused_where_it_makes_no_sense(flag):
    with pytest.raises(ValueError, match=f"--{flag} 0: give 1 or more"):
        main.check_flags(parse(f"--{flag} 0"))


def test_learned_positions_that_just_fit_are_accepted():
    for flags in ("--max_size 1600", "--max_size 800 --dilation", "--max_size 200 --masks --hidden_dim 128 --nheads 8"):
        main.check_flags(parse(f"--position_embedding learned {flags}"))


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of three epochs, and its flags."""
    root = tmp_path_factory.mktemp("run")
    from tests.helpers import write_coco

    objects = [(11, 1, [4, 4, 20, 30], {}), (11, 3, [30, 10, 25, 25], {}), (12, 1, [10, 5, 30, 30], {})]
    write_coco(root / "coco", "train", [11, 12, 13, 14], objects)
    write_coco(root / "coco", "val", [11, 12, 13], objects)
    flags = f"--coco_path {root}/coco --batch_size 2 --epochs 3 --lr_drop 2 --seed 3"
    run(f"{flags} --output_dir {root}/whole")
    return root, flags


def test_a_run_leaves_log_checkpoints_curves_and_predictions(finished):
    root, _ = finished
    names = {str(p.relative_to(root / "whole")) for p in (root / "whole").rglob("*") if p.is_file()}
    assert names == {
        ".lock", "checkpoint.pth", "checkpoint0001.pth", "checkpoint_best.pth", "log.txt", "messages.log", "curves.png",
        "predictions_bbox.json", "eval/latest.pth", "eval/000.pth",
    }  # fmt: skip
    rows = log_of(root / "whole")
    assert [row["epoch"] for row in rows] == [0, 1, 2]
    assert len(rows[0]["test_coco_eval_bbox"]) == 12 and rows[0]["n_parameters"] > 0
    assert rows[0]["train_lr"] == 1e-4 and rows[2]["train_lr"] == pytest.approx(1e-5)
    checkpoint = torch.load(root / "whole" / "checkpoint.pth", weights_only=True)
    assert {"model", "optimizer", "lr_scheduler", "epoch", "args"} <= set(checkpoint)
    assert checkpoint["epoch"] == 2 and checkpoint["args"]["num_classes"] == 4
    assert checkpoint["class_names"] == {1: "cat", 3: "dog"}


def test_a_resumed_run_gives_the_same_bits(finished):
    root, flags = finished
    run(f"{flags} --output_dir {root}/halves --epochs 1")
    torch.rand(7)  # whatever happens between the two
    run(f"{flags} --output_dir {root}/halves --resume auto --num_workers 1")
    ends = [torch.load(root / name / "checkpoint.pth", weights_only=True) for name in ("whole", "halves")]
    for name, value in ends[0]["model"].items():
        assert torch.equal(value, ends[1]["model"][name]), name
    for whole, halves in zip(log_of(root / "whole"), log_of(root / "halves"), strict=True):
        assert whole == halves


def interrupt(monkeypatch, where, action):
    """Run an action in the middle of a step, before the weights change; the step is named as in `epoch 1, step 0`."""
    norm_of, place = engine.gradient_norm, {"epoch": None, "step": 0}
    train = main.train_one_epoch

    def train_one_epoch(*args, state=None, **options):
        place.update(epoch=args[5], step=state.batches_done)
        return train(*args, state=state, **options)

    def gradient_norm(model):
        norm = norm_of(model)
        if where in (f"epoch {place['epoch']}", f"epoch {place['epoch']}, step {place['step']}"):
            action()
        place["step"] += 1
        return norm

    monkeypatch.setattr(main, "train_one_epoch", train_one_epoch)
    monkeypatch.setattr(engine, "gradient_norm", gradient_norm)


def assert_same_run(whole, pieces):
    states = [torch.load(folder / "checkpoint.pth", weights_only=True) for folder in (whole, pieces)]
    for name, value in states[0]["model"].items():
        assert torch.equal(value, states[1]["model"][name]), name
    assert log_of(whole) == log_of(pieces) and states[0]["best"] == states[1]["best"]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_a_run_after_its_step_and_no_bit_is_lost(finished, monkeypatch, tmp_path, number):
    root, flags = finished
    default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    before = signal.signal(number, default)  # a test runner under nohup ignores SIGHUP
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        interrupt(patch, "epoch 1, step 0", lambda: signal.raise_signal(number))
        run(f"{flags} --output_dir {tmp_path}")
    signal.signal(number, before)
    assert end.value.code == 128 + number and len(log_of(tmp_path)) == 1
    state = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    assert (state["epoch"], state["seen"]) == (0, 2)
    run(f"{flags} --output_dir {tmp_path} --resume auto --num_workers 1")
    assert_same_run(root / "whole", tmp_path)


def test_a_handler_that_was_there_before_has_its_turn_after_the_save(finished, monkeypatch, tmp_path):
    _, flags = finished
    calls = []
    before = signal.signal(signal.SIGUSR2, lambda *_: calls.append((tmp_path / "checkpoint.pth").exists()))
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        interrupt(patch, "epoch 0, step 0", lambda: signal.raise_signal(signal.SIGUSR2))
        run(f"{flags} --output_dir {tmp_path}")
    signal.signal(signal.SIGUSR2, before)
    assert calls == [True]


def test_an_error_in_mid_epoch_saves_the_steps_before_it(finished, monkeypatch, tmp_path):
    root, flags = finished
    for place, saved in (("epoch 1, step 1", (0, 2)), ("epoch 2, step 1", (1, 2))):
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="broken disk"):
            interrupt(patch, place, broken)
            run(f"{flags} --output_dir {tmp_path} --resume auto")
        state = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
        assert (state["epoch"], state["seen"]) == saved
    run(f"{flags} --output_dir {tmp_path} --resume auto")
    assert_same_run(root / "whole", tmp_path)


def test_a_kill_costs_no_more_than_the_steps_since_the_last_save(finished, monkeypatch, tmp_path):
    root, flags = finished
    for place in ("epoch 1, step 1", "epoch 2, step 1"):
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="broken disk"):
            patch.setattr(Run, "_save_after_error", lambda _: None)
            interrupt(patch, place, broken)
            run(f"{flags} --output_dir {tmp_path} --save_every_steps 1 --resume auto")
    run(f"{flags} --output_dir {tmp_path} --resume auto")
    assert_same_run(root / "whole", tmp_path)


def test_an_error_ends_the_process_though_it_has_workers(finished, tmp_path):
    _, flags = finished
    (tmp_path / "broken.py").write_text(
        "import engine, main, sys\n"
        "engine.gradient_norm = lambda *_: 1 / 0\n"
        "main.main(main.argparse.ArgumentParser(parents=[main.get_args_parser()]).parse_args())\n"
    )
    command = [sys.executable, str(tmp_path / "broken.py"), *TINY.split(), *flags.split(), "--num_workers", "2"]
    env = os.environ | {"PYTHONPATH": str(Path(main.__file__).parent)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=env)
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr


def test_a_crash_in_the_evaluation_costs_no_training(finished, monkeypatch, tmp_path):
    root, flags = finished
    with monkeypatch.context() as patch, pytest.raises(KeyError, match="evaluation"):
        patch.setattr(main, "evaluate", lambda *_, **__: {}["evaluation"])
        run(f"{flags} --output_dir {tmp_path}")
    with monkeypatch.context() as patch:  # what is done is not trained again
        interrupt(patch, "epoch 0", lambda: pytest.fail("trained again"))
        run(f"{flags} --output_dir {tmp_path} --resume auto")
    assert_same_run(root / "whole", tmp_path)


def test_a_row_whose_checkpoint_was_never_written_is_written_once(finished, monkeypatch, tmp_path):
    root, flags = finished
    with monkeypatch.context() as patch, pytest.raises(KeyError, match="killed"):
        patch.setattr(Run, "_draw", lambda *_: {}["killed"])
        run(f"{flags} --output_dir {tmp_path}")
    assert len(log_of(tmp_path)) == 1
    run(f"{flags} --output_dir {tmp_path} --resume auto")
    assert_same_run(root / "whole", tmp_path)


@pytest.mark.parametrize("changed, rates", [
    ("--lr 5e-5", [5e-6, 1e-5 / 10]), ("--lr_backbone 3e-5", [1e-5, 3e-6]), ("--lr_drop 5", [1e-4, 1e-5]),
    ("--weight_decay 0.5", [1e-5, 1e-5 / 10]),
])  # fmt: skip
def test_resume_with_changed_rates_uses_and_logs_them(finished, tmp_path, caplog, changed, rates):
    root, flags = finished
    caplog.set_level("INFO", "detr")
    run(f"{flags} {changed} --epochs 4 --resume {root}/whole/checkpoint.pth --output_dir {tmp_path}")
    assert [row["train_lr"] for row in log_of(tmp_path)] == [pytest.approx(rates[0])]
    args, state = parse(f"{flags} {changed}"), torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    assert state["lr_scheduler"]["base_lrs"] == [args.lr, args.lr_backbone]
    name, value = changed.split()
    assert re.search(f"flags changed since the checkpoint take effect: .*{name} ", caplog.text)
    groups = state["optimizer"]["param_groups"]
    assert groups[1]["lr"] == pytest.approx(args.lr_backbone * 0.1 ** (4 // args.lr_drop))
    assert {group["weight_decay"] for group in groups} == {args.weight_decay}


@pytest.mark.parametrize("schedule", [
    lambda args, optimizer, _: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=args.epochs),
    lambda args, optimizer, _: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1 / (1 + epoch)),
])  # fmt: skip
def test_resume_with_another_schedule_gives_the_same_bits(finished, tmp_path, monkeypatch, schedule):
    _, flags = finished
    monkeypatch.setattr("util.build_run.build_lr_scheduler", schedule)
    run(f"{flags} --output_dir {tmp_path}/whole")
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="broken"):
        interrupt(patch, "epoch 2, step 1", broken)
        run(f"{flags} --output_dir {tmp_path}/pieces")
    run(f"{flags} --output_dir {tmp_path}/pieces --resume auto")
    assert_same_run(tmp_path / "whole", tmp_path / "pieces")
    rates = [row["train_lr"] for row in log_of(tmp_path / "pieces")]
    assert rates[0] > rates[1] > rates[2]


def broken():
    raise RuntimeError("a broken disk")


def test_fewer_epochs_than_done_and_other_parameters_are_refused(finished):
    root, flags = finished
    whole = root / "whole" / "checkpoint.pth"
    with pytest.raises(ValueError, match="--epochs 2, but .* has trained 3 epochs"):
        run(f"{flags} --epochs 2 --resume {whole}")
    with pytest.raises(ValueError, match="checkpoint.pth: its optimizer trained other parameters.*--finetune"):
        run(f"{flags} --epochs 4 --lr_backbone 0 --resume {whole}")
    run(f"{flags} --resume {whole}")  # nothing left to do is no error: a requeued job may have finished


def test_resume_auto_starts_anew_where_there_is_nothing(finished, tmp_path):
    _, flags = finished
    run(f"{flags} --epochs 1 --output_dir {tmp_path} --resume auto")
    assert len(log_of(tmp_path)) == 1


def test_evaluating_a_checkpoint_gives_the_ap_it_was_saved_with(finished, tmp_path):
    root, flags = finished
    run(f"{flags} --eval --resume {root}/whole/checkpoint.pth --output_dir {tmp_path} --batch_size 3")
    assert {p.name for p in tmp_path.iterdir()} == {
        "eval.pth", "predictions_bbox.json", "classes_bbox.csv", "messages.log"
    }  # fmt: skip
    precision = torch.load(tmp_path / "eval.pth", weights_only=True)["precision"]
    ap = precision[:, :, :, 0, -1]
    assert ap[ap > -1].mean().item() == pytest.approx(log_of(root / "whole")[-1]["test_coco_eval_bbox"][0])


def test_evaluating_a_checkpoint_needs_no_flags_of_the_network(finished, caplog):
    root, flags = finished
    caplog.set_level("INFO", "detr")
    data = [word for word in re.findall(r"--coco_path \S+", flags)]
    command = f"--device cpu --num_workers 0 --eval --resume {root}/whole/checkpoint.pth {data[0]}"
    parser = argparse.ArgumentParser(parents=[main.get_args_parser()])
    main.main(parse_args(parser, command.split()))
    assert "--backbone resnet18" in caplog.text and "--hidden_dim 32" in caplog.text and "--min_size 64" in caplog.text
    caplog.clear()
    main.main(parse_args(parser, [*command.split(), "--min_size", "96", "--max_size", "128"]))
    assert "--min_size" not in next(line for line in caplog.messages if line.startswith(f"from {root}"))
    with pytest.raises(ValueError, match="does not fit this model"):
        main.main(parse_args(parser, [*command.split(), "--num_queries", "100"]))  # given, though it is the default


def test_convolutions_keep_their_digits_unless_tf32_is_asked_for(finished):
    root, flags = finished
    for more, allowed, products in (("--tf32", True, "high"), ("", False, "highest")):
        run(f"{flags} --eval --resume {root}/whole/checkpoint.pth {more}")
        assert torch.backends.cudnn.allow_tf32 == allowed and torch.get_float32_matmul_precision() == products


def test_without_padding_batch_size_does_not_change_the_predictions(finished, tmp_path):
    from tests.helpers import write_coco

    root, flags = finished
    for part, ids, sizes in (("train", [1, 2], (48, 64)), ("val", [1, 2, 3], (48, 64))):
        write_coco(tmp_path / "c", part, ids, [(1, 1, [4, 4, 20, 30], {})], sizes=sizes)
    from PIL import Image

    path = tmp_path / "c" / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text())
    content["images"][1].update(width=40)
    path.write_text(json.dumps(content))
    image = tmp_path / "c" / "val2017" / "000000000002.jpg"
    Image.open(image).crop((0, 0, 40, 48)).save(image)
    rows = []
    for size in (1, 3):
        out = tmp_path / f"out{size}"
        run(
            f"{flags} --coco_path {tmp_path}/c --num_classes 4 --eval --resume {root}/whole/checkpoint.pth "
            f"--eval_padding_free --batch_size {size} --output_dir {out}"
        )
        rows.append(json.loads((out / "predictions_bbox.json").read_text()))
    for a, b in zip(*rows, strict=True):
        assert a["image_id"] == b["image_id"] and a["bbox"] == pytest.approx(b["bbox"], abs=1e-3)


def test_evaluation_only_now_and_then(finished, tmp_path):
    _, flags = finished
    run(f"{flags} --output_dir {tmp_path} --eval_every 2")
    assert ["test_loss" in row for row in log_of(tmp_path)] == [False, True, True]


def test_nothing_is_downloaded_for_a_backbone_that_the_checkpoint_brings(finished, monkeypatch, tmp_path):
    root, flags = finished
    monkeypatch.setattr("torch.hub.download_url_to_file", lambda *a, **k: pytest.fail("downloaded"))
    run(f"{flags} --eval --resume {root}/whole/checkpoint.pth --backbone_weights imagenet")


def test_compiled_weights_keep_their_names(finished, monkeypatch, tmp_path):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda _, **how: compiled.append(how))
    _, flags = finished
    run(f"{flags} --epochs 1 --compile --output_dir {tmp_path}")
    assert compiled == [{"options": {"force_layout_optimization": True}}]  # without it, a graph for each image size
    assert all("_orig_mod" not in n for n in torch.load(tmp_path / "checkpoint.pth")["model"])


def test_the_command_line_runs_without_warnings(finished, tmp_path):
    root, flags = finished
    command = [sys.executable, "-W", "error::UserWarning", "-W", "error::FutureWarning", "main.py", *TINY.split()]
    done = subprocess.run(
        [*command, *flags.split(), "--epochs", "1", "--device", "cuda"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr and "Epoch: [0]  [0/2]" in done.stdout
    if not torch.cuda.is_available():
        assert "no GPU here" in done.stdout


def test_a_wrong_path_ends_with_its_sentence(tmp_path):
    done = subprocess.run(
        [sys.executable, "main.py", *TINY.split(), "--coco_path", str(tmp_path / "nowhere")],
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0 and "nowhere: no such folder" in done.stderr


def test_the_flags_reach_the_loop_and_the_optimizer(finished, monkeypatch):
    _, flags = finished
    seen = {}

    def train(model, criterion, loader, optimizer, device, epoch, max_norm, **how):
        seen.update(how, max_norm=max_norm, workers=loader.num_workers)
        seen["decay"] = {group["weight_decay"] for group in optimizer.param_groups}
        return {}

    monkeypatch.setattr(main, "train_one_epoch", train)
    monkeypatch.setattr(main, "evaluate", lambda *parts: seen.update(evaluate=parts[-1]) or ({}, None))
    more = "--clip_max_norm 0.7 --accum_steps 2 --amp bf16 --weight_decay 0.03 --coco_eval pycocotools --num_workers 1"
    run(f"{flags} --epochs 1 {more}")
    assert (seen["max_norm"], seen["accum_steps"], seen["amp"], seen["workers"]) == (0.7, 2, "bf16", 1)
    assert seen["decay"] == {0.03}
    assert seen["evaluate"] == engine.EvalOptions("bf16", "pycocotools", max_detections=100, print_freq=10)


def test_a_crash_between_the_files_of_an_epoch_loses_none_of_them(finished, monkeypatch, tmp_path):
    root, flags = finished
    save, epochs = Run.save, []

    def killed_after_the_first_file(self, *names):
        if len(names) > 1:
            epochs.append(self.epoch)
            save(self, names[0])
            raise KeyError("killed")
        save(self, *names)

    with monkeypatch.context() as patch, pytest.raises(KeyError, match="killed"):
        patch.setattr(Run, "save", killed_after_the_first_file)
        run(f"{flags} --output_dir {tmp_path}")
    assert epochs == [1]
    run(f"{flags} --output_dir {tmp_path} --resume auto")
    assert_same_run(root / "whole", tmp_path)
    assert {path.name for path in tmp_path.glob("*.pth")} == {path.name for path in (root / "whole").glob("*.pth")}


def test_the_number_of_classes_is_the_checkpoints_where_a_run_goes_on(finished, tmp_path):
    root, flags = finished
    run(f"{flags} --epochs 1 --num_classes 91 --output_dir {tmp_path}")
    run(f"{flags} --eval --resume {tmp_path}/checkpoint.pth")
    run(f"{flags} --epochs 2 --resume auto --output_dir {tmp_path}")
    state = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    assert len(state["model"]["class_embed.bias"]) == 92 and state["args"]["num_classes"] == 91


def test_a_checkpoint_of_another_network_with_the_same_weights_warns(finished, caplog):
    root, flags = finished
    caplog.set_level("WARNING", "detr")
    run(f"{flags} --eval --resume {root}/whole/checkpoint.pth --batch_size 1")
    assert "another network" not in caplog.text
    run(f"{flags} --eval --resume {root}/whole/checkpoint.pth --nheads 8")
    assert "another network: --nheads 4 -> 8" in caplog.text


def test_old_flags_are_enough(finished):
    root, flags = finished
    old = json.loads((DATA / "flags.json").read_text())
    names = {dest for dest, _ in old.values()} | {"backbone_weights"}
    given = {name: value for name, value in vars(parse(flags)).items() if name in names}
    main.main(argparse.Namespace(**given | {"epochs": 1}))


def test_an_optimizer_of_other_parameters_is_refused_though_it_has_as_many(finished, tmp_path):
    root, flags = finished
    state = torch.load(root / "whole/checkpoint.pth", weights_only=True)
    moments = state["optimizer"]["state"]
    first, *others = moments
    moments[first], moments[others[0]] = moments[others[0]], moments[first]
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="other.pth: its optimizer trained other parameters.*an average of shape"):
        run(f"{flags} --epochs 4 --resume {tmp_path}/other.pth")


def test_a_run_over_an_earlier_one_is_refused_unless_overwritten(finished, tmp_path):
    _, flags = finished
    run(f"{flags} --output_dir {tmp_path}")
    before = (tmp_path / "checkpoint.pth").read_bytes()
    with pytest.raises(ValueError, match="holds the results of an earlier run.*checkpoint0001.pth.*--overwrite"):
        run(f"{flags} --epochs 1 --seed 7 --output_dir {tmp_path}")
    assert (tmp_path / "checkpoint.pth").read_bytes() == before and len(log_of(tmp_path)) == 3
    run(f"{flags} --epochs 1 --seed 7 --output_dir {tmp_path} --overwrite")
    assert len(log_of(tmp_path)) == 1 and not (tmp_path / "checkpoint0001.pth").exists()


def test_resume_from_an_earlier_checkpoint_of_the_folder_needs_overwrite(finished, tmp_path):
    root, flags = finished
    run(f"{flags} --output_dir {tmp_path}")
    with pytest.raises(ValueError, match="later epochs: checkpoint.pth"):
        run(f"{flags} --output_dir {tmp_path} --resume {tmp_path}/checkpoint0001.pth")
    run(f"{flags} --output_dir {tmp_path} --resume {tmp_path}/checkpoint0001.pth --overwrite")
    assert_same_run(root / "whole", tmp_path)


@pytest.fixture
def unreadable(tmp_path):
    """Flags of a run in whose first epoch the third of four images cannot be decoded."""
    from tests.helpers import write_coco

    write_coco(tmp_path / "coco", "train", [1, 2, 3, 4], [(i, 1, [4, 4, 20, 30], {}) for i in (1, 2, 3, 4)])
    write_coco(tmp_path / "coco", "val", [1], [(1, 1, [4, 4, 20, 30], {})])
    order = torch.randperm(4, generator=torch.Generator().manual_seed(3)).tolist()
    image = tmp_path / "coco" / "train2017" / f"{order[2] + 1:012}.jpg"
    content = image.read_bytes()
    image.write_text("<html>404 Not Found</html>")
    flags = f"--coco_path {tmp_path}/coco --batch_size 2 --epochs 1 --seed 3 --output_dir {tmp_path}/out"
    return flags, image, content


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read_is_named_after_a_save(unreadable, tmp_path, workers):
    flags, image, content = unreadable
    with pytest.raises(ValueError, match=image.name):
        run(f"{flags} --num_workers {workers}")
    state = torch.load(tmp_path / "out" / "checkpoint.pth", weights_only=True)
    assert (state["epoch"], state["seen"]) == (-1, 2)
    image.write_bytes(content)
    run(f"{flags} --resume auto")
    assert len(log_of(tmp_path / "out")) == 1


def test_an_image_that_cannot_be_read_is_skipped_where_the_flag_says_so(unreadable, tmp_path, caplog):
    flags, image, _ = unreadable
    run(f"{flags} --on_bad_image skip")
    assert len(log_of(tmp_path / "out")) == 1 and re.search(f"skipping an image: .*{image.name}", caplog.text)


def test_weights_that_are_not_finite_are_neither_saved_nor_evaluated(finished, tmp_path):
    root, flags = finished
    state = torch.load(root / "whole" / "checkpoint.pth", weights_only=True)
    state["model"]["query_embed.weight"][0] = float("nan")
    torch.save(state, tmp_path / "nan.pth")
    with pytest.raises(ValueError, match="nan.pth: 1 entries hold NaN or infinite values, query_embed.weight"):
        run(f"{flags} --eval --resume {tmp_path}/nan.pth")
    args = parse(f"{flags} --num_classes 4 --output_dir {tmp_path}")
    model = main.build_parts(args, torch.device("cpu"))[0]
    with torch.no_grad():
        model.query_embed.weight[0] = float("inf")
    with pytest.raises(FloatingPointError, match="query_embed.weight"):
        main.build_run(args, model, loader_of(), {}).save("checkpoint.pth")
    assert not (tmp_path / "checkpoint.pth").exists()


def test_curves_that_cannot_be_drawn_only_warn(finished, tmp_path, caplog):
    _, flags = finished
    (tmp_path / "curves.png").mkdir()
    run(f"{flags} --epochs 1 --output_dir {tmp_path}")
    assert len(log_of(tmp_path)) == 1 and "curves.png or TensorBoard's log could not be written" in caplog.text


def test_signals_that_are_ignored_stay_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with Interruption() as interruption:
        signal.raise_signal(signal.SIGHUP)
        assert interruption.received == 0
        with pytest.raises(SystemExit), interruption.deferred():
            signal.raise_signal(signal.SIGUSR1)
            assert interruption.received == signal.SIGUSR1
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("change", [
    {"epoch": "3"}, {"epoch": None}, {"optimizer": []}, {"optimizer": {}}, {"optimizer": None}, {"processes": [1]},
    {"processes": [{"rng": {}, "sums": {}}]}, {"best": "high"}, {"optimizer": {"state": {}, "param_groups": [1, 2]}},
])  # fmt: skip
def test_resume_from_a_training_state_of_other_contents_is_refused_in_a_sentence(finished, tmp_path, change):
    root, flags = finished
    state = torch.load(root / "whole" / "checkpoint.pth", weights_only=True)
    torch.save({**state, **change}, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match="odd.pth.*--finetune"):
        run(f"{flags} --resume {tmp_path / 'odd.pth'} --epochs 4")


@pytest.mark.parametrize("change", [{"seen": None}, {"args": None}, {"class_names": None}, {"scaler": None}])
def test_resume_from_a_checkpoint_that_lacks_what_can_be_done_without_continues(finished, tmp_path, change):
    root, flags = finished
    state = torch.load(root / "whole" / "checkpoint.pth", weights_only=True)
    torch.save({**state, **change}, tmp_path / "odd.pth")
    run(f"{flags} --resume {tmp_path / 'odd.pth'} --output_dir {tmp_path}/out --epochs 4")
    assert [row["epoch"] for row in log_of(tmp_path / "out")] == [3]


def test_tensorboard_gets_every_row_and_the_example_pictures(coco_root, tmp_path):
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard: pip install tensorboard"
    )
    flags = f"{TINY} --coco_path {coco_root} --batch_size 2 --augment flip --output_dir {tmp_path} --tensorboard"
    run(f"{flags} --epochs 1")
    run(f"{flags} --epochs 2 --resume auto")
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    rows = log_of(tmp_path)
    for tag, read in (
        ("train/loss", lambda row: row["train_loss"]),
        ("test/loss_ce", lambda row: row["test_loss_ce"]),
        ("train/lr", lambda row: row["train_lr"]),
        ("AP50/box", lambda row: row["test_coco_eval_bbox"][1]),
    ):
        assert [event.step for event in events.Scalars(tag)] == [0, 1]
        assert [event.value for event in events.Scalars(tag)] == pytest.approx([read(row) for row in rows], rel=1e-5)
    pictures = events.Images("examples")
    assert [picture.step for picture in pictures] == [0, 1]
    assert pictures[0].width == 3 * (400 + 4) and pictures[0].height == 2 * 300 + 2  # three images and their gaps
