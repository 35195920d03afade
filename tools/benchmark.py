"""Measure speed and memory: forward pass, training step, losses, data loading, evaluation.

python tools/benchmark.py forward train criterion --peer transformers          # beside Hugging Face's DETR
python tools/benchmark.py forward --batch 1 4 16 --precision float32 bf16 --compile --device cuda
python tools/benchmark.py train --peer ../other-detr                           # another tree with DETR's contract
python tools/benchmark.py masks --batch 1                                      # matched queries, beside all queries
python tools/benchmark.py loader predict --coco_path /data/coco                # images per second
python tools/benchmark.py index evaluator --coco_path /data/coco               # beside pycocotools

The calls of both sides alternate, so that other load on the machine slows both. `s` is the median of --rounds
measurements by torch.utils.benchmark.Timer, `spread` the distance of their quartiles, `peak_gb` the memory that a call
needs on top of what was in use before it, `ratio` the peer's time divided by ours.
"""

import argparse
import contextlib
import functools
import io
import itertools
import json
import platform
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools.benchmark_network import (
    AMP,
    CALLS,
    OBJECTS,
    Clock,
    Detr,
    OtherTree,
    Transformers,
    autocast,
    clock,
    masks,
    prepare,
)

# Other modules of this project are imported in functions: in the process of --peer FOLDER they are that folder's.
DETECTIONS = 100  # in an image, for `evaluator`
LOADED = 32  # images in a call of `loader` and `predict`


