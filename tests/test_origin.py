"""Differences between a checkpoint's run and this one: class names, and flags that no weight's shape shows."""

import argparse

import pytest
import torch

import main
from models import build_model
from tests.helpers import parse
from util.checkpoint import save_checkpoint
from util.origin import check_class_names, differences

SAVED = {"class_names": {1: "bolt", 2: "nut", 3: "washer"}}


@pytest.mark.parametrize("names, words", [
    ({1: "nut", 2: "bolt"}, "1 is 'bolt' there and 'nut' here, 2 is 'nut' there and 'bolt' here"),
    ({2: "Washer"}, "2 is 'nut' there and 'Washer' here"),
])  # fmt: skip
def test_class_names_under_other_ids_are_refused_and_listed(names, words, caplog):
    with pytest.raises(ValueError, match=f"c.pth: its class names are not the data's: {words}.*--finetune"):
        check_class_names(SAVED, "c.pth", names)
    check_class_names(SAVED, "c.pth", names, strict=False)
    assert words in caplog.text


@pytest.mark.parametrize("names, words", [
    ({1: "screw", 2: "nut"}, "1 is 'bolt' there and 'screw' here"), ({1: "bolt", 7: "pin"}, "7 'pin'"),
    ({1: "\x1b[2J"}, "1 is 'bolt' there and '\\x1b[2J' here"),
])  # fmt: skip
def test_other_class_names_are_warned_of(names, words, caplog):
    check_class_names(SAVED, "c.pth", names)
    assert words in caplog.text and len(caplog.records) == 1


@pytest.mark.parametrize("state", [SAVED, {}, {"class_names": None}, {"class_names": ["bolt"]}])
def test_equal_or_unknown_class_names_pass_in_silence(state, caplog):
    check_class_names(state, "c.pth", {1: "Bolt", 2: "nut"})
    assert not caplog.records


@pytest.mark.parametrize("saved", [None, [], argparse.Namespace(lr=1, nheads=4), {"lr": 1, "nheads": 4}])
def test_differences_accepts_whatever_a_file_holds(saved):
    changed = differences({"lr": 1, "nheads": 8}, {"args": saved}, ["lr", "nheads"])
    assert changed == ({"nheads": "--nheads 4 -> 8"} if saved else {})


@pytest.mark.parametrize("use, there, text", [
    ("--resume", "--nheads 4", "--nheads 4 -> 8"), ("--eval --resume", "--nheads 4", "--nheads 4 -> 8"),
    ("--finetune", "--nheads 4", "--nheads 4 -> 8"), ("--masks --frozen_weights", "--nheads 4", "--nheads 4 -> 8"),
    ("--finetune", "--pre_norm", "--pre_norm True -> False"),
    ("--masks --backbone resnet50 --frozen_weights", "--dilation --backbone resnet50", "--dilation True -> False"),
])  # fmt: skip
def test_weights_of_another_network_are_warned_of(tmp_path, caplog, use, there, text):
    width = "--hidden_dim 128 --nheads 8 --num_classes 4"
    flags, file = parse(f"{width} {there}"), tmp_path / "c.pth"
    save_checkpoint({"model": build_model(flags)[0].state_dict(), "args": vars(flags)}, file)
    args = parse(f"{width} {use} {file}")
    name, state = main.load_resumed(args.resume, "")
    main.build_parts(args, torch.device("cpu"), state, name)
    assert text in caplog.text and "was trained with flags of another network" in caplog.text


@pytest.mark.parametrize("use, refused", [
    ("--eval --resume", True), ("--resume", True), ("--masks --frozen_weights", True), ("--finetune", False),
])  # fmt: skip
def test_class_names_of_weights_are_compared_with_the_datas(tmp_path, caplog, use, refused):
    width = "--hidden_dim 128 --nheads 8 --num_classes 4"
    file = tmp_path / "c.pth"
    save_checkpoint({"model": build_model(parse(width))[0].state_dict(), **SAVED}, file)
    args = parse(f"{width} {use} {file}")
    name, state = main.load_resumed(args.resume, "")
    if refused:
        with pytest.raises(ValueError, match="class names"):
            main.build_parts(args, torch.device("cpu"), state, name, {1: "nut", 2: "bolt"})
    else:
        main.build_parts(args, torch.device("cpu"), state, name, {1: "nut", 2: "bolt"})
        assert "1 is 'bolt' there and 'nut' here" in caplog.text
