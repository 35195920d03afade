"""The generated dataset that needs no download: coloured shapes in COCO's format.

On a small scale it has the properties of COCO: several classes, overlapping objects, small to large objects, images of
different sizes, images without objects, crowds; and for panoptic training stuff behind the objects and unlabelled
patches. The same flags give the same files.
"""

import colorsys
import json
import math
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from datasets import coco, coco_panoptic
from datasets.json_file import read_json
from util.flags import NEW_FLAGS, with_defaults
from util.logger import logger

THINGS = ("circle", "square", "triangle", "star", "ring", "cross", "hexagon", "bar")
STUFF = ("ground", "sky")  # their ids follow the things'
EMPTY, CROWD, VOID = 0.06, 0.06, 0.3  # shares of the images without objects, with a crowd, with an unlabelled patch
COUNTS = (0.35, 0.3, 0.2, 0.15)  # shares of the images with 1, 2, 3 and 4 objects, of those with objects
SMALLEST = 32  # pixels of an image's longer side
VERSION = 2  # of the images that the same settings give
NUMBERS = "shapes.json"  # the file with the settings the images were generated with
EXTENT = (0.35, 0.75)  # diameter of an object, as a share of the image's shorter side
LARGEST_HIDDEN = 0.4  # an object is placed only if every other one keeps at least 60 % of its pixels


def build(image_set: str, args) -> coco.CocoDetection:
    """Build the `train` or `val` part, and generate the files first if they do not exist.

    They are written to `--coco_path`, by default a folder under the user's cache, named after the flags.
    `--dataset_file` is "shapes" for objects only, or "shapes_panoptic" for stuff too.
    """
    args = with_defaults(args, {**NEW_FLAGS, "dataset_file": "shapes", "coco_path": None})
    counts = {"train": args.shapes_train, "val": args.shapes_val}
    if args.coco_path is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        name = f"{args.shapes_train}+{args.shapes_val}-{args.shapes_size}px-{args.shapes_classes}classes"
        args.coco_path = cache / "detr" / f"shapes-{name}-seed{args.shapes_seed}"
    args.coco_panoptic_path = None
    generate(args.coco_path, counts, args.shapes_size, args.shapes_classes, args.shapes_seed)
    if args.dataset_file == "shapes_panoptic":
        return coco_panoptic.build_panoptic(image_set, args, args.num_classes)
    return coco.build(image_set, args)


def generate(root: str | Path, counts: dict[str, int], image_size: int = 192, classes: int = 4, seed: int = 0) -> None:
    """Write the dataset in COCO's layout, unless `root` already holds it.

    It is written to a temporary folder, which is then renamed. Raises ValueError for settings that cannot be drawn, or
    if `root` holds shapes generated with other settings.
    """
    root = Path(root)
    numbers = {**counts, "size": image_size, "classes": classes, "seed": seed, "version": VERSION}
    if image_size < SMALLEST:
        raise ValueError(f"shapes cannot be recognised on {image_size} pixels: choose {SMALLEST} or more")
    if min(counts.values()) < 1:
        raise ValueError(f"{' and '.join(map(str, counts.values()))} images of shapes: at least 1 in each part")
    if not 1 <= classes <= len(THINGS):
        raise ValueError(f"there are shapes for 1 to {len(THINGS)} classes, not {classes}")
    if root.exists() and any(root.iterdir()):
        _check_numbers(root / NUMBERS, numbers)
        return
    logger.info(f"generating {' + '.join(f'{n} {part}' for part, n in counts.items())} images of shapes in {root}")
    root.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    try:
        for part_number, (part, count) in enumerate(counts.items()):
            _write_part(draft, part, count, image_size, classes, (seed, part_number))
        (draft / NUMBERS).write_text(json.dumps(numbers))
        draft.chmod(0o755)
        os.rename(draft, root)
    except OSError:
        if not root.exists():  # otherwise another process has written the same files first
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _check_numbers(path: Path, numbers: dict[str, int]) -> None:
    there = read_json(path) if path.is_file() else numbers
    there = there if isinstance(there, dict) else {}
    other = [f"{name} {there.get(name)}, not {value}" for name, value in numbers.items() if there.get(name) != value]
    if other:
        raise ValueError(f"{path.parent} holds shapes of other settings ({'; '.join(other)}): choose another folder")