# fmt: off
def get_args_parser() -> argparse.ArgumentParser:
    """Declare the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("what", nargs="+", choices=(*CALLS, "masks", *DATA))
    add("--models", nargs="+", default=["resnet50"], help="resnet18, 34, 50, 101; with -dc5 dilated")
    add("--batch", nargs="+", type=int, default=[1, 2], help="images in a batch")
    add("--size", nargs="+", type=lambda text: [int(side) for side in text.split("x")], default=[[800, 1066]],
        metavar="HxW", help="sizes of the images, taken in turn in a batch")
    add("--queries", type=int, default=100)
    add("--precision", nargs="+", default=["float32"], choices=("float32", "tf32", "bf16", "fp16"))
    add("--compile", action="store_true", help="measure compiled models too")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: PyTorch's)")
    add("--rounds", type=int, default=3, help="measurements of each side")
    add("--peer", help="transformers, or the folder of another tree with DETR's contract")
    add("--peer_precision", choices=("float32", "tf32", "bf16", "fp16"), help="precision of the peer, if different")
    add("--coco_path", help="data in COCO's layout, for loader, predict, index and evaluator")
    add("--copies", type=int, default=1, help="for index and evaluator: repeat the annotations so many times")
    add("--output", type=Path, help="JSON file to write")
    return parser


# fmt: on
def compare(clocks: list[Clock], rounds: int, peer: str = "peer") -> dict:
    """Measure the sides in turn; return the figures of ours, and those of the peer if there is one."""
    times = [[] for _ in clocks]
    for _, ((measure, _), seconds) in itertools.product(range(rounds), list(zip(clocks, times, strict=True))):
        seconds.append(measure())
    row = {}
    for prefix, seconds, (_, peak) in zip(("", f"{peer}_"), times, clocks, strict=False):
        low, _, high = statistics.quantiles(seconds * 2, n=4)
        row |= {f"{prefix}s": statistics.median(seconds), f"{prefix}spread": high - low, f"{prefix}peak_gb": peak}
    return {**row, "ratio": row[f"{peer}_s"] / row["s"]} if len(clocks) == 2 else row


def settings(what: str, options) -> Iterator[tuple[dict, dict]]:
    """Yield (row, setting) for every combination of the flags: the columns that differ, and all that a side needs."""
    common = {"what": what, **{name: getattr(options, name) for name in ("queries", "device", "size", "threads")}}
    ways = (options.models, options.precision, (False, True) if options.compile else (False,), options.batch)
    for values in itertools.product(*ways):
        row = dict(zip(("model", "precision", "compiled", "batch"), values, strict=True))
        yield row, common | row


def measure_network(what: str, options, peer) -> Iterator[dict]:
    """Measure forward, train, criterion or masks, the first three beside the peer."""
    for row, setting in settings(what, options):
        if what == "masks":
            one = Detr(setting, *"--masks --dataset_file coco_panoptic --frozen_weights none".split())
            figures = compare([clock(masks(one, setting, every), setting) for every in (False, True)],
                              options.rounds, "all_queries")  # fmt: skip
        else:
            theirs = setting | {"precision": options.peer_precision or row["precision"], "compiled": False}
            sides = [(Detr, setting)] + ([(peer, theirs)] if peer else [])
            figures = compare([prepare(*side) for side in sides], options.rounds)
        yield row | figures | {"images_per_s": row["batch"] / figures["s"]}


def measure_loader(what: str, options, _) -> Iterator[dict]:
    """Load images in batches of two in one thread, beside the common way: PIL and float tensors, with equal draws."""
    import datasets.transforms as T
    from datasets.coco import make_coco_transforms
    from util.nested_tensor import collate_fn, nested_tensor_from_tensor_list

    ours_only = (T.PILToTensor, T.ToTensor, T.Normalize, T.RelativeBoxes)
    normalise = [T.ToTensor(), T.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])]
    for part in ("train", "val"):
        data = dataset(part, options)
        data.set_epoch(0)
        files = [data.img_folder / name for name in data.index.file_names[:LOADED].tolist()]
        pairs = [(i, i + 1) for i in range(0, len(files) - 1, 2)]
        published = [step for step in make_coco_transforms(part).transforms if not isinstance(step, ours_only)]
        common_transforms = T.Compose([*published, *normalise])

        def common(i: int, files=files, data=data, transforms=common_transforms) -> Tensor:
            with T.seeded(data.seed, 0, i):
                return transforms(Image.open(files[i]).convert("RGB"), {"boxes": torch.rand(OBJECTS, 4)})[0]

        def load_ours(data=data, pairs=pairs):
            return [collate_fn([data[i], data[j]]) for i, j in pairs]

        def load_common(common=common, pairs=pairs):
            return [nested_tensor_from_tensor_list([common(i), common(j)]) for i, j in pairs]

        clocks = [clock(call, {"device": "cpu", "threads": 1}) for call in (load_ours, load_common)]
        row = compare(clocks, options.rounds, "pil")
        yield {"images": f"{2 * len(pairs)} {part}", **row, "images_per_s": 2 * len(pairs) / row["s"]}


def measure_predict(what: str, options, _) -> Iterator[dict]:
    """Go from image files to detections, by tools.predictor, at the shortest side of --size."""
    from models.detr import PostProcess
    from tools.predictor import Predictor

    paths = dataset("val", options).img_folder
    paths = sorted(paths.iterdir())[:LOADED]
    for row, setting in settings(what, options):
        model, amp = Detr(setting).model, row["precision"] if row["precision"] in AMP else None
        predictor = Predictor(model, {"bbox": PostProcess()}, {}, min(options.size[0]), device=options.device, amp=amp)
        autocast(setting)  # sets TF32
        if row["compiled"]:
            torch._dynamo.reset()
            predictor.compile()

        def predict(predictor=predictor, size=row["batch"]):
            return [predictor.predict_batch(paths[i : i + size]) for i in range(0, len(paths), size)]

        figures = compare([clock(predict, setting)], options.rounds)
        yield row | figures | {"images_per_s": len(paths) / figures["s"]}


def measure_index(what: str, options, _) -> Iterator[dict]:
    """Read a training annotation file, beside pycocotools; `peak_gb` is what is needed while reading."""
    from pycocotools.coco import COCO

    from datasets.coco_index import read_coco_index

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "annotations.json"
        path.write_text(json.dumps(repeated(dataset("train", options).ann_file, options.copies)))
        calls = [functools.partial(read, str(path)) for read in (read_coco_index, COCO)]
        clocks = [clock(call, {"device": "cpu", "threads": 1}) for call in calls]
        row = {"json_mb": path.stat().st_size / 1e6, **compare(clocks, options.rounds, "pycocotools")}
    yield row


def measure_evaluator(what: str, options, _) -> Iterator[dict]:
    """Compute box AP of random detections near the validation objects, beside pycocotools."""
    from datasets.coco_eval import CocoEvaluator

    data = dataset("val", options)
    content, stats = repeated(data.ann_file, options.copies), []
    truth = data.coco.__class__()
    truth.dataset = content
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
    results = detections(truth)

    def evaluate(backend: str):
        evaluator = CocoEvaluator(truth, ["bbox"], backend)
        evaluator.update(results)
        evaluator.synchronize_between_processes()
        evaluator.accumulate()
        evaluator.summarize()
        stats.append(evaluator.coco_eval["bbox"].stats[:12].tolist())

    calls = [functools.partial(evaluate, backend) for backend in ("auto", "pycocotools")]
    clocks = [clock(call, {"device": "cpu", "threads": options.threads}) for call in calls]
    row = {"images": len(truth.imgs), **compare(clocks, options.rounds, "pycocotools")}
    yield row | {"largest_difference": max(abs(a - b) for a, b in zip(stats[0], stats[-1], strict=True))}


def detections(truth) -> dict[int, dict]:
    """Make detections near the objects of each image, as post-processing returns them."""
    generator, results = torch.Generator().manual_seed(0), {}
    for image_id, objects in truth.imgToAnns.items():
        near = torch.randint(0, len(objects), (DETECTIONS,), generator=generator)
        x, y, width, height = torch.tensor([annotation["bbox"] for annotation in objects])[near].T
        x, y = (
            start + side * torch.randn(DETECTIONS, generator=generator) / 10
            for start, side in ((x, width), (y, height))
        )
        results[image_id] = {
            "boxes": torch.stack([x, y, x + width, y + height], 1),
            "labels": torch.tensor([annotation["category_id"] for annotation in objects])[near],
            "scores": torch.rand(DETECTIONS, generator=generator),
        }
    return results


def dataset(part: str, options):
    """Build the `train` or `val` part of the data with main.py's default flags."""
    from datasets import build_dataset
    from main import get_args_parser as flags

    if not Path(options.coco_path or "", "annotations").is_dir():
        raise SystemExit(f"this reads images in COCO's layout, and --coco_path is {options.coco_path}")
    parser = argparse.ArgumentParser(parents=[flags()])
    return build_dataset(part, parser.parse_args(["--coco_path", options.coco_path]))


