"""Print the table of the published models, measured here beside the published figures.

python tools/model_table.py                                                  # on noise, weights random
python tools/model_table.py --models detr_resnet50 --coco_path coco --weights weights --output table.md
python tools/model_table.py --coco_path coco --coco_panoptic_path panoptic --weights weights

Parameters are all that training could change; frozen batch norm has none. GFLOPs are 10^9 multiply-adds, each counted
once as in the paper, of convolutions and matrix products; mean over the images. s is the time of one image, batch size
1, network and box post-processing, mean over the images; each size of image is run once before. MB (2^20 bytes) is the
size of the file in --weights, else of the weights alone. AP and PQ are those of the whole validation set; they need
--weights and the data. The published seconds are on a V100.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import Dataset, Subset
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from datasets import build_dataset, get_coco_api_from_dataset
from datasets.loaders import build_val_loader
from datasets.transforms import resize
from engine import evaluate
from main import get_args_parser as get_training_parser
from models import build_model
from util.checkpoint import count_classes, load_checkpoint, load_model
from util.cli import exit_status
from util.dist import pick_device
from util.logger import logger

PANOPTIC = "--dataset_file coco_panoptic --masks"
# Name: file of the weights, flags of the network, and the published figures in the order of COLUMNS (None: none).
MODELS = {
    "detr_resnet50": ("detr-r50-e632da11.pth", "", (41, 86, 0.036, 159, 42.0)),
    "detr_resnet50_dc5": ("detr-r50-dc5-f0fb7ef5.pth", "--dilation", (41, 187, 0.083, 159, 43.3)),
    "detr_resnet101": ("detr-r101-2c7b67e5.pth", "--backbone resnet101", (60, 152, 0.050, 232, 43.5)),
    "detr_resnet101_dc5": (
        "detr-r101-dc5-a2e86def.pth", "--backbone resnet101 --dilation", (60, 253, 0.097, 232, 44.9)
    ),
    "detr_resnet50_panoptic": ("detr-r50-panoptic-00ce5173.pth", PANOPTIC, (None, None, None, 165, 43.4)),
    "detr_resnet50_dc5_panoptic": (
        "detr-r50-dc5-panoptic-da08f1b1.pth", f"{PANOPTIC} --dilation", (None, None, None, 165, 44.6)
    ),
    "detr_resnet101_panoptic": (
        "detr-r101-panoptic-40021d53.pth", f"{PANOPTIC} --backbone resnet101", (None, None, None, 237, 45.1)
    ),
}  # fmt: skip
COLUMNS = {"parameters (M)": "{:.1f}", "GFLOPs": "{:.1f}", "s": "{:.3f}", "MB": "{:.0f}", "AP or PQ": "{:.1f}"}


def get_args_parser() -> argparse.ArgumentParser:
    """Declare the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="NAME", help=f"of {', '.join(MODELS)}")
    add("--coco_path", help="COCO: images to measure on, and AP; without it, images of noise")
    add("--coco_panoptic_path", help="COCO's panoptic maps, for PQ")
    add("--weights", type=Path, help="folder with the published files, under their own names")
    add("--count", type=int, default=100, help="images to measure on: the first ones of val (default 100)")
    add("--noise_size", default="640x480", help="width x height of images of noise (default 640x480)")
    add("--min_size", type=int, default=800, help="shortest side of the model's input (default 800)")
    add("--max_size", type=int, default=1333, help="longest side at most (default 1333)")
    add("--num_workers", type=int, default=2, help="processes that read images for AP and PQ (default 2)")
    add("--device", default="cuda", help="device to run on; without a GPU the CPU is used")
    add("--output", type=Path, help="file to write the table to as well")
    return parser


def training_flags(options: argparse.Namespace, more: str) -> argparse.Namespace:
    """Parse flags of main.py, with this tool's own values for data, sizes and device."""
    args = get_training_parser().parse_args([*more.split(), "--backbone_weights", "none", "--batch_size", "1"])
    for name in ("device", "num_workers", "min_size", "max_size", "coco_path", "coco_panoptic_path"):
        setattr(args, name, getattr(options, name))
    return args


def images_of(options: argparse.Namespace) -> Sequence | Dataset:
    """Return the images to measure on, as items (image [3, H, W], target): validation images, or noise."""
    if options.coco_path:
        val_set = build_dataset("val", training_flags(options, ""))
        return Subset(val_set, range(min(options.count, len(val_set))))
    width, height = (int(side) for side in options.noise_size.split("x"))
    noise = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return [(resize(noise, None, options.min_size, options.max_size)[0], {})] * options.count


