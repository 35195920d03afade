"""Find objects in images: annotated pictures, a table, COCO result files and one HTML page of them all.

python tools/predict.py --checkpoint runs/shapes/checkpoint_best.pth photo.jpg folder "more/*.png" --output found
python tools/predict.py --model detr_resnet50 photo.jpg                                # the published weights
"""

import argparse
import base64
import glob
import html
import io
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from datasets.coco_index import read_coco_index
from datasets.images import to_rgb
from engine import allow_tf32
from tools.predictor import HUB_NAMES, Found, Predictor, as_tensor
from util.draw import fit
from util.tool import exit_status

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif"}
THUMBNAIL = 360  # pixels of a picture's longer side on the page


# fmt: off
def get_args_parser() -> argparse.ArgumentParser:
    """Declare the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("inputs", nargs="+", help="image files, folders (searched with their subfolders), or globs in quotes")
    add("--checkpoint", help="file or URL; what training writes, or one in DETR's published format")
    add("--model", choices=HUB_NAMES, help="a published model: for its weights, or for a file that names no model")
    add("--annotations", help="COCO file with the class names, and the image ids for the result file")
    add("--threshold", type=float, help="lowest score that counts (default: 0.5; panoptic segments 0.85)")
    add("--show", choices=("boxes", "masks", "panoptic", "none"),
        help="what to draw (default: all that the model finds); none: only the result files, for speed")
    add("--output", default="predictions", help="folder to write (default: predictions)")
    add("--device", default="cuda", help="device to run on; without a GPU the CPU is used")
    add("--min_size", type=int, help="shortest side as the model sees it (default: as it was evaluated)")
    add("--max_size", type=int, help="longest side at most (default: as it was evaluated)")
    add("--batch_size", type=int, default=1, help="images that go through the network together")
    add("--num_workers", type=int, default=0, help="processes that read images ahead, for many images")
    add("--compile", nargs="?", const="any", choices=("any", "fixed"),
        help="compile the network, for many images; fixed: for images of few sizes (CUDA graphs on a GPU)")
    add("--amp", choices=("bf16", "fp16"), help="half precision in the network")
    add("--tf32", action="store_true", help="let float32 products on a GPU round their inputs to TF32")
    add("--upright", action="store_true", help="turn photographs as their EXIF tag says (training never does)")
    return parser


# fmt: on
def find_images(inputs: Sequence[str]) -> list[Path]:
    """Expand files, folders and globs. Raises FileNotFoundError or ValueError for one that gives no image."""
    paths = []
    for text in inputs:
        path = Path(text)
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
            if not found:
                raise ValueError(f"{text}: no images in this folder ({', '.join(sorted(SUFFIXES))})")
        elif path.is_file():
            found = [path]
        else:
            found = sorted(Path(name) for name in glob.glob(text, recursive=True) if Path(name).is_file())
            if not found:
                raise FileNotFoundError(f"{text}: no such file, folder, or files that match")
        paths += found
    return list(dict.fromkeys(paths))


def image_ids(paths: Sequence[Path], annotations: str | None) -> list[int]:
    """Number the images: as the annotation file does, as their names do if all are numbers, or else from 1."""
    if annotations:
        index = read_coco_index(annotations)
        known = {Path(name).name: int(i) for name, i in zip(index.file_names, index.image_ids, strict=True)}
        unknown = [path.name for path in paths if path.name not in known]
        if unknown:
            raise ValueError(f"{annotations} does not list {len(unknown)} of the images: {', '.join(unknown[:5])}")
        return [known[path.name] for path in paths]
    stems = [path.stem for path in paths]
    if len(set(stems)) == len(stems) and all(stem.isascii() and stem.isdigit() for stem in stems):
        return [int(stem) for stem in stems]
    return list(range(1, len(paths) + 1))


def turned(path: Path) -> Image.Image:
    """Read a photograph the way up that its EXIF tag says."""
    with Image.open(path) as image:
        return to_rgb(ImageOps.exif_transpose(image))


def coco_records(found: Found, image_id: int, path: Path) -> list[dict]:
    """Put what was found into COCO's result format, boxes as (x, y, width, height), masks as RLE."""
    records = []
    for k, (x0, y0, x1, y1) in enumerate(found.boxes.tolist()):
        record = {
            "image_id": image_id,
            "file_name": path.name,
            "category_id": int(found.labels[k]),
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "score": float(found.scores[k]),
        }
        if found.masks is not None:
            from pycocotools import mask

            code = mask.encode(np.asfortranarray(found.masks[k].numpy().astype(np.uint8)))
            record["segmentation"] = {"size": code["size"], "counts": code["counts"].decode()}
        records.append(record)
    return records


