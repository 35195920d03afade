"""Log lines: short on a terminal, the original's format elsewhere; the table of epochs; the file of all lines."""

import logging
import os
import shutil

import pytest
import torch

from util.dist import pick_device
from util.epoch_row import table_line
from util.logger import configure_logging, log_file, logger
from util.meters import MetricLogger, SmoothedValue
from util.tensorboard import scalars

LOSSES = {"loss": 12.5, "loss_ce": 1.0, "loss_bbox": 2.0, "loss_giou": 3.0, "class_error": 50.0, "loss_ce_0": 4.0}


def train(batches=2, epochs_left=1):
    metrics = MetricLogger("  ")
    metrics.add_meter("lr", SmoothedValue(1, "{value:.6f}"))
    for _ in metrics.log_every([("images", [{}] * 4)] * batches, 1, "Epoch: [3]", epochs_left=epochs_left):
        metrics.update(**LOSSES, lr=1e-4)


@pytest.fixture
def terminal(monkeypatch, capsys):
    def lines(columns, epochs_left=1):
        monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
        monkeypatch.setattr(shutil, "get_terminal_size", lambda: os.terminal_size((columns, 24)))
        train(2, epochs_left)
        return [line for line in capsys.readouterr().out.splitlines() if "Total" not in line]

    configure_logging()
    return lines


@pytest.mark.parametrize("columns", [80, 120, 200])
def test_line_on_a_terminal_fits_its_width_and_120_columns(terminal, columns):
    lines = terminal(columns)
    assert len(lines) == 2 and all(len(line) <= min(120, columns - 1) for line in lines)
    assert all("Epoch: [3]" in line and "loss 12.50" in line and "eta" in line for line in lines)
    whole = {"ce 1.00", "bbox 2.00", "giou 3.00", "error 50.0", "img/s"}
    assert columns == 80 or all(whole == {part for part in whole if part in line} for line in lines)


@pytest.mark.parametrize("columns, longest", [(80, 79), (200, 120)])
def test_short_line_has_as_many_parts_as_fit(columns, longest, monkeypatch):
    monkeypatch.setattr(shutil, "get_terminal_size", lambda: os.terminal_size((columns, 24)))
    metrics = MetricLogger()
    assert len(metrics.short_line(["x"] * 100)) == longest - (longest - 1) % 3
    assert metrics.short_line(["x" * longest, "y"]) == "x" * longest
    assert metrics.short_line(["x" * (longest + 1), "y"]) == "y"


def test_line_of_an_evaluation_on_a_terminal_is_short_too(terminal):
    lines = terminal(80, None)
    assert all(len(line) < 80 and "loss 12.50" in line and "img/s" not in line for line in lines) and len(lines) == 2


def test_line_elsewhere_has_the_original_format(capsys):
    configure_logging()
    train()
    line = capsys.readouterr().out.splitlines()[1]
    assert line.startswith("Epoch: [3]  [1/2]  eta: 0:00:00  lr: 0.000100  loss: 12.5000 (12.5000)  loss_ce: 1.0000")
    assert "time: " in line and "data: " in line


def test_log_file_has_every_line_with_its_time_and_the_traceback_of_an_error(tmp_path):
    configure_logging()
    path = tmp_path / "messages.log"
    with pytest.raises(ValueError), log_file(path):
        logger.info("hello")
        raise ValueError("the end")
    text = path.read_text()
    assert "hello" in text and text.startswith("20") and "Traceback" in text and "the end" in text
    with log_file(path):
        train()
    assert path.read_text().startswith(text) and "loss_ce_0: 4.0000" in path.read_text()
    with log_file(None):
        logger.info("nowhere")
    assert "nowhere" not in path.read_text()


def test_log_file_on_a_full_disk_costs_only_its_lines(caplog):
    configure_logging()
    with log_file("/dev/full"):
        logger.info("first")
        logger.info("second")
    assert "/dev/full cannot be written" in caplog.text and caplog.text.count("cannot be written") == 1
    assert all(not isinstance(handler, logging.FileHandler) for handler in logger.handlers)


def test_table_line_of_an_epoch():
    row = {"epoch": 7, "train_loss": 4.25, "test_coco_eval_bbox": [0.5, 0.75, 0.6]}
    assert table_line(row, 61.2, 0.5) == (
        "epoch    7 | loss   4.2500 | AP 0.500 | AP50 0.750 | 0:01:01 | best 0.500 (this one)"
    )
    assert table_line(row, 61.2, 0.6).endswith("| best 0.600")
    assert table_line({"epoch": 7}, 1, -1.0) == "epoch    7 | loss      nan | 0:00:01"


def test_epoch_that_waits_for_its_data_says_so(caplog, monkeypatch):
    caplog.set_level("INFO", "detr")
    clock = iter(range(10**6))
    monkeypatch.setattr("util.meters.time.perf_counter", lambda: next(clock))  # a second between any two calls
    train(batches=20)
    assert "50% of the time was spent waiting for data: more --num_workers may help" in caplog.text
    caplog.clear()
    monkeypatch.setattr("util.meters.SLOW_LOADER", 0.6)
    train(batches=20)
    assert "waiting" not in caplog.text


def test_more_threads_than_cores_are_warned_of(caplog, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for threads, warned in ((2, False), (4, True)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        pick_device("cpu")
        assert ("set OMP_NUM_THREADS=2" in caplog.text) == warned


def test_scalars_of_a_row_are_its_numbers_by_group():
    row = {"train_loss": 2.0, "test_coco_eval_bbox": [0.1, 0.2, 0.3, 0.4], "test_PQ_all": {"pq": 0.5}, "epoch": 3}
    expected = {"train/loss": 2.0, "AP/box": 0.1, "AP50/box": 0.2, "AP75/box": 0.3, "PQ/all": 0.5}
    assert dict(scalars(row)) == expected