def repeated(path: Path, copies: int) -> dict:
    """Read an annotation file and repeat its images and annotations under new ids."""
    content = json.loads(Path(path).read_text())
    images, annotations = content["images"], content["annotations"]
    step = 1 + max(record["id"] for record in (*images, *annotations))
    content["images"] = [{**record, "id": record["id"] + k * step} for k in range(copies) for record in images]
    content["annotations"] = [
        {**record, "id": record["id"] + k * step, "image_id": record["image_id"] + k * step}
        for k in range(copies) for record in annotations
    ]  # fmt: skip
    return content


def machine(device: str) -> str:
    """Name the hardware; of a CPU also whether it has AMX, which decides the speed of bf16."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    amx = ", AMX" if any("amx_bf16" in line.split() for line in lines) else ""
    return f"{names[0] if names else platform.machine()}{amx}"


DATA = {"loader": measure_loader, "predict": measure_predict, "index": measure_index, "evaluator": measure_evaluator}


def main(argv: list[str] | None = None) -> list[dict]:
    """Measure, print a table for each subject, and return the rows."""
    options = get_args_parser().parse_args(argv)
    peer = Transformers if options.peer == "transformers" else OtherTree(options.peer) if options.peer else None
    torch.set_num_threads(options.threads)
    print(f"{machine(options.device)}, torch {torch.__version__}, {options.threads} threads")
    rows = []
    for what in options.what:
        for i, row in enumerate(DATA.get(what, measure_network)(what, options, peer)):
            if i == 0:
                print(f"\n{what}\n| {' | '.join(row)} |\n{'|---' * len(row)}|")
            cells = [f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()]
            print(f"| {' | '.join(cells)} |", flush=True)
            rows.append({"what": what, **row})
    if options.output:
        options.output.write_text(json.dumps({"machine": machine(options.device), "rows": rows}, indent=1))
    return rows


if __name__ == "__main__":
    main()
