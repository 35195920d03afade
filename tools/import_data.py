"""Bring a dataset of another format into COCO's layout, for training; images are linked, not copied.

python tools/import_data.py --voc VOCdevkit/mine --output data/mine        # Annotations/, JPEGImages/, ImageSets/Main/
python tools/import_data.py --yolo yolo/data.yaml --output data/mine       # images/ and labels/ as Ultralytics writes
python tools/import_data.py --cvat annotations.xml --images photos --output data/mine        # CVAT for images 1.1
python tools/import_data.py --roboflow export --output data/mine           # train/, valid/, test/ in COCO's format

The parts of the source stay (train; val or valid; test). Where it has no validation part, --val_share of the training
images become it. Then look at the result: tools/check_dataset.py.
"""

import argparse
import importlib
import os
import random
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from datasets.json_file import read_json, write_json
from util.cli import HelpFormatter, exit_status

PARTS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
Part = tuple[dict, Path]  # the contents of a COCO file, and the folder of its images


def get_args_parser() -> argparse.ArgumentParser:
    """Declare the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--voc", type=Path, help="folder in Pascal VOC's format")
    source.add_argument("--yolo", type=Path, help="data.yaml of a dataset in YOLO's format")
    source.add_argument("--cvat", type=Path, help="XML file of CVAT for images 1.1, with --images")
    source.add_argument("--roboflow", type=Path, help="folder of a Roboflow export in COCO's format")
    parser.add_argument("--images", type=Path, help="folder of the images of --cvat")
    parser.add_argument("--output", type=Path, required=True, help="folder to write; it must be empty or absent")
    parser.add_argument("--val_share", type=float, default=0.2, help="share of the images that validate")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of the images that validate")
    return parser


def from_voc(folder: Path) -> dict[str, Part]:
    """Read a VOC folder; the files of ImageSets/Main that are called as parts name their images."""
    content = _package("hotcoco", "hotcoco").COCO.from_voc(str(_existing(folder))).dataset
    parts = {}
    for path in sorted((folder / "ImageSets" / "Main").glob("*.txt")):
        if path.stem in PARTS:
            stems = {line.split()[0] for line in path.read_text().splitlines() if line.strip()}
            chosen = [image for image in content["images"] if Path(image["file_name"]).stem in stems]
            parts[PARTS[path.stem]] = (_subset(content, chosen), folder / "JPEGImages")
    return parts or {"train": (content, folder / "JPEGImages")}


def from_yolo(file: Path) -> dict[str, Part]:
    """Read the folders of images that a data.yaml names; `labels` replaces `images` in the paths of their labels."""
    described = _package("yaml", "pyyaml").safe_load(_existing(file).read_text())
    if not isinstance(described, dict) or "names" not in described:
        raise ValueError(f"{file}: no `names` of the classes in it")
    root = file.parent / (described.get("path") or "")
    root = root if root.is_dir() else file.parent
    parts = {}
    for name, part in PARTS.items():
        if described.get(name):
            images = root / described[name]
            images = images if images.is_dir() else file.parent / str(described[name]).removeprefix("../")
            labels = Path(*[{"images": "labels"}.get(word, word) for word in _existing(images).parts])
            parts[part] = (_yolo_part(file, images, labels), images)
    if not parts:
        raise ValueError(f"{file}: no `train` or `val` in it")
    return parts


def _yolo_part(file: Path, images: Path, labels: Path) -> dict:
    """Read one part; images without a file of labels have no objects."""
    names = {path.stem: path.name for path in sorted(images.iterdir()) if path.suffix.lower() in SUFFIXES}
    with tempfile.TemporaryDirectory() as folder:  # hotcoco expects the labels and data.yaml in one folder
        (Path(folder) / "data.yaml").write_bytes(file.read_bytes())
        for stem in names:
            label = labels / f"{stem}.txt"
            (Path(folder) / label.name).write_bytes(label.read_bytes() if label.is_file() else b"")
        content = _package("hotcoco", "hotcoco").COCO.from_yolo(folder, images_dir=str(images)).dataset
    for image in content["images"]:
        image["file_name"] = names[image["file_name"]]
    return content


def from_cvat(file: Path, images: Path | None) -> dict[str, Part]:
    """Read a CVAT file; all images are one part."""
    if images is None:
        raise ValueError("--cvat needs --images, the folder of its images")
    return {"train": (_package("hotcoco", "hotcoco").COCO.from_cvat(str(_existing(file))).dataset, _existing(images))}


def from_roboflow(folder: Path) -> dict[str, Part]:
    """Read the parts of a Roboflow export, which have their annotations beside their images."""
    files = [(part, folder / name / "_annotations.coco.json") for name, part in PARTS.items()]
    found = {part: (read_json(path), path.parent) for part, path in files if path.is_file()}
    if not found:
        raise ValueError(f"{folder}: no train/_annotations.coco.json in it")
    return found


def split(content: dict, val_share: float, seed: int) -> dict[str, dict]:
    """Draw the images that validate: at least one, and not all."""
    images = list(content["images"])
    if not 0 < val_share < 1 or len(images) < 2:
        raise ValueError(f"--val_share {val_share} of {len(images)} images: both parts need an image")
    random.Random(seed).shuffle(images)
    count = min(max(round(val_share * len(images)), 1), len(images) - 1)
    return {"train": _subset(content, images[count:]), "val": _subset(content, images[:count])}


def write_part(root: Path, part: str, content: dict, images: Path) -> str:
    """Write the annotations of a part, link its images, and return a line about it.

    Raises ValueError for images that do not exist.
    """
    missing = [image["file_name"] for image in content["images"] if not (images / image["file_name"]).is_file()]
    if missing:
        raise ValueError(f"{len(missing)} images are not in {images}: {', '.join(missing[:5])}")
    folder = root / f"{part}2017"
    for image in content["images"]:
        link = folder / image["file_name"]
        link.parent.mkdir(parents=True, exist_ok=True)
        try:
            link.symlink_to((images / image["file_name"]).resolve())
        except OSError:  # Windows without the right to make symbolic links
            os.link(images / image["file_name"], link)
    (root / "annotations").mkdir(exist_ok=True)
    write_json(root / "annotations" / f"instances_{part}2017.json", content)
    return f"{part}: {len(content['images'])} images, {len(content['annotations'])} objects"


def _subset(content: dict, images: Iterable[dict]) -> dict:
    images = sorted(images, key=lambda image: image["id"])
    ids = {image["id"] for image in images}
    return {**content, "images": images, "annotations": [a for a in content["annotations"] if a["image_id"] in ids]}


def _existing(path: Path) -> Path:
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    return path


def _package(name: str, to_install: str):
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ValueError(f"reading this format needs a package: pip install {to_install}") from None


def main(argv: list[str] | None = None) -> None:
    """Convert the dataset that the flags name."""
    flags = get_args_parser().parse_args(argv)
    if flags.output.exists() and any(flags.output.iterdir()):
        raise ValueError(f"--output {flags.output} is not empty: name a new folder")
    if flags.voc:
        parts = from_voc(flags.voc)
    elif flags.yolo:
        parts = from_yolo(flags.yolo)
    elif flags.cvat:
        parts = from_cvat(flags.cvat, flags.images)
    else:
        parts = from_roboflow(flags.roboflow)
    if "val" not in parts:
        content, images = parts.pop("train")
        halves = split(content, flags.val_share, flags.seed)
        parts = {**{part: (half, images) for part, half in halves.items()}, **parts}
    for part, (content, images) in parts.items():
        print(write_part(flags.output, part, content, images))
    names = ", ".join(f"{c['id']} {c['name']}" for c in content["categories"])
    print(f"classes: {names}\nnext: python tools/check_dataset.py --coco_path {flags.output}")


if __name__ == "__main__":
    sys.exit(exit_status(main))
