"""Detect objects in images and write annotated pictures, COCO result files and one HTML page.

python tools/predict.py --checkpoint runs/shapes/checkpoint_best.pth photo.jpg folder "more/*.png" --output found
python tools/predict.py --model detr_resnet50 photo.jpg                                # the published weights
python tools/predict.py --model detr_resnet50 photo.jpg --show attention --points 300,200 40,50
python tools/predict.py --checkpoint model.onnx photo.jpg                              # a file of tools/export.py
python tools/predict.py --checkpoint runs/shapes/checkpoint_best.pth film.mp4          # a film, or 0 for a camera
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from datasets.json_file import read_json
from tools.draw_attention import Point, outside
from tools.inputs import Pictures, find_images, image_ids, read_image_list
from tools.onnx_model import onnx_predictor
from tools.predictor import HUB_NAMES, Detections, Predictor
from tools.results import OutputFolder, summary
from tools.tiles import TiledPredictor, check_tiling
from tools.video import find_video, predict_video
from util.cli import exit_status
from util.text import printable


# fmt: off
def get_args_parser() -> argparse.ArgumentParser:
    """Declare the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("inputs", nargs="+", help="image files, folders (searched with their subfolders), or globs in quotes; "
        "or one film, or the number of a camera")
    add("--checkpoint", help="file or URL; written by training or tools/export.py (.onnx), or in DETR's format")
    add("--model", choices=HUB_NAMES, help="a published model: for its weights, or for a file that names no model")
    add("--annotations", help="COCO file that gives class names, and image ids for the result file")
    add("--threshold", help="lowest score that is kept (default: 0.5; panoptic segments 0.85), or the report.json of "
        "tools/report.py, whose best threshold is used")
    add("--show", choices=("boxes", "masks", "panoptic", "attention", "none"),
        help="what to draw (default: all that the model gives); attention: of the last decoder layer, for each object; "
        "none: only the result files, for speed")
    add("--points", nargs="+", type=point, default=[], metavar="X,Y",
        help="--show attention: pixels of each image from which the last encoder layer's attention is drawn as well")
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
def point(text: str) -> Point:
    """Read a point "x,y"; ValueError for another text, which argparse reports."""
    x, y = (float(number) for number in text.split(","))
    return x, y


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
    if args.points and args.show != "attention":
        raise ValueError("--points chooses where attention starts: add --show attention")
    if args.show == "attention" and (args.compile or args.tile):
        raise ValueError("--show attention runs the whole network, uncompiled: leave out --compile and --tile")
    if not (args.checkpoint or args.model):
        raise ValueError(f"which model? Give --checkpoint FILE, or --model, one of {', '.join(HUB_NAMES)}")
    if (args.checkpoint or "").endswith(".onnx"):
        useless = [f"--{name}" for name in ("model", "compile", "amp", "tf32") if getattr(args, name)]
        if useless:
            raise ValueError(f"{', '.join(useless)}: for PyTorch checkpoints only; {args.checkpoint} runs as exported")
        if args.show == "attention":
            raise ValueError(
                f"--show attention needs a PyTorch checkpoint: {args.checkpoint} holds no attention weights"
            )


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
    if (args.checkpoint or "").endswith(".onnx"):
        predictor = onnx_predictor(args.checkpoint, args.device, names)
    elif args.model:
        predictor = Predictor.from_hub(args.model, args.checkpoint, args.device, names)
    else:
        predictor = Predictor.from_checkpoint(args.checkpoint, args.device, names)
    predictor.min_size = args.min_size or predictor.min_size
    predictor.max_size = max(args.max_size or predictor.max_size, predictor.min_size)
    predictor.amp, predictor.attention = args.amp, args.show == "attention"
    if args.compile:
        predictor.compile(args.compile)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.tf32
    return TiledPredictor(predictor, args.tile, args.overlap, args.batch_size) if args.tile else predictor


def main(argv: list[str] | None = None) -> int:
    """Predict; return 1 if some images have no prediction, or lack one of --points."""
    args = get_args_parser().parse_args(argv)
    args.threshold = read_threshold(args.threshold)
    check_flags(args)
    if video := find_video(args.inputs):
        if args.show == "attention":
            raise ValueError(f"--show attention is for images, and {video} is a film or camera")
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
            if wrong := outside(args.points, result.image):
                failed += 1
                size = " x ".join(str(side) for side in result.image.shape[:0:-1])
                text = f"{path}: {len(wrong)} of --points lie outside its {size} pixels"
                tqdm.write(f"error: {printable(text)}", file=sys.stderr)
            folder.add(images[path], image_id, result, args.show, [p for p in args.points if p not in wrong])
            counts.update(result.name(label) for label in result.labels.tolist())
            tqdm.write(f"{printable(images[path]):{width}}  {len(result):7}  {summary(result)}", file=sys.stdout)
    finally:  # an error or Ctrl-C must not lose the results so far
        written = folder.close(f"{len(folder.used)} images, {counts.total()} objects", predictor.class_names)
    print("all: " + (", ".join(f"{n} {printable(name)}" for name, n in counts.most_common()) or "nothing found"))
    print(f"written: {printable(written)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(exit_status(main))
