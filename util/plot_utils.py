"""Curves from a run's `log.txt` and `eval/*.pth`."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor

from util.safe_load import load_file

# Fields that are numbers of an evaluation: the entry of a row, and the place in it.
EVALUATED = {
    "mAP": ("test_coco_eval_bbox", 0),
    "AP50": ("test_coco_eval_bbox", 1),
    "mask AP": ("test_coco_eval_masks", 0),
    "PQ": ("test_PQ_all", "pq"),
}
CURVES = ("precision", "scores", "recall_thresholds")  # entries of a file of `eval/` that are drawn


def read_log(folder: str | Path, log_name: str = "log.txt") -> list[dict]:
    """Read a run's log, one dict for each epoch. Other lines (notes, rows cut short by a kill) are skipped."""
    path = Path(folder) / log_name
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such log")
    rows = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and isinstance(row.get("epoch"), int):
            rows.append(row)
    return rows


def plot_logs(
    logs: str | Path | Sequence[str | Path],
    fields: Sequence[str] = ("class_error", "loss_bbox_unscaled", "mAP"),
    ewm_col: float = 0,
    log_name: str = "log.txt",
):
    """Draw fields of one run or several over epochs: training solid, evaluation dashed; return (figure, axes).

    `logs` are the runs' output folders. `ewm_col` is the centre of mass of an exponential moving average. The field
    "mAP" is COCO's AP of boxes, "AP50" its AP at IoU 0.5; "mask AP" and "PQ" are those of masks and segments.
    """
    folders = [Path(logs)] if isinstance(logs, (str, Path)) else [Path(folder) for folder in logs]
    columns = min(len(fields), 4)
    rows = math.ceil(len(fields) / columns)
    figure, grid = plt.subplots(rows, columns, figsize=(5 * columns, 4 * rows), squeeze=False)
    axes, spare = grid.flat[: len(fields)], grid.flat[len(fields) :]
    for folder, colour in zip(folders, plt.cm.tab10.colors * len(folders), strict=False):
        log = read_log(folder, log_name)
        for field, axis in zip(fields, axes, strict=True):
            for prefix, style in (("train", "-"), ("test", "--")):
                epochs, values = _series(log, field, prefix)
                if values:
                    label = f"{folder.name} {prefix}"
                    axis.plot(epochs, _smooth(values, ewm_col), style, color=colour, marker=".", label=label)
    for field, axis in zip(fields, axes, strict=True):
        axis.set(title=field, xlabel="epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize="small")
    for axis in spare:
        axis.remove()
    figure.tight_layout()
    return figure, axes


def _series(rows: list[dict], field: str, prefix: str) -> tuple[list[int], list[float]]:
    """Return epochs and values of a field, for "train" or "test"; AP belongs to "test". Rows without it are skipped."""
    epochs, values = [], []
    for row in rows:
        if field in EVALUATED:
            entry, place = EVALUATED[field]
            try:
                value = row[entry][place] if prefix == "test" else None
            except (KeyError, IndexError, TypeError):
                value = None
        else:
            value = row.get(f"{prefix}_{field}")
        if isinstance(value, (int, float)):
            epochs.append(row["epoch"])
            values.append(value)
    return epochs, values


def _smooth(values: list[float], centre_of_mass: float) -> np.ndarray:
    keep = centre_of_mass / (1 + centre_of_mass)
    total, weight, smoothed = 0.0, 0.0, []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        smoothed.append(total / weight)
    return np.array(smoothed)


def draw_curves(output_dir: str | Path) -> None:
    """Write `curves.png` beside a run's `log.txt`: losses, class error, AP and PQ so far, those that there are."""
    rows = read_log(output_dir)
    fields = ("loss", "loss_ce", "loss_bbox", "loss_giou", "loss_mask", "loss_dice", "class_error", *EVALUATED)
    known = [field for field in fields if any(_series(rows, field, prefix)[1] for prefix in ("train", "test"))]
    figure, _ = plot_logs(output_dir, known or ("loss",))
    figure.savefig(Path(output_dir) / "curves.png", dpi=80)
    plt.close(figure)


def _read_curves(file: Path) -> dict[str, Tensor]:
    data = load_file(file)
    if not isinstance(data, dict) or not all(isinstance(data.get(name), Tensor) for name in CURVES):
        raise ValueError(f"{file}: not precision curves; give files of eval/, or eval.pth")
    return data


def plot_precision_recall(files: Sequence[str | Path], naming_scheme: str = "iter") -> tuple[Figure, np.ndarray]:
    """Draw precision and score over recall at IoU 0.5, from files of `eval/`; return (figure, axes).

    Curves are averaged over classes, for all areas and 100 detections, and labelled with the name of the file ("iter")
    or of the run's folder ("exp_id").
    """
    if naming_scheme not in ("iter", "exp_id"):
        raise ValueError(f"no naming scheme {naming_scheme!r}: choose iter or exp_id")
    figure, axes = plt.subplots(ncols=2, figsize=(12, 4))
    for file in map(Path, files):
        data = _read_curves(file)
        precision, scores = (data[name][0, :, :, 0, -1].numpy() for name in ("precision", "scores"))
        known = (precision > -1).all(0)  # -1 marks classes without objects
        name = file.stem if naming_scheme == "iter" else file.parents[1].name
        mean = precision[:, known].mean()
        for axis, curve in zip(axes, (precision, scores), strict=True):
            axis.plot(
                data["recall_thresholds"].numpy(), curve[:, known].mean(1), label=f"{name}: AP50 {100 * mean:.1f}"
            )
    for axis, title in zip(axes, ("precision", "score"), strict=True):
        axis.set(title=f"{title} over recall, IoU 0.5", xlabel="recall", ylim=(0, 1.02))
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    figure.tight_layout()
    return figure, axes