def _write_part(root: Path, part: str, count: int, image_size: int, classes: int, seed: tuple[int, int]) -> None:
    from pycocotools import mask as mask_api

    folders = [root / name for name in (f"{part}2017", f"panoptic_{part}2017", "annotations")]
    for folder in folders:
        folder.mkdir(exist_ok=True)
    images, instances, panoptic = [], [], []
    for image_id in range(1, count + 1):
        rng = np.random.default_rng([*seed, image_id])
        pixels, ids, segments = draw_scene(rng, image_size, classes)
        name = f"{image_id:012d}"
        Image.fromarray(pixels).save(folders[0] / f"{name}.jpg", quality=92)
        Image.fromarray(np.stack([ids, np.zeros_like(ids), np.zeros_like(ids)], -1)).save(folders[1] / f"{name}.png")
        height, width = ids.shape
        images.append({"id": image_id, "file_name": f"{name}.jpg", "height": height, "width": width})
        panoptic.append({"image_id": image_id, "file_name": f"{name}.png", "segments_info": segments})
        for segment in segments:
            if segment["category_id"] <= classes:
                rle = mask_api.encode(np.asfortranarray(ids == segment["id"]))
                rle["counts"] = rle["counts"].decode()
                instances.append({**segment, "id": len(instances) + 1, "image_id": image_id, "segmentation": rle})
    names = (*THINGS[:classes], *STUFF)
    categories = [{"id": i, "name": n, "isthing": int(i <= classes)} for i, n in enumerate(names, start=1)]
    for kind, annotations, known in (
        ("instances", instances, categories[:classes]),
        ("panoptic", panoptic, categories),
    ):
        content = {"info": {}, "images": images, "annotations": annotations, "categories": known}
        (folders[2] / f"{kind}_{part}2017.json").write_text(json.dumps(content))


def draw_scene(rng: np.random.Generator, image_size: int, classes: int) -> tuple[np.ndarray, np.ndarray, list[dict]]:
    """Draw one image: pixels uint8 [H, W, 3], segment ids uint8 [H, W] (0 = void), and the segments' records.

    Ids count from 1: first the two kinds of stuff, then the objects in the order they were drawn.
    """
    height, width = (int(image_size * side) for side in rng.uniform(0.75, 1, 2))
    rows, columns = np.arange(height)[:, None], np.arange(width)
    ids = np.ones((height, width), np.uint8)
    horizon = rng.uniform(0.2, 0.8) + 0.05 * np.sin(columns / width * rng.uniform(3, 12))
    ids[rows / height < horizon] = 2
    if rng.random() < VOID:
        ids[_outline(rng, "circle", height, width, 0.35) > 0.5] = 0
    muted = rng.uniform(60, 190, (3, 1)) + rng.uniform(-20, 20, (3, 3))
    pixels = muted.astype(np.float32)[ids]
    pixels += (rows / height * rng.uniform(-40, 40) + columns / width * rng.uniform(-40, 40))[..., None]
    pixels[ids == 0] = rng.uniform(0, 255, ((ids == 0).sum(), 1))  # grey noise, unlike any object

    wanted = 0 if rng.random() < EMPTY else 1 + int(rng.choice(len(COUNTS), p=COUNTS))
    labels = {1: classes + 1, 2: classes + 2}
    crowded = wanted > 0 and rng.random() < CROWD
    if crowded:
        labels[3] = int(rng.integers(1, classes + 1))
        _place_crowd(rng, pixels, ids, labels[3])
    whole = {3: int((ids == 3).sum())}  # pixels of each object before others hide parts of it
    for _ in range(6 * wanted):  # tries: an object that would hide too much of another is not placed
        if len(labels) == wanted + 2:
            break
        label, segment = int(rng.integers(1, classes + 1)), len(labels) + 1
        cover = _outline(rng, THINGS[label - 1], height, width, rng.uniform(*EXTENT))
        hidden = np.bincount(ids[cover > 0.5], minlength=segment)
        now = np.bincount(ids.ravel(), minlength=segment)
        if all(now[i] - hidden[i] >= (1 - LARGEST_HIDDEN) * whole[i] for i in range(3, segment)):
            _paint(rng, pixels, ids, cover, segment, label)
            labels[segment], whole[segment] = label, int(hidden.sum())
    pixels += 6 * rng.standard_normal(pixels.shape, dtype=np.float32)
    return pixels.clip(0, 255).astype(np.uint8), ids, _records(ids, labels, crowd=3 if crowded else None)


