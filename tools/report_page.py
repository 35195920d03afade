"""The HTML page of a report: tables, curves and pictures, in one file that needs no other."""

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from datasets.images import read_image
from tools.draw import class_name, draw_boxes, fit, to_pil
from tools.results import embedded
from tools.show_predictions import corners
from util.text import printable

MARKS = {"correct": (40, 160, 60), "false": (220, 40, 40), "confused": (240, 150, 0), "missed": (60, 90, 240)}
SIDE = 480  # pixels of a picture's longer side
MOST_CLASSES = 20  # with curves of their own, and in the picture of the confusion matrix
STYLE = """body{font:14px sans-serif;margin:24px;max-width:1100px}table{border-collapse:collapse;margin:8px 0}
td,th{padding:2px 10px;text-align:right;border-bottom:1px solid #ddd}td:first-child,th:first-child{text-align:left}
img{max-width:100%}figure{display:inline-block;margin:6px;vertical-align:top;width:340px}h2{margin-top:28px}"""
TIDE = {
    "Cls": "right place, wrong class",
    "Loc": "right class, box not exact (IoU 0.1 to 0.5)",
    "Both": "wrong class and box not exact",
    "Dupe": "second detection of an object",
    "Bkg": "nothing there",
    "Miss": "object without a detection",
}


def detection_page(numbers: dict, boxes: dict[int, list[dict]], paths: dict[int, Path], names: dict[int, str]) -> str:
    """Make the page of boxes or masks; `boxes` has the marked boxes of each image, `paths` the images to draw."""
    best, kind = numbers["best"], {"bbox": "boxes", "segm": "masks"}[numbers["kind"]]
    chosen = [curve for curve in list(numbers["curves"])[: MOST_CLASSES + 1] if numbers["curves"][curve]]
    curves = {name: numbers["curves"][name] for name in chosen}
    bins = [(b["avg_confidence"], b["avg_accuracy"], b["count"]) for b in numbers["calibration"]["bins"] if b["count"]]
    parts = [
        f"<p>The {numbers['max_dets']} best detections of each image count.</p>",
        _table(("metric", "value"), [(name, value) for name, value in numbers["metrics"].items()]),
        "<h2>Score threshold</h2>",
        f"<p>F1 at IoU 0.5 is highest for detections that score {best['threshold']:.3f} or more: precision "
        f"{best['precision']:.3f}, recall {best['recall']:.3f}, F1 {best['f1']:.3f}.</p>",
        _image(_curves(curves)),
        "<h2>Classes</h2>",
        _table(
            ("class", "objects", "AP", "AP50", "AR", "best threshold", "F1", "precision", "recall"),
            [list(row.values())[1:] for row in numbers["classes"]],
        ),
        f"<h2>Confusion, from score {best['threshold']:.3f}</h2>",
        "<p>Rows are annotated classes, columns detected ones. The last column counts missed objects, the last row "
        "detections where there is nothing.</p>",
        _image(_confusion(**numbers["confusion"])),
        "<h2>Kinds of errors (TIDE, Bolya et al. 2020)</h2>",
        _table(
            ("error", "count", "AP50 that it costs"),
            [(text, numbers["tide"]["counts"][key], numbers["tide"]["delta_ap"][key]) for key, text in TIDE.items()],
        ),
        "<h2>Calibration</h2>",
        f"<p>Expected calibration error {numbers['calibration']['expected_error']:.3f}: how far, on average, a score "
        "is from the share of such detections that are right.</p>",
        _table(("mean score", "share that is right", "detections"), bins),
        "<h2>Worst images</h2>",
        "<p>" + ", ".join(f'<b style="color:rgb{colour}">{mark}</b>' for mark, colour in MARKS.items()) + "</p>",
        *(_picture(row, paths[row["image_id"]], boxes[row["image_id"]], names) for row in numbers["images"]
          if row["image_id"] in paths),
    ]  # fmt: skip
    return _page(f"Detections: {kind}", parts)


