import argparse
import json
import pickle
import subprocess
import sys

import pytest
import torch

import util.misc as utils
from util import plot_utils
from util.dist import init_distributed_mode, pick_device, process_info_from_environment, reduce_dict
from util.logger import configure_logging, finite_or_null, logger
from util.meters import MetricLogger, SmoothedValue


def test_smoothed_value_has_statistics_of_its_window_and_of_all():
    value = SmoothedValue(window_size=3)
    for number in (1.0, 2.0, 3.0, 10.0):
        value.update(number)
    value.update(4.0, n=2)
    assert (value.median, value.avg, value.max, value.value) == (4, 17 / 3, 10, 4)
    assert value.global_avg == pytest.approx(24 / 6) and list(value.deque) == [3, 10, 4]
    value.synchronize_between_processes()
    assert value.count == 6
    assert str(value) == "4.0000 (4.0000)" and str(SmoothedValue()) == "-"


def test_metric_logger_accepts_tensors_and_yields_all_items(caplog):
    caplog.set_level("INFO", "detr")
    metrics = MetricLogger()
    for i in metrics.log_every(range(5), 2, "Head:"):
        metrics.update(loss=torch.tensor(float(i)), lr=0.1)
    assert metrics.averages() == {"loss": 2, "lr": pytest.approx(0.1)}
    assert list(metrics.log_every([], 1)) == []
    assert metrics.loss.global_avg == 2 and "Head:" in caplog.text
    with pytest.raises(AttributeError, match="'absent'"):
        _ = metrics.absent
    assert pickle.loads(pickle.dumps(metrics)).loss.count == 5


def test_averages_leave_out_series_without_values():
    metrics = MetricLogger()
    metrics.add_meter("class_error", SmoothedValue())
    assert metrics.averages() == {}


