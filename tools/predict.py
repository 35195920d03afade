"""Detect objects in images and write annotated pictures, COCO result files and one HTML page.

python tools/predict.py --checkpoint runs/shapes/checkpoint_best.pth photo.jpg folder "more/*.png" --output found
python tools/predict.py --model detr_resnet50 photo.jpg                                # the published weights
python tools/predict.py --checkpoint runs/shapes/checkpoint_best.pth film.mp4          # a film, or 0 for a camera
"""

import argparse
import glob
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from datasets.coco_index import read_coco_index
from datasets.images import allow_large_images, read_upright
from datasets.json_file import read_json
from tools.predictor import HUB_NAMES, Detections, Predictor, as_tensor
from tools.results import OutputFolder, summary
from tools.tiles import TiledPredictor, check_tiling
from tools.video import find_video, predict_video
from util.cli import exit_status
from util.text import printable

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif"}


# fmt: off
def get_args_parser() -> argparse.ArgumentParser:
    """Declare the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("inputs", nargs="+", help="image files, folders (searched with their subfolders), or globs in quotes; "
        "or one film, or the number of a camera")
    add("--checkpoint", help="file or URL; written by training, or in DETR's published format")
    add("--model", choices=HUB_NAMES, help="a published model: for its weights, or for a file that names no model")
    add("--annotations", help="COCO file that gives class names, and image ids for the result file")
    add("--threshold", help="lowest score that is kept (default: 0.5; panoptic segments 0.85), or the report.json of "
        "tools/report.py, whose best threshold is used")
    add("--show", choices=("boxes", "masks", "panoptic", "none"),
        help="what to draw (default: all that the model gives); none: only the result files, for speed")
    add("--output", default="predictions", help="folder to write (default: predictions)")
    add("--device", default="cuda", help="device to run on; without a GPU the CPU is used")
    add("--min_size", type=int, help="shortest side of the model's input (default: as in its evaluation)")
    add("--max_size", type=int, help="longest side at most (default: as in its evaluation)")
    add("--tile", type=int, help="cut images into tiles of so many pixels, for small objects in large images")
    add("--overlap", type=float, default=0.2, help="share of a tile that its neighbour repeats (default: 0.2)")
    add("--every", type=int, default=1, help="predict each N-th frame of a film, and repeat the boxes between")
    add("--batch_size", type=int, default=1, help="images (or tiles) in one forward pass")
    add("--num_workers", type=int, default=0, help="processes that read images ahead, for many images")
    add("--compile", nargs="?", const="any", choices=("any", "fixed"),
        help="compile the network, for many images; fixed: for images of few sizes (CUDA graphs on a GPU)")
    add("--amp", choices=("bf16", "fp16"), help="half precision in the network")
    add("--tf32", action="store_true", help="allow TF32 in float32 products on a GPU")
    add("--upright", action="store_true", help="rotate photographs and films as their files say (training never does)")
    add("--allow", action="append", default=[], choices=("large_images",), help="read images beyond PIL's limit")
    return parser


# fmt: on
def check_flags(args: argparse.Namespace) -> None:
    """Raise ValueError for numbers that make no sense."""
    for name, least in (("min_size", 1), ("max_size", 1), ("batch_size", 1), ("num_workers", 0), ("every", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"--{name} {value}: at least {least}")
    if args.tile is not None:
        check_tiling(args.tile, args.overlap)
    if args.threshold is not None and not 0 <= args.threshold <= 1:
        raise ValueError(f"--threshold {args.threshold}: a score between 0 and 1")
    if not (args.checkpoint or args.model):
        raise ValueError(f"which model? Give --checkpoint FILE, or --model, one of {', '.join(HUB_NAMES)}")


def read_threshold(text: str | None) -> float | None:
    """Return the number that --threshold gives, or the best threshold of the report that it names."""
    if text is None:
        return None
    try:
        return float(text)
    except ValueError:
        report = read_json(text)
    if not isinstance(report, dict) or "best" not in report:
        raise ValueError(f"--threshold {text}: neither a number nor a report of boxes or masks by tools/report.py")
    return report["best"]["threshold"]


def find_images(inputs: Sequence[str]) -> dict[Path, str]:
    """Expand files, folders and globs to {path: its path relative to the given folder, or its file name}.

    Raises FileNotFoundError or ValueError for an input that gives no image.
    """
    images, seen = {}, set()
    for text in inputs:
        folder = Path(text)
        if folder.is_dir():
            files = (path for path in sorted(folder.rglob("*")) if path.suffix.lower() in SUFFIXES)
            found = {path: path.relative_to(folder) for path in files if path.is_file() or path.is_symlink()}
            if not found:
                raise ValueError(f"{text}: no images in this folder ({', '.join(sorted(SUFFIXES))})")
        else:
            names = [text] if folder.is_file() else sorted(glob.glob(text, recursive=True))
            found = {Path(name): Path(name).name for name in names if Path(name).is_file()}
            if not found:
                raise FileNotFoundError(f"{text}: no such file or folder, and no file matches")
        for path, relative in found.items():
            absolute = os.path.abspath(path)
            if absolute not in seen:
                seen.add(absolute)
                images[path] = PurePosixPath(relative).as_posix()
    return images


def read_image_list(path: str | Path) -> tuple[dict[str, int], dict[int, str]]:
    """Read {file name: image id} and {class id: name} of a COCO file."""
    index = read_coco_index(path)
    ids = dict(zip(index.file_names.tolist(), index.image_ids.tolist(), strict=True))
    if len(ids) < len(index.file_names):
        raise ValueError(f"{path}: some images have the same file name")
    return ids, index.categories


def image_ids(paths: Sequence[Path], annotations: str | None, relative: Sequence[str] | None = None) -> list[int]:
    """Number the images: by the annotation file, else by their names if these are different numbers, else from 1.

    An image is looked up by its path relative to the given folder, then by the listed names that its path ends in.
    Raises ValueError for images that are not listed, that match several listed names, or that match the same one.
    """
    if annotations:
        return _listed_ids(paths, read_image_list(annotations)[0], relative or [""] * len(paths), annotations)
    stems = [path.stem for path in paths]
    if all(stem.isascii() and stem.isdigit() for stem in stems):
        numbers = [int(stem) for stem in stems]
        if len(set(numbers)) == len(numbers):
            return numbers
    return list(range(1, len(paths) + 1))


def _listed_ids(paths: Sequence[Path], listed: dict[str, int], relative: Sequence[str], file: str) -> list[int]:
    ids, unknown = {}, []
    for path, name in zip(paths, relative, strict=True):
        parts = Path(os.path.abspath(path)).parts
        endings = ["/".join(parts[k:]) for k in range(1, len(parts))]
        names = [name] if name in listed else [ending for ending in endings if ending in listed]
        if len(names) > 1:
            raise ValueError(f"{path} could be any of {', '.join(names)} in {file}: give the folder of the images")
        if not names:
            unknown.append(name or path.name)
        elif listed[names[0]] in ids.values():
            other = next(other for other, i in ids.items() if i == listed[names[0]])
            raise ValueError(f"{path} and {other} are both {names[0]} in {file}: give only one of them")
        else:
            ids[path] = listed[names[0]]
    if unknown:
        raise ValueError(f"{file} does not list {len(unknown)} of the images: {', '.join(unknown[:5])}")
    return list(ids.values())


class Pictures(Dataset):
    """Image files; an item is (path, image id, uint8 RGB [3, H, W] or an error message)."""

    def __init__(self, paths: Sequence[Path], ids: Sequence[int], upright: bool, large: bool = False):
        self.paths, self.ids, self.upright, self.large = paths, ids, upright, large

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[Path, int, Tensor | str]:
        path = self.paths[i]
        if self.large:
            allow_large_images()  # here, because this may be a worker process
        try:
            image = as_tensor(read_upright(path) if self.upright else path)
        except (ValueError, OSError, MemoryError) as error:  # the other images must not be lost
            image = str(error)
        return path, self.ids[i], image


def predict_each(
    predictor: Predictor | TiledPredictor, images: list[Tensor], threshold: float | None
) -> list[Detections | str]:
    """Predict a batch; if that fails, predict image by image, and return an error message for those that fail."""
    try:
        found = predictor.predict_batch(images, threshold)
        return [each if each.is_finite() else "no prediction: the model's numbers are not finite" for each in found]
    except (RuntimeError, ValueError, MemoryError) as error:
        if len(images) == 1:
            return [f"no prediction for an image of {list(images[0].shape[1:])} pixels: {error}"]
    return [predict_each(predictor, [image], threshold)[0] for image in images]


def predict_files(
    predictor: Predictor | TiledPredictor, loader: DataLoader, threshold: float | None
) -> Iterator[tuple]:
    """Yield (path, image id, Detections or an error message) for every image."""
    for batch in loader:
        results = iter(predict_each(predictor, [i for *_, i in batch if isinstance(i, Tensor)], threshold))
        for path, image_id, image in batch:
            result = next(results) if isinstance(image, Tensor) else image
            if isinstance(result, str) and str(path) not in result:
                result = f"{path}: {result}"
            yield path, image_id, result


def build_predictor(args: argparse.Namespace) -> Predictor | TiledPredictor:
    """Build the predictor that the flags describe."""
    names = read_image_list(args.annotations)[1] if args.annotations else None
    if args.model:
        predictor = Predictor.from_hub(args.model, args.checkpoint, args.device, names)
    else:
        predictor = Predictor.from_checkpoint(args.checkpoint, args.device, names)
    predictor.min_size = args.min_size or predictor.min_size
    predictor.max_size = max(args.max_size or predictor.max_size, predictor.min_size)
    predictor.amp = args.amp
    if args.compile:
        predictor.compile(args.compile)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.tf32
    return TiledPredictor(predictor, args.tile, args.overlap, args.batch_size) if args.tile else predictor


def main(argv: list[str] | None = None) -> int:
    """Predict; return 1 if there is no prediction for some images."""
    args = get_args_parser().parse_args(argv)
    args.threshold = read_threshold(args.threshold)
    check_flags(args)
    if video := find_video(args.inputs):
        predictor = build_predictor(args)
        predict_one = lambda frame: predict_each(predictor, [frame], args.threshold)[0]  # noqa: E731
        return predict_video(
            video, predict_one, predictor.class_names, args.output, args.show, args.every, args.upright
        )
    images = find_images(args.inputs)
    inside = [path for path in images if Path(args.output).resolve() in path.resolve().parents]
    if inside:
        raise ValueError(f"{inside[0]} lies in --output {args.output} and could be overwritten: choose another")
    ids = image_ids(list(images), args.annotations, list(images.values()))
    predictor = build_predictor(args)
    folder = OutputFolder(args.output)
    width = min(max(len(printable(name)) for name in images.values()), 40)
    print(f"{'image':{width}}  objects  detections")
    counts, failed = Counter(), 0
    pictures = Pictures(list(images), ids, args.upright, "large_images" in args.allow)
    loader = DataLoader(pictures, args.batch_size, collate_fn=list, num_workers=args.num_workers)
    results = predict_files(predictor, loader, args.threshold)
    try:
        for path, image_id, result in tqdm(results, total=len(images), disable=None, leave=False):
            if isinstance(result, str):
                failed += 1
                tqdm.write(f"error: {printable(result)}", file=sys.stderr)
                continue
            folder.add(images[path], image_id, result, args.show)
            counts.update(result.name(label) for label in result.labels.tolist())
            tqdm.write(f"{printable(images[path]):{width}}  {len(result):7}  {summary(result)}", file=sys.stdout)
    finally:  # an error or Ctrl-C must not lose the results so far
        written = folder.close(f"{len(folder.used)} images, {counts.total()} objects", predictor.class_names)
    print("all: " + (", ".join(f"{n} {printable(name)}" for name, n in counts.most_common()) or "nothing found"))
    print(f"written: {printable(written)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(exit_status(main))