def summary(found: Found) -> str:
    """One line of what was found: the objects with their scores, the segments by name."""
    if found.segments is not None:
        return ", ".join(found.name(s["category_id"]) for s in found.segments) or "-"
    pairs = zip(found.labels.tolist(), found.scores.tolist(), strict=True)
    return ", ".join(f"{found.name(label)} {score:.2f}" for label, score in pairs) or "-"


def figure(picture: Image.Image, title: str, text: str) -> str:
    """Make one entry of the page, the picture inside it."""
    file = io.BytesIO()
    thumbnail = picture if max(picture.size) <= THUMBNAIL else fit(picture, THUMBNAIL)[0]
    thumbnail.save(file, "JPEG", quality=85)
    data = base64.b64encode(file.getvalue()).decode()
    title, text = html.escape(title), html.escape(text)
    return (
        f'<figure><img alt="{title}" src="data:image/jpeg;base64,{data}"><figcaption><b>{title}</b><br>{text}'
        "</figcaption></figure>"
    )


def page(figures: Sequence[str], title: str) -> str:
    """Make the HTML page: it needs no other file."""
    style = (
        "body{font:14px sans-serif;margin:16px;background:#fafafa}main{display:flex;flex-wrap:wrap;gap:12px}"
        f"figure{{margin:0;width:{THUMBNAIL}px;background:#fff;border:1px solid #ddd;padding:6px}}"
        "img{max-width:100%}figcaption{padding-top:4px;overflow-wrap:anywhere}"
    )
    return (
        f'<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{style}</style><h1>{html.escape(title)}</h1><main>{''.join(figures)}</main></html>"
    )