def _outline(rng: np.random.Generator, name: str, height: int, width: int, extent: float) -> np.ndarray:
    """Draw a shape at a random place and angle: the share of each pixel that it covers, [H, W] in 0..1.

    `extent` is its diameter as a share of the image's shorter side; its centre keeps it within the image.
    """
    fine = 3  # sub-pixels in a pixel, each way
    radius = extent * min(height, width) / 2
    centre = np.array([rng.uniform(radius, side - radius) for side in (width, height)])
    turn = rng.uniform(0, 2 * math.pi)

    def polygon(corners: int, radii: tuple[float, ...] = (1.0,), stretch: float = 1.0) -> list[tuple[float, float]]:
        angles = np.arange(corners) * 2 * math.pi / corners + math.pi / 4
        reach = radius * np.resize(radii, corners)
        points = np.stack([np.cos(angles) * reach, np.sin(angles) * reach * stretch], 1)
        rotation = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
        return [tuple(point) for point in (points @ rotation.T + centre) * fine]

    picture = Image.new("L", (width * fine, height * fine))
    draw = ImageDraw.Draw(picture)
    if name in ("circle", "ring"):
        draw.polygon(polygon(48), fill=255)
        if name == "ring":
            draw.polygon(polygon(48, (0.55,)), fill=0)
    elif name == "cross":
        draw.polygon(polygon(12, (0.45, 1.0, 1.0)), fill=255)
    elif name == "star":
        draw.polygon(polygon(10, (1.0, 0.45)), fill=255)
    elif name == "bar":
        draw.polygon(polygon(4, stretch=0.3), fill=255)
    else:
        draw.polygon(polygon({"square": 4, "triangle": 3, "hexagon": 6}[name]), fill=255)
    return np.asarray(picture.reduce(fine), np.float32) / 255


def _paint(
    rng: np.random.Generator, pixels: np.ndarray, ids: np.ndarray, cover: np.ndarray, segment: int, label: int
) -> None:
    """Paint a shape in a vivid colour with a hue near that of its class, and write its id into the map."""
    if cover.max() <= 0.5:  # thinner than a pixel
        return
    rows, columns = cover.any(1).nonzero()[0], cover.any(0).nonzero()[0]
    part = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    pixels, ids, cover = pixels[part], ids[part], cover[part]
    hue = label * 0.618 + rng.uniform(-0.04, 0.04)  # the golden ratio spreads any number of hues
    colour = 255 * np.array(colorsys.hsv_to_rgb(hue % 1, rng.uniform(0.75, 1), rng.uniform(0.6, 1)), np.float32)
    pixels += cover[..., None] * (colour - pixels)
    ids[cover > 0.5] = segment


def _place_crowd(rng: np.random.Generator, pixels: np.ndarray, ids: np.ndarray, label: int) -> None:
    """Scatter many small shapes of one class over a part of the image; together they are segment 3."""
    height, width = ids.shape
    h, w = height // 3, width // 3
    top, left = rng.integers(0, height - h), rng.integers(0, width - w)
    part = np.s_[top : top + h, left : left + w]
    for _ in range(int(rng.integers(8, 14))):
        _paint(rng, pixels[part], ids[part], _outline(rng, THINGS[label - 1], h, w, 0.3), 3, label)


def _records(ids: np.ndarray, labels: dict[int, int], crowd: int | None) -> list[dict]:
    """Return records of the visible segments, as in COCO panoptic's `segments_info`."""
    records = []
    for segment, label in labels.items():
        rows, columns = np.nonzero(ids == segment)
        if len(rows):
            x, y = int(columns.min()), int(rows.min())
            box = [x, y, int(columns.max()) - x + 1, int(rows.max()) - y + 1]
            record = {"id": segment, "category_id": label, "area": len(rows), "bbox": box}
            records.append({**record, "iscrowd": int(segment == crowd)})
    return records
