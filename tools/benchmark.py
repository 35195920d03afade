"""Measure speed and memory: forward pass, training step, losses, data loading, prediction, evaluation.

python tools/benchmark.py forward train criterion --peer transformers          # beside Hugging Face's DETR
python tools/benchmark.py forward --batch 1 4 16 --precision float32 bf16 --compile --device cuda
python tools/benchmark.py train --peer ../other-detr                           # another tree with DETR's contract
python tools/benchmark.py loader predict index evaluator --coco_path /data/coco

The calls of both sides alternate, so that other load on the machine slows both. `s` is the median of --rounds
measurements, `peak_gb` (on a GPU) the most memory of a call, `ratio` the peer's time over ours.
"""

import argparse
import contextlib
import functools
import io
import itertools
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.benchmark import Timer
from torchvision.ops import box_convert

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# Modules of the project are imported in functions: with --tree they are another folder's.
AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}
QUERIES, CLASSES, OBJECTS = 100, 91, 7  # main.py's default; COCO's; its mean number of objects in an image
LOADED = 32  # images in a call


# fmt: off
def get_args_parser() -> argparse.ArgumentParser:
    """Declare the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("what", nargs="+", choices=(*CALLS, *DATA))
    add("--models", nargs="+", default=["resnet50"], help="ResNets; the suffix -dc5 means dilation")
    add("--batch", nargs="+", type=int, default=[1, 2], help="images in a batch")
    add("--size", nargs="+", type=lambda text: [int(side) for side in text.split("x")], default=[[800, 1066]],
        metavar="HxW", help="sizes of the images, taken in turn in a batch")
    add("--precision", nargs="+", default=["float32"], choices=("float32", "tf32", "bf16", "fp16"))
    add("--compile", action="store_true", help="measure compiled models too")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--rounds", type=int, default=3, help="measurements of each side")
    add("--peer", help="transformers, or the folder of another tree with DETR's contract")
    add("--coco_path", help="data in COCO's layout, for loader, predict, index and evaluator")
    add("--output", type=Path, help="JSON file to write")
    add("--tree", help=argparse.SUPPRESS)  # the folder whose modules are measured
    return parser


# fmt: on
class Detr:
    """A tree with DETR's contract, built from flags: this one, or the folder at the front of sys.path."""

    def __init__(self, setting: dict):
        from main import get_args_parser as flags
        from models import build_model

        model, device = setting["model"], setting["device"]
        args = flags().parse_args(["--device", device])
        args.backbone, args.dilation, args.backbone_weights = model.removesuffix("-dc5"), "-dc5" in model, "none"
        self.model, self.criterion, _ = build_model(args)
        self.model.to(device)

    def inputs(self, images) -> dict:
        """Return the model's arguments for a NestedTensor."""
        return {"samples": images}

    def loss(self, inputs: dict, targets: list[dict], outputs: dict | None = None) -> Tensor:
        """Run the model, or take its outputs; return the weighted sum of the losses of all layers."""
        outputs = outputs or self.model(**inputs)
        losses, weights = self.criterion(outputs, targets), self.criterion.weight_dict
        return sum(losses[name] * weight for name, weight in weights.items() if name in losses)


class Transformers:
    """Hugging Face's DETR of the same shape; layers 2 to 4 of its backbone train, as they do here."""

    def __init__(self, setting: dict):
        from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

        depths = {"resnet50": [3, 4, 6, 3], "resnet101": [3, 4, 23, 3]}.get(setting["model"])
        if depths is None:
            raise SystemExit(f"--peer transformers has no {setting['model']}: choose resnet50 or resnet101")
        backbone: dict = {"depths": depths, "out_features": ["stage4"]}
        shape: dict = {"num_queries": QUERIES, "num_labels": CLASSES, "auxiliary_loss": True}
        shape |= {"attention_dropout": 0.1, "activation_dropout": 0.1}  # the paper's; 0 by default there
        self.model = DetrForObjectDetection(DetrConfig(backbone_config=ResNetConfig(**backbone), **shape))
        self.model.to(setting["device"])
        for name, parameter in self.model.model.backbone.named_parameters():
            parameter.requires_grad_(any(f"stages.{stage}" in name for stage in (1, 2, 3)))

    def inputs(self, images) -> dict:
        """Return the model's arguments for a NestedTensor; their mask is 1 on the image."""
        return {"pixel_values": images.tensors, "pixel_mask": (~images.mask).long()}

    def loss(self, inputs: dict, targets: list[dict]) -> Tensor:
        """Run the model; return the weighted sum of the losses of all layers."""
        return self.model(**inputs, labels=[target | {"class_labels": target["labels"]} for target in targets]).loss


def forward(one, setting: dict) -> Callable:
    """Return a function that runs the model in evaluation mode."""
    one.model.eval()
    inputs = one.inputs(noise(setting))

    def call():
        with torch.no_grad(), autocast(setting):
            one.model(**inputs)

    return call