class Folder:
    """What the tool leaves behind: pictures one by one, and the files about all of them at the end."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        self.figures, self.records, self.panoptic, self.names = [], [], [], Counter()

    def add(self, path: Path, image_id: int, found: Found, picture: Image.Image | None, text: str) -> None:
        """Write one picture, if there is one, and remember the rest. Two images of one name become name and name_2."""
        self.names[path.stem] += 1
        stem = path.stem + (f"_{self.names[path.stem]}" if self.names[path.stem] > 1 else "")
        if picture is not None:
            (self.path / "pictures").mkdir(exist_ok=True)
            picture.save(self.path / "pictures" / f"{stem}.jpg", quality=92)
            self.figures.append(figure(picture, path.name, text))
        self.records += coco_records(found, image_id, path)
        if found.segments is not None:
            (self.path / "panoptic").mkdir(exist_ok=True)
            ids = np.stack([found.segment_ids >> shift & 255 for shift in (0, 8, 16)], -1).astype(np.uint8)
            Image.fromarray(ids).save(self.path / "panoptic" / f"{stem}.png")
            self.panoptic.append({"image_id": image_id, "file_name": f"{stem}.png", "segments_info": found.segments})

    def close(self, title: str, names: dict[int, str]) -> None:
        """Write the files about all images; `names` are those of the classes."""
        (self.path / "predictions.json").write_text(json.dumps(self.records))
        if self.panoptic:
            kinds = {s["category_id"]: s["isthing"] for record in self.panoptic for s in record["segments_info"]}
            categories = [{"id": c, "name": names.get(c, str(c)), "isthing": int(thing)} for c, thing in kinds.items()]
            content = {"annotations": self.panoptic, "categories": categories}
            (self.path / "panoptic.json").write_text(json.dumps(content))
        if self.figures:
            (self.path / "sheet.html").write_text(page(self.figures, title), encoding="utf-8")


def load_predictor(checkpoint: str | None, model: str | None, annotations: str | None, device: str) -> Predictor:
    """Build the predictor of a checkpoint, a published model, or a published model with the weights of a checkpoint."""
    if not (checkpoint or model):
        raise ValueError(f"which model? Give --checkpoint FILE, or --model, one of {', '.join(HUB_NAMES)}")
    names = read_coco_index(annotations).categories if annotations else None
    if model:
        return Predictor.from_hub(model, checkpoint, device, names)
    return Predictor.from_checkpoint(checkpoint, device, names)


class Pictures(Dataset):
    """Image files, read: an item is (path, image id, uint8 RGB [3, H, W] or the sentence that says why not)."""

    def __init__(self, paths: Sequence[Path], ids: Sequence[int], upright: bool):
        self.paths, self.ids, self.upright = paths, ids, upright

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[Path, int, Tensor | str]:
        try:
            image = as_tensor(turned(self.paths[i]) if self.upright else self.paths[i])
        except (OSError, ValueError, SyntaxError) as error:
            image = str(error)
        return self.paths[i], self.ids[i], image


def walk(predictor: Predictor, loader: DataLoader, threshold: float | None) -> Iterator[tuple[Path, int, Found | None]]:
    """Predict batch by batch; an image that cannot be read is told of, and comes with None."""
    for batch in loader:
        answers = iter(predictor.many([image for *_, image in batch if isinstance(image, Tensor)], threshold))
        for path, image_id, image in batch:
            if isinstance(image, str):
                tqdm.write(f"error: {image}", file=sys.stderr)
            yield path, image_id, next(answers) if isinstance(image, Tensor) else None


def main(argv: list[str] | None = None) -> int:
    """Predict; return 1 if some images could not be read."""
    args = get_args_parser().parse_args(argv)
    paths = find_images(args.inputs)
    inside = [path for path in paths if Path(args.output).resolve() in path.resolve().parents]
    if inside:
        raise ValueError(f"{inside[0]} lies in --output {args.output}, which would be written over: choose another")
    if args.batch_size < 1:
        raise ValueError(f"--batch_size {args.batch_size}: at least 1")
    ids = image_ids(paths, args.annotations)
    allow_tf32(args.tf32)
    predictor = load_predictor(args.checkpoint, args.model, args.annotations, args.device)
    predictor.min_size = args.min_size or predictor.min_size
    predictor.max_size = max(args.max_size or predictor.max_size, predictor.min_size)
    predictor.faster(args.compile, args.amp)
    folder = Folder(args.output)
    width = min(max(len(path.name) for path in paths), 40)
    print(f"{'image':{width}}  objects  what")
    counts, failed = Counter(), 0
    pictures = Pictures(paths, ids, args.upright)
    loader = DataLoader(pictures, args.batch_size, collate_fn=list, num_workers=args.num_workers)
    answers = walk(predictor, loader, args.threshold)
    for path, image_id, found in tqdm(answers, total=len(paths), disable=None, leave=False):
        if found is None:
            failed += 1
            continue
        text = summary(found)
        folder.add(path, image_id, found, None if args.show == "none" else found.draw(args.show), text)
        counts.update(found.name(label) for label in found.labels.tolist())
        tqdm.write(f"{path.name:{width}}  {len(found):7}  {text}", file=sys.stdout)
    folder.close(f"{len(paths) - failed} images, {counts.total()} objects", predictor.class_names)
    print("all: " + (", ".join(f"{n} {name}" for name, n in counts.most_common()) or "nothing found"))
    kinds = ", pictures, sheet.html" * bool(folder.figures) + ", panoptic" * bool(folder.panoptic)
    print(f"written: {folder.path}/predictions.json{kinds}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(exit_status(main))
