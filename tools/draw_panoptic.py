r"""A picture of panoptic maps: each image beside its segments, with the classes written on them.

python tools/draw_panoptic.py runs/masks/panoptic_eval --images DATA/val2017 \
    --truth DATA/annotations/panoptic_val2017.json --output segments.png
"""

import argparse
import colorsys
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).parent.parent))

from datasets.images import read_image
from datasets.masks import read_segment_ids


def main() -> None:
    """Draw the first few images of a folder of predictions, one below the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("predictions", type=Path, help="folder with predictions.json and its PNGs")
    parser.add_argument("--images", type=Path, required=True, help="folder of the images")
    parser.add_argument("--truth", type=Path, help="true annotations, whose maps (in ../panoptic_*) are drawn as well")
    parser.add_argument("--count", type=int, default=4, help="images to draw")
    parser.add_argument("--height", type=int, default=240, help="pixels of each in the picture")
    parser.add_argument("--output", type=Path, default=Path("segments.png"))
    args = parser.parse_args()
    found = json.loads((args.predictions / "predictions.json").read_text())
    names = {c["id"]: c["name"] for c in found["categories"]}
    truth = json.loads(args.truth.read_text()) if args.truth else {"annotations": [], "images": []}
    true_of = {record["image_id"]: record for record in truth["annotations"]}
    files = {record["id"]: record["file_name"] for record in truth["images"]}

    rows = []
    for record in found["annotations"][: args.count]:
        image_id = record["image_id"]
        pixels = read_image(args.images / files.get(image_id, record["file_name"].replace(".png", ".jpg")))
        pixels = pixels.permute(1, 2, 0).numpy()
        row = [pixels, paint(pixels, read_segment_ids(args.predictions / record["file_name"]), record, names)]
        if image_id in true_of:
            folder = args.truth.parent.parent / args.truth.stem  # COCO's layout
            true_map = read_segment_ids(folder / true_of[image_id]["file_name"])
            row.append(paint(pixels, true_map, true_of[image_id], names))
        rows.append(side_by_side(row, args.height))
    width = max(row.width for row in rows)
    sheet = Image.new("RGB", (width, sum(row.height + 4 for row in rows)), "white")
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height + 4
    sheet.save(args.output)
    print(f"{args.output}: {len(rows)} images; image, prediction{', truth' if args.truth else ''}")


def paint(pixels: np.ndarray, ids: np.ndarray, record: dict, names: dict[int, str]) -> Image.Image:
    """Colour the segments of an image [H, W, 3] by their map of ids [H, W]; void stays black."""
    colours = np.zeros((*ids.shape, 3), np.float32)
    for k, segment in enumerate(record["segments_info"]):
        hue = (0.618 * segment["category_id"] + 0.03 * k) % 1
        colours[ids == segment["id"]] = 255 * np.array(colorsys.hsv_to_rgb(hue, 0.7, 1 - 0.06 * (k % 5)))
    known = np.isin(ids, [s["id"] for s in record["segments_info"]])[..., None]
    picture = Image.fromarray(np.where(known, 0.35 * pixels + 0.65 * colours, 0).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for segment in record["segments_info"]:
        rows, columns = np.nonzero(ids == segment["id"])
        middle = len(rows) // 2  # a pixel of the segment itself, wherever its box lies
        place = (int(columns[middle]), int(rows[middle]))
        draw.text(place, names.get(segment["category_id"], "?"), fill="black", anchor="mm", stroke_width=0)
    return picture


def side_by_side(pictures: list, height: int) -> Image.Image:
    """Put pictures of one size next to each other, each `height` pixels high."""
    pictures = [p if isinstance(p, Image.Image) else Image.fromarray(p) for p in pictures]
    pictures = [p.resize((round(p.width * height / p.height), height)) for p in pictures]
    row = Image.new("RGB", (sum(p.width + 4 for p in pictures), height), "white")
    left = 0
    for picture in pictures:
        row.paste(picture, (left, 0))
        left += picture.width + 4
    return row


if __name__ == "__main__":
    main()
