r"""Draw panoptic maps: each image beside its predicted segments with class names, and the true ones if given.

python tools/draw_panoptic.py runs/masks/panoptic_eval --images DATA/val2017 \
    --truth DATA/annotations/panoptic_val2017.json --output segments.png
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from datasets.coco_index import read_json
from datasets.files import inside
from datasets.images import read_image
from datasets.masks import read_segment_ids
from tools.draw import contact_sheet, draw_panoptic, titled, to_pil
from util.cli import exit_status
from util.text import printable


def get_args_parser() -> argparse.ArgumentParser:
    """Declare the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("predictions", type=Path, help="folder with predictions.json and its PNGs")
    add("--images", type=Path, required=True, help="folder of the images")
    add("--truth", type=Path, help="true annotations, whose maps (in ../panoptic_*) are drawn as well")
    add("--count", type=int, default=4, help="images to draw")
    add("--height", type=int, default=360, help="height of each image on the sheet, in pixels")
    add("--output", type=Path, help="picture to write; default: segments.png beside the folder of predictions")
    add("--allow", action="append", default=[], choices=("outside_paths",),
        help="read files whose names lead out of their folder")  # fmt: skip
    return parser


def main(argv: list[str] | None = None) -> None:
    """Draw the first few images of a folder of predictions, one below the other."""
    args = get_args_parser().parse_args(argv)
    if args.count < 1 or args.height < 1:
        raise ValueError("--count and --height are at least 1")
    file = args.predictions / "predictions.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; an evaluation with --masks on panoptic data writes it")
    predicted = read_panoptic(file)
    names = {category["id"]: str(category.get("name", category["id"])) for category in predicted["categories"]}
    truth = read_panoptic(args.truth) if args.truth else {"annotations": []}
    true_of = {record["image_id"]: record for record in truth["annotations"]}
    files = {record["id"]: record["file_name"] for record in truth.get("images", [])}

    pictures, outside = [], "outside_paths" in args.allow
    records = predicted["annotations"][: args.count]
    for record in records:
        name = files.get(record["image_id"], record["file_name"].replace(".png", ".jpg"))
        image = to_pil(read_image(inside(args.images, name, outside)))
        image = image.resize((round(image.width * args.height / image.height), args.height))
        maps = [("prediction", inside(args.predictions, record["file_name"], outside), record)]
        if args.truth:
            if record["image_id"] not in true_of:
                raise ValueError(f"{args.truth}: no image {record['image_id']}, but {file} has a map of it")
            true = true_of[record["image_id"]]
            folder = args.truth.parent.parent / args.truth.stem  # COCO's layout
            maps.append(("truth", inside(folder, true["file_name"], outside), true))
        pictures.append(titled(image, name))
        for title, png, info in maps:
            title += "" if info["segments_info"] else ": no segment above the threshold (0.85 in an evaluation)"
            pictures.append(titled(draw_panoptic(image, read_segment_ids(png), info["segments_info"], names), title))
    output = args.output or args.predictions.resolve().parent / "segments.png"
    contact_sheet(pictures, 3 if args.truth else 2).save(output)
    print(f"{printable(str(output))}: {len(records)} images")


def read_panoptic(path: Path) -> dict:
    """Read a file in COCO's panoptic format. Raises FileNotFoundError, or ValueError for another format."""
    content = read_json(path)
    content = content if isinstance(content, dict) else {}
    needed = {"annotations": {"image_id", "file_name", "segments_info"}, "categories": {"id"}}
    for name, keys in needed.items():
        records = content.get(name)
        if not isinstance(records, list) or not all(isinstance(r, dict) and keys <= r.keys() for r in records):
            raise ValueError(f"{path}: not in COCO's panoptic format: expected {name} with {', '.join(sorted(keys))}")
    return content


if __name__ == "__main__":
    sys.exit(exit_status(main))