@torch.no_grad()
def count_gflops(model: nn.Module, images: Sequence | Dataset, device: torch.device) -> float:
    """Return the mean of the multiply-adds, in 10^9, over the images; each size is run once."""
    counts: dict[torch.Size, float] = {}
    sizes = []
    for i in range(len(images)):
        image = images[i][0]
        sizes.append(image.shape)
        if image.shape not in counts:
            # Not every fused attention kernel is counted, so attention runs as matrix products.
            with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
                model([image.to(device)])
            counts[image.shape] = counter.get_total_flops() / 2e9  # PyTorch counts a multiply-add as two
    return statistics.fmean(counts[size] for size in sizes)


@torch.no_grad()
def time_images(model: nn.Module, postprocess: nn.Module, images: Sequence | Dataset, device: torch.device) -> float:
    """Return the mean of the seconds from an image on the device to its boxes."""
    seconds = []
    for i in range(len(images)):
        image = images[i][0].to(device)
        begin = now(device)
        postprocess(model([image]), torch.tensor([image.shape[-2:]]))
        seconds.append(now(device) - begin)
    return statistics.fmean(seconds)


def now(device: torch.device) -> float:
    """Return a time in seconds, once the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def quality(model: nn.Module, parts: tuple, val_set: Dataset, args: argparse.Namespace, device: torch.device) -> float:
    """Return AP, or PQ for panoptic data, of the whole validation set; `parts` are criterion and post-processors."""
    loader, base_ds = build_val_loader(val_set, args, device), get_coco_api_from_dataset(val_set)
    with tempfile.TemporaryDirectory() as folder:
        stats, _ = evaluate(model, *parts, loader, base_ds, device, folder)
    return 100 * (stats["PQ_all"]["pq"] if "PQ_all" in stats else stats["coco_eval_bbox"][0])


def measure(
    name: str, images: Sequence | Dataset, options: argparse.Namespace, device: torch.device
) -> list[float | None]:
    """Measure one model; return its figures in the order of COLUMNS. Raises ValueError for weights that do not fit."""
    file, flags, _ = MODELS[name]
    path = options.weights / file if options.weights else None
    if path and not path.is_file():
        logger.warning(f"{path}: no such file, so {name} has random weights and no AP or PQ")
        path = None
    state = load_checkpoint(path) if path else None
    args = training_flags(options, flags)
    args.num_classes = count_classes(state["model"]) if state else None
    has_data = args.coco_path and (args.coco_panoptic_path or not args.masks)
    val_set = build_dataset("val", args) if state and has_data else None
    args.thing_classes = getattr(val_set, "thing_classes", None)
    model, *parts = build_model(args)
    if state:
        load_model(model, state, str(path))
    model = model.to(device).eval().requires_grad_(False)  # PyTorch's counter needs this
    gflops = count_gflops(model, images, device)
    seconds = time_images(model, parts[1]["bbox"], images, device)
    size = path.stat().st_size if path else sum(value.nbytes for value in model.state_dict().values())
    score = quality(model, tuple(parts), val_set, args, device) if val_set else None
    return [sum(p.numel() for p in model.parameters()) / 1e6, gflops, seconds, size / 2**20, score]


def table(rows: dict[str, list[float | None]]) -> str:
    """Make the table in Markdown: a column of our figures and one of the published ones for each of COLUMNS."""
    lines = [" | ".join(["| model", *(f"{column} | published" for column in COLUMNS)]) + " |", "|---" * 11 + "|"]
    for name, figures in rows.items():
        cells = [name]
        for form, ours, theirs in zip(COLUMNS.values(), figures, MODELS[name][2], strict=True):
            cells += ["-" if ours is None else form.format(ours), "-" if theirs is None else str(theirs)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Measure the models and print the table."""
    options = get_args_parser().parse_args(argv)
    check_flags(options)
    images, device = images_of(options), pick_device(options.device)
    rows = {name: measure(name, images, options, device) for name in options.models}
    where = f"of {options.coco_path}" if options.coco_path else f"of noise, {options.noise_size} pixels"
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    text = f"{len(images)} images {where}; {machine}; torch {torch.__version__}\n\n{table(rows)}"
    print(text)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")


def check_flags(options: argparse.Namespace) -> None:
    """Raise ValueError or FileNotFoundError for flags that make no sense."""
    if min(options.count, options.min_size, options.max_size - options.min_size + 1) < 1:
        raise ValueError("--count and --min_size are at least 1, and --max_size is not below --min_size")
    sides = options.noise_size.split("x")
    if len(sides) != 2 or not all(side.isdecimal() and int(side) for side in sides):
        raise ValueError(f"--noise_size {options.noise_size}: give WIDTHxHEIGHT, for example 640x480")
    if options.weights and not options.weights.is_dir():
        raise FileNotFoundError(f"--weights {options.weights}: no such folder")


if __name__ == "__main__":
    sys.exit(exit_status(main))
