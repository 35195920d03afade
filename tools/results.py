"""Write predictions: annotated pictures, COCO result files, and one HTML page."""

import base64
import html
import io
import os
import re
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from datasets.json_file import write_json
from datasets.masks import encode_masks
from tools.draw import fit
from tools.draw_attention import Point
from tools.predictor import Detections
from util.text import printable

THUMBNAIL = 360  # pixels of an image's longer side on the page
SHEET = 1480  # pixels of the longer side of a sheet of panels on it


def coco_records(detections: Detections, image_id: int, name: str) -> list[dict]:
    """Convert detections to COCO's result format: boxes as (x, y, width, height), masks as run-length codes."""
    codes = [None] * len(detections) if detections.masks is None else encode_masks(detections.masks)
    records = []
    for k, (x0, y0, x1, y1) in enumerate(detections.boxes.tolist()):
        record = {
            "image_id": image_id,
            "file_name": os.fsencode(name).decode("utf-8", "backslashreplace"),
            "category_id": int(detections.labels[k]),
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "score": float(detections.scores[k]),
        }
        records.append(record if codes[k] is None else {**record, "segmentation": codes[k]})
    return records


def summary(detections: Detections) -> str:
    """Describe detections in one line: objects with their scores, or segments by name."""
    if detections.segments is not None:
        words = [detections.name(segment["category_id"]) for segment in detections.segments]
    else:
        pairs = zip(detections.labels.tolist(), detections.scores.tolist(), strict=True)
        words = [f"{detections.name(label)} {score:.2f}" for label, score in pairs]
    return printable(", ".join(words) or "-")


def figure(picture: Image.Image, title: str, text: str, side: int = THUMBNAIL) -> str:
    """Make one entry of the HTML page, with the image embedded: its longer side is at most `side` pixels."""
    thumbnail = picture if max(picture.size) <= side else fit(picture, side)[0]
    title, text = html.escape(printable(title)), html.escape(text)
    wide = "" if side == THUMBNAIL else ' class="wide"'
    return (
        f'<figure{wide}><img alt="{title}" src="{embedded(thumbnail)}"><figcaption><b>{title}</b><br>{text}'
        "</figcaption></figure>"
    )


def embedded(picture: Image.Image) -> str:
    """Encode a picture as the address of an HTML image."""
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def page(figures: Sequence[str], title: str) -> str:
    """Make the HTML page, which needs no other file."""
    style = (
        "body{font:14px sans-serif;margin:16px;background:#fafafa}main{display:flex;flex-wrap:wrap;gap:12px}"
        f"figure{{margin:0;width:{THUMBNAIL}px;background:#fff;border:1px solid #ddd;padding:6px}}"
        ".wide{width:auto;max-width:100%}"
        "img{max-width:100%}figcaption{padding-top:4px;overflow-wrap:anywhere}"
    )
    return (
        f'<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{style}</style><h1>{html.escape(title)}</h1><main>{''.join(figures)}</main></html>"
    )


class OutputFolder:
    """Writes a picture for each image, and at the end the files about all images."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        self.figures, self.records, self.panoptic, self.used = [], [], [], set()

    def stem(self, name: str) -> str:
        """Make a name for an image's output files: plain characters, and different from all earlier ones."""
        plain = re.sub(r"[^\w.-]", "_", Path(name).stem, flags=re.ASCII).lstrip(".")[:100] or "image"
        stem, number = plain, 1
        while stem.lower() in self.used:
            number += 1
            stem = f"{plain}_{number}"
        self.used.add(stem.lower())
        return stem

    def add(
        self, name: str, image_id: int, detections: Detections, show: str | None, points: Sequence[Point] = ()
    ) -> None:
        """Write one image's picture (unless `show` is "none") and panoptic map, and collect its records.

        `points` are those of `Detections.draw`.
        """
        stem = self.stem(name)
        if show != "none":
            picture = detections.draw(show, points)
            (self.path / "pictures").mkdir(exist_ok=True)
            picture.save(self.path / "pictures" / f"{stem}.jpg", quality=92)
            side = SHEET if show == "attention" else THUMBNAIL
            self.figures.append(figure(picture, name, summary(detections), side))
        self.records += coco_records(detections, image_id, name)
        if detections.segments is not None:
            (self.path / "panoptic").mkdir(exist_ok=True)
            (self.path / "panoptic" / f"{stem}.png").write_bytes(detections.panoptic_png)
            record = {"image_id": image_id, "file_name": f"{stem}.png", "segments_info": detections.segments}
            self.panoptic.append(record)

    def close(self, title: str, names: dict[int, str]) -> str:
        """Write the files about all images and return what was written; `names` are those of the classes."""
        write_json(self.path / "predictions.json", self.records)
        written = f"{self.path}/predictions.json"
        if self.figures:
            (self.path / "sheet.html").write_text(page(self.figures, title), encoding="utf-8")
            written += ", pictures, sheet.html"
        if self.panoptic:
            things = {s["category_id"]: s["isthing"] for record in self.panoptic for s in record["segments_info"]}
            categories = [{"id": c, "name": names.get(c, str(c)), "isthing": int(thing)} for c, thing in things.items()]
            content = {"annotations": self.panoptic, "categories": categories}
            write_json(self.path / "panoptic.json", content)
            written += ", panoptic, panoptic.json"
        return written