def test_process_info_comes_from_the_launchers_variables(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert not init_distributed_mode("cpu").distributed, "an interactive shell on a cluster"
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_PROCID", "3")
    monkeypatch.setenv("SLURM_LOCALID", "1")
    info = process_info_from_environment()
    assert (info.rank, info.world_size, info.local_rank, info.distributed) == (3, 4, 1, True)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert process_info_from_environment().world_size == 8


def test_util_misc_has_the_reference_names(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    args = argparse.Namespace(device="cpu", dist_url="env://")
    utils.init_distributed_mode(args)
    assert not args.distributed and args.rank == 0
    assert utils.get_world_size() == 1 and utils.is_main_process() and utils.all_gather("x") == ["x"]
    assert utils.get_sha().startswith("sha: ")
    assert reduce_dict({"a": torch.ones(1)}) == {"a": torch.ones(1)}
    assert all(hasattr(utils, name) for name in utils.__all__)
    assert utils._max_by_axis([[3, 4, 9], [3, 7, 2]]) == [3, 7, 9]
    nested = utils._onnx_nested_tensor_from_tensor_list([torch.ones(3, 2, 2), torch.ones(3, 1, 3)])
    assert nested.tensors.shape == (2, 3, 2, 3)


def test_setup_for_distributed_silences_the_other_processes(caplog):
    level = logger.level
    for is_master in (True, False):
        utils.setup_for_distributed(is_master)
        logger.info("from the main process" if is_master else "from another process")
    logger.setLevel(level)
    assert "from the main process" in caplog.text and "another" not in caplog.text


@pytest.mark.parametrize("output", ["closed", "full"])
@pytest.mark.slow
def test_logging_to_an_output_that_fails_does_not_raise(output):
    code = "from util.logger import configure_logging, logger\nconfigure_logging()\nimport sys\n"
    code += "for i in range(1000): logger.info('x' * 1000)\nprint('a print')\nsys.stderr.write('end')"
    redirect = "| head -n 1" if output == "closed" else "> /dev/full"
    command = ["bash", "-o", "pipefail", "-c", f'"$0" -c "$1" {redirect}', sys.executable, code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("standard output cannot be written") and done.stderr.endswith("end")


def test_logging_prints_control_characters_as_escapes(capsys, monkeypatch):
    monkeypatch.setattr(logger, "handlers", [])
    configure_logging()
    logger.warning("a class \x1b[31mred\x1b[0m\r\x9b1A\nnext\tline é")
    assert capsys.readouterr().out == "a class \\x1b[31mred\\x1b[0m\\r\\x9b1A\nnext\tline é\n"


def test_finite_or_null_replaces_what_json_lacks():
    row = {"a": float("nan"), "b": [1.5, float("inf")], "c": {"d": 1, "e": "x"}}
    assert finite_or_null(row) == {"a": None, "b": [1.5, None], "c": {"d": 1, "e": "x"}}


def test_accuracy_in_percent():
    output = torch.tensor([[0.1, 0.9, 0.0], [0.8, 0.05, 0.15], [0.3, 0.3, 0.4], [0.2, 0.5, 0.3]])
    top1, top2 = utils.accuracy(output, torch.tensor([1, 2, 2, 0]), topk=(1, 2))
    assert top1.item() == 50 and top2.item() == 75
    assert utils.accuracy(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))[0].item() == 0


def test_pick_device_without_a_gpu_returns_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("cuda").type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert pick_device("cuda", 3) == torch.device("cuda:3") and pick_device("cuda:1", 3) == torch.device("cuda:1")
    for name, local_rank in (("cuda:4", 0), ("cuda", 4)):
        with pytest.raises(ValueError, match="needs GPU 4, and the machine has 4"):
            pick_device(name, local_rank)


def test_plot_logs_with_gaps_and_foreign_lines_draws_the_rest(tmp_path):
    rows = [
        {"epoch": e, "train_loss": 9.0 - e, "test_loss": 8.0, "test_coco_eval_bbox": [0.1 * e] * 12} for e in range(4)
    ]
    del rows[1]["test_coco_eval_bbox"]
    rows[3:3] = [[1], 5, {"note": 1}, {"epoch": 2, "train_loss": None, "test_coco_eval_bbox": None}]
    (tmp_path / "log.txt").write_text("\n".join(map(json.dumps, rows)) + '\n{"epoch": 4, "tr')
    _, axes = plot_utils.plot_logs(tmp_path, ("loss", "mAP", "absent"))
    assert [len(axis.lines) for axis in axes] == [2, 1, 0]
    assert axes[1].lines[0].get_xdata().tolist() == [0, 2, 3]
    assert axes[0].lines[0].get_ydata().tolist() == [9, 8, 7, 6]
    _, axes = plot_utils.plot_logs([tmp_path, tmp_path], ("loss",), ewm_col=1)
    assert axes[0].lines[0].get_ydata()[1] == pytest.approx((8 + 9 * 0.5) / 1.5)
    plot_utils.draw_curves(tmp_path)
    assert (tmp_path / "curves.png").stat().st_size > 1000
    plot_utils.plt.close("all")
    with pytest.raises(FileNotFoundError, match="elsewhere"):
        plot_utils.plot_logs(tmp_path / "elsewhere")


def test_draw_curves_draws_what_there_is_with_a_mark_for_each_epoch(tmp_path, monkeypatch):
    row = {"epoch": 0, "train_loss": 1.0, "test_coco_eval_masks": [0.25] * 12, "test_PQ_all": {"pq": 40.0}}
    (tmp_path / "log.txt").write_text(json.dumps(row))
    drawn, plot_logs = [], plot_utils.plot_logs
    monkeypatch.setattr(plot_utils, "plot_logs", lambda *a: drawn.append(plot_logs(*a)) or drawn[-1])
    plot_utils.draw_curves(tmp_path)
    axes = drawn[0][1]
    assert [axis.get_title() for axis in axes] == ["loss", "mask AP", "PQ"]
    assert [axis.lines[0].get_ydata().tolist() for axis in axes] == [[1.0], [0.25], [40.0]]
    assert all(line.get_marker() == "." for axis in axes for line in axis.lines)


def test_plot_precision_recall_leaves_out_classes_without_objects(tmp_path):
    precision = torch.zeros(10, 101, 3, 4, 3)
    precision[0, :, 0, 0, -1], precision[0, :, 1, 0, -1], precision[0, :, 2, 0, -1] = 1.0, 0.5, -1
    data = {"precision": precision, "scores": precision, "recall_thresholds": torch.linspace(0, 1, 101)}
    (tmp_path / "exp" / "eval").mkdir(parents=True)
    torch.save(data, tmp_path / "exp" / "eval" / "latest.pth")
    _, axes = plot_utils.plot_precision_recall([tmp_path / "exp" / "eval" / "latest.pth"], "exp_id")
    assert axes[0].lines[0].get_label() == "exp: AP50 75.0" and axes[0].lines[0].get_ydata()[5] == 0.75
    plot_utils.plt.close("all")
    with pytest.raises(ValueError, match="iter or exp_id"):
        plot_utils.plot_precision_recall([], "other")
