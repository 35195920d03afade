r"""A picture of panoptic maps: each image beside its segments, with the classes written on them.

python tools/draw_panoptic.py runs/masks/panoptic_eval --images DATA/val2017 \
    --truth DATA/annotations/panoptic_val2017.json --output segments.png
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))

from datasets.coco_index import read_json
from datasets.images import read_image
from datasets.masks import read_segment_ids
from util.draw import class_colour, contact_sheet, draw_segments, titled
from util.tool import exit_status


def main(argv: list[str] | None = None) -> None:
    """Draw the first few images of a folder of predictions, one below the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("predictions", type=Path, help="folder with predictions.json and its PNGs")
    parser.add_argument("--images", type=Path, required=True, help="folder of the images")
    parser.add_argument("--truth", type=Path, help="true annotations, whose maps (in ../panoptic_*) are drawn as well")
    parser.add_argument("--count", type=int, default=4, help="images to draw")
    parser.add_argument("--height", type=int, default=360, help="pixels of each in the picture")
    parser.add_argument("--output", type=Path, default=Path("segments.png"))
    args = parser.parse_args(argv)
    file = args.predictions / "predictions.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; an evaluation with --masks on panoptic data writes it")
    found = read_panoptic(file)
    names = {c["id"]: c["name"] for c in found["categories"]}
    truth = read_panoptic(args.truth) if args.truth else {"annotations": []}
    true_of = {record["image_id"]: record for record in truth["annotations"]}
    files = {record["id"]: record["file_name"] for record in truth.get("images", [])}

    pictures = []
    for record in found["annotations"][: args.count]:
        name = files.get(record["image_id"], record["file_name"].replace(".png", ".jpg"))
        pixels = Image.fromarray(read_image(args.images / name).permute(1, 2, 0).numpy())
        image = pixels.resize((round(pixels.width * args.height / pixels.height), args.height))
        row = [titled(image, name)]
        row.append(titled(segments(image, args.predictions / record["file_name"], record, names), "prediction"))
        if args.truth:
            if record["image_id"] not in true_of:
                raise ValueError(f"{args.truth}: no image {record['image_id']}, but {file} has a map of it")
            true = true_of[record["image_id"]]
            folder = args.truth.parent.parent / args.truth.stem  # COCO's layout
            row.append(titled(segments(image, folder / true["file_name"], true, names), "truth"))
        pictures += row
    contact_sheet(pictures, 3 if args.truth else 2).save(args.output)
    print(f"{args.output}: {min(args.count, len(found['annotations']))} images")


def read_panoptic(path: Path) -> dict:
    """Read a file in COCO's panoptic format. Raises FileNotFoundError, or ValueError for one of another."""
    content = read_json(path)
    maps = content.get("annotations") if isinstance(content, dict) else None
    if not isinstance(maps, list) or "categories" not in content or not all("segments_info" in one for one in maps):
        raise ValueError(f"{path}: not in COCO's panoptic format: it has no categories, or maps without segments_info")
    return content


def segments(image: Image.Image, png: Path, record: dict, names: dict[int, str]) -> Image.Image:
    """Draw the segments of a map, which may be of another size, over an image."""
    ids = Image.fromarray(read_segment_ids(png).astype(np.int32)).resize(image.size, Image.Resampling.NEAREST)
    drawn = [segment for segment in record["segments_info"] if (np.array(ids) == segment["id"]).any()]
    captions = [names.get(segment["category_id"], "?") for segment in drawn]
    colours = [class_colour(segment["category_id"], k) for k, segment in enumerate(drawn)]
    return draw_segments(image, np.array(ids), [segment["id"] for segment in drawn], captions, colours)


if __name__ == "__main__":
    sys.exit(exit_status(main))