def train(one, setting: dict) -> Callable:
    """Return a function that makes one training step: forward, losses, backward, clipping, AdamW."""
    one.model.train()
    inputs, targets = one.inputs(noise(setting)), random_targets(setting)
    optimizer = torch.optim.AdamW([p for p in one.model.parameters() if p.requires_grad], lr=1e-5, fused=True)

    def call():
        with autocast(setting):
            loss = one.loss(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(one.model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()

    return call


def criterion(one, setting: dict) -> Callable:
    """Return a function that computes matching and losses of six layers of random outputs, forward and backward."""
    shape, targets = (6, setting["batch"], QUERIES), random_targets(setting)
    logits = torch.randn(*shape, CLASSES + 1, device=setting["device"], requires_grad=True)
    boxes = (torch.rand(*shape, 4, device=setting["device"]) * 0.5 + 0.2).requires_grad_()

    def call():
        layers = [{"pred_logits": a, "pred_boxes": b} for a, b in zip(logits, boxes, strict=True)]
        one.loss({}, targets, outputs={**layers[-1], "aux_outputs": layers[:-1]}).backward()

    return call


CALLS = {"forward": forward, "train": train, "criterion": criterion}


def noise(setting: dict):
    """Make a NestedTensor of images of random, normalised values."""
    from util.misc import nested_tensor_from_tensor_list  # the import path that every tree has

    sizes = itertools.islice(itertools.cycle(setting["size"]), setting["batch"])
    return nested_tensor_from_tensor_list([torch.randn(3, *size) for size in sizes]).to(setting["device"])


def random_targets(setting: dict) -> list[dict]:
    """Make objects of random classes and boxes for a batch."""
    shape, device = (setting["batch"], OBJECTS), setting["device"]
    boxes = torch.cat([0.3 + 0.4 * torch.rand(*shape, 2), 0.1 + 0.3 * torch.rand(*shape, 2)], 2).to(device)
    labels = torch.randint(1, CLASSES, shape).to(device)
    return [{"boxes": b, "labels": c} for b, c in zip(boxes, labels, strict=True)]


def autocast(setting: dict) -> torch.autocast:
    """Return the context of a precision; TF32 is a global switch."""
    precision = setting["precision"]
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    return torch.autocast(torch.device(setting["device"]).type, dtype=AMP.get(precision), enabled=precision in AMP)


def prepare(side: type, what: str, setting: dict) -> Callable[[], float]:
    """Build a side's model and run its call once; return a function that measures the seconds of a call."""
    torch.manual_seed(0)
    one = side(setting)
    if setting["compiled"]:
        import engine

        torch._dynamo.reset()
        engine.compile_network(one.model)
    return clock(CALLS[what](one, setting))


def clock(call: Callable) -> Callable[[], float]:
    """Run a call once; return a function that measures its seconds."""
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    call()
    return lambda: timer.timeit(1).mean


def other_tree(options, what: str, row: dict) -> Callable[[], float]:
    """Return a function that measures a call of another tree, in a process of its own."""
    sizes = [f"{height}x{width}" for height, width in options.size]
    command = [sys.executable, __file__, what, "--tree", options.peer, "--rounds", 1, "--models", row["model"]]
    command += ["--batch", row["batch"], "--precision", row["precision"], "--size", *sizes, "--device", options.device]

    def measure() -> float:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "rows.json"
            if subprocess.run([*map(str, command), "--output", file], stdout=subprocess.DEVNULL).returncode:
                raise SystemExit(f"{options.peer}: the benchmark failed there")
            return json.loads(file.read_text())["rows"][0]["s"]

    return measure


def compare(clocks: list[Callable[[], float]], rounds: int, peer: str = "peer") -> dict:
    """Measure the sides in turn; return our time, and the peer's and the ratio if there is one."""
    with contextlib.redirect_stdout(io.StringIO()):
        times = [[measure() for measure in clocks] for _ in range(rounds)]
    seconds = [statistics.median(column) for column in zip(*times, strict=True)]
    row = {"s": seconds[0]}
    return row if len(clocks) == 1 else {**row, f"{peer}_s": seconds[1], "ratio": seconds[1] / seconds[0]}


def measure_network(what: str, options) -> Iterator[dict]:
    """Measure forward, train or criterion for every combination of the flags, beside the peer."""
    compiled = (False, True) if options.compile else (False,)
    for values in itertools.product(options.models, options.precision, compiled, options.batch):
        row = dict(zip(("model", "precision", "compiled", "batch"), values, strict=True))
        setting = row | {"device": options.device, "size": options.size}
        clocks = [prepare(Detr, what, setting)]
        if options.peer == "transformers":
            clocks.append(prepare(Transformers, what, setting | {"compiled": False}))
        elif options.peer:
            clocks.append(other_tree(options, what, row))
        if options.device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats()
            clocks[0]()
            row["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        figures = compare(clocks, options.rounds)
        yield row | figures | {"images_per_s": row["batch"] / figures["s"]}


def measure_loader(what: str, options) -> Iterator[dict]:
    """Load images in batches of two, in this process."""
    from util.nested_tensor import collate_fn

    def load(data, count: int):
        return [collate_fn([data[i], data[i + 1]]) for i in range(0, count, 2)]

    for part in ("train", "val"):
        data = dataset(part, options)
        count = min(LOADED, len(data)) // 2 * 2
        row = compare([clock(functools.partial(load, data, count))], options.rounds)
        yield {"images": f"{count} {part}", **row, "images_per_s": count / row["s"]}


def measure_predict(what: str, options) -> Iterator[dict]:
    """Go from image files to detections, by tools.predictor, at the shortest side of --size."""
    from models.detr import PostProcess
    from tools.predictor import Predictor

    paths = sorted(dataset("val", options).img_folder.iterdir())[:LOADED]

    def predict(predictor: Predictor, batch: int):
        return [predictor.predict_batch(paths[i : i + batch]) for i in range(0, len(paths), batch)]

    for model, precision, batch in itertools.product(options.models, options.precision, options.batch):
        network = Detr({"model": model, "device": options.device}).model
        more = {"device": options.device, "amp": precision if precision in AMP else None}
        predictor = Predictor(network, {"bbox": PostProcess()}, {}, min(options.size[0]), **more)
        if options.compile:
            predictor.compile()
        figures = compare([clock(functools.partial(predict, predictor, batch))], options.rounds)
        row = {"model": model, "precision": precision, "compiled": options.compile, "batch": batch}
        yield row | figures | {"images_per_s": len(paths) / figures["s"]}


def measure_index(what: str, options) -> Iterator[dict]:
    """Read a training annotation file, beside pycocotools."""
    from pycocotools.coco import COCO

    from datasets.coco_index import read_coco_index

    path = Path(dataset("train", options).ann_file)
    clocks = [clock(functools.partial(read, str(path))) for read in (read_coco_index, COCO)]
    yield {"json_mb": path.stat().st_size / 1e6, **compare(clocks, options.rounds, "pycocotools")}


def measure_evaluator(what: str, options) -> Iterator[dict]:
    """Compute box AP of random detections near the validation objects, beside pycocotools."""
    from datasets.coco_eval import CocoEvaluator

    truth, results = dataset("val", options).coco, {}
    for image_id, objects in truth.imgToAnns.items():
        near = [objects[i] for i in torch.randint(0, len(objects), (QUERIES,))]
        boxes = box_convert(torch.tensor([annotation["bbox"] for annotation in near]), "xywh", "xyxy")
        labels = torch.tensor([annotation["category_id"] for annotation in near])
        noise = 3 * torch.randn(QUERIES, 4)  # pixels
        results[image_id] = {"boxes": boxes + noise, "labels": labels, "scores": torch.rand(QUERIES)}

    def evaluate(backend: str):
        evaluator = CocoEvaluator(truth, ["bbox"], backend)
        evaluator.update(results)
        evaluator.synchronize_between_processes()
        evaluator.accumulate()
        evaluator.summarize()

    clocks = [clock(functools.partial(evaluate, backend)) for backend in ("auto", "pycocotools")]
    yield {"images": len(truth.imgs), **compare(clocks, options.rounds, "pycocotools")}


DATA = {"loader": measure_loader, "predict": measure_predict, "index": measure_index, "evaluator": measure_evaluator}


def dataset(part: str, options):
    """Build the `train` or `val` part of the data with main.py's default flags."""
    from datasets import build_dataset
    from main import get_args_parser as flags

    if not Path(options.coco_path or "", "annotations").is_dir():
        raise SystemExit(f"--coco_path {options.coco_path}: give a folder of images and annotations in COCO's layout")
    return build_dataset(part, flags().parse_args(["--coco_path", options.coco_path]))


def main(argv: list[str] | None = None) -> list[dict]:
    """Measure, print a table for each subject, and return the rows."""
    options = get_args_parser().parse_args(argv)
    if min(options.rounds, *options.batch) < 1:
        raise SystemExit("--rounds and --batch are at least 1")
    if options.peer not in (None, "transformers") and not Path(options.peer, "main.py").is_file():
        raise SystemExit(f"--peer {options.peer}: neither transformers nor a folder with a main.py in it")
    if options.tree:
        sys.path.insert(0, str(Path(options.tree).resolve()))
    cpu = f"{platform.machine()} CPU, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    machine = torch.cuda.get_device_name() if options.device.startswith("cuda") else cpu
    print(f"{machine}, torch {torch.__version__}")
    rows = []
    for what in options.what:
        for i, row in enumerate(DATA.get(what, measure_network)(what, options)):
            if i == 0:
                print(f"\n{what}\n| {' | '.join(row)} |\n{'|---' * len(row)}|")
            cells = [f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()]
            print(f"| {' | '.join(cells)} |", flush=True)
            rows.append({"what": what, **row})
    if options.output:
        options.output.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))
    return rows


if __name__ == "__main__":
    main()