def panoptic_page(numbers: dict) -> str:
    """Make the page of panoptic segments."""
    groups = [(name, row["pq"], row["sq"], row["rq"], row["n"]) for name, row in numbers["metrics"].items()]
    classes = [(row["name"], row["pq"], row["sq"], row["rq"]) for row in numbers["classes"]]
    parts = [_table(("classes", "PQ", "SQ", "RQ", "number"), groups), "<h2>Classes</h2>"]
    return _page("Panoptic segments", [*parts, _table(("class", "PQ", "SQ", "RQ"), classes)])


def _page(title: str, parts: Sequence[str]) -> str:
    head = f'<meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    return f'<!DOCTYPE html><html lang="en">{head}<h1>{title}</h1>{"".join(parts)}</html>'


def _table(head: Sequence[str], rows: Sequence[Sequence]) -> str:
    lines = ["".join(f"<th>{_cell(text)}</th>" for text in head)]
    lines += ["".join(f"<td>{_cell(value)}</td>" for value in row) for row in rows]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _cell(value) -> str:
    return f"{value:.3f}" if isinstance(value, float) else html.escape(printable(str(value)))


def _image(figure: Figure) -> str:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=90, bbox_inches="tight")
    plt.close(figure)
    return f'<p><img src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"></p>'


def _curves(curves: dict[str, dict[str, list[float]]]) -> Figure:
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5))
    for name, curve in curves.items():
        style = {"color": "black", "linewidth": 2.5} if name == "all classes" else {"linewidth": 1}
        left.plot(curve["recall"], curve["precision"], label=_plain(name), **style)
        right.plot(curve["score"], curve["f1"], **style)
    left.set(xlabel="recall", ylabel="precision at IoU 0.5", xlim=(0, 1), ylim=(0, 1.02))
    right.set(xlabel="score threshold", ylabel="F1 at IoU 0.5", xlim=(0, 1), ylim=(0, 1.02))
    if curves:
        left.legend(fontsize=8)
    return figure


def _confusion(names: list[str], matrix: list[list[int]]) -> Figure:
    """Draw the matrix; of many classes, those with the most objects."""
    counts = np.array(matrix, float)
    kept = np.sort(np.argsort(-counts[:-1].sum(1), kind="stable")[:MOST_CLASSES]).tolist() + [len(names) - 1]
    counts, labels = counts[np.ix_(kept, kept)], [_plain(names[k]) for k in kept]
    figure, axis = plt.subplots(figsize=(2 + 0.55 * len(kept), 1.5 + 0.5 * len(kept)))
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axis.set(xticks=range(len(kept)), yticks=range(len(kept)), xlabel="detected", ylabel="annotated")
    axis.set_xticklabels(labels, rotation=45, ha="right")
    axis.set_yticklabels(labels)
    for i, j in np.argwhere(counts > 0):
        axis.text(j, i, f"{counts[i, j]:.0f}", ha="center", va="center", fontsize=8,
                  color="white" if shares[i, j] > 0.5 else "black")  # fmt: skip
    return figure


def _plain(name: str) -> str:
    """Make a class name safe for matplotlib, which reads dollar signs as formulas."""
    return printable(name)[:30].replace("$", r"\$")


def _picture(row: dict, path: Path, boxes: list[dict], names: dict[int, str]) -> str:
    picture, factor = fit(to_pil(read_image(path)), SIDE)
    captions = [
        f"{class_name(names, box['category_id'])} {box.get('score', 0):.2f}".removesuffix(" 0.00") for box in boxes
    ]
    colours = [MARKS[box["mark"]] for box in boxes]
    shown = [caption if box["mark"] != "correct" else "" for caption, box in zip(captions, boxes, strict=True)]
    dashed = [box["mark"] == "missed" for box in boxes]
    drawn = draw_boxes(picture, corners([box["bbox"] for box in boxes]) * factor, shown, colours, dashed)
    text = f"{path.name}: {row['tp']} correct, {row['fp']} false, {row['fn']} missed"
    return f'<figure><img src="{embedded(drawn)}"><figcaption>{html.escape(printable(text))}</figcaption></figure>'
