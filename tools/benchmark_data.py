"""What tools/benchmark.py measures around the network: images, annotations, predictions and their judging."""

import contextlib
import io
import itertools
import json
import multiprocessing
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch.utils.data import DataLoader

import datasets.transforms as T
import engine
from datasets import coco
from datasets.coco_eval import CocoEvaluator
from datasets.coco_index import read_coco_index
from main import build_train_loader, get_args_parser
from models.detr import PostProcess
from tools.gauges import most_held, start_counting, summary, timed
from tools.predictor import Predictor
from util.nested_tensor import collate_fn

IMAGES, ANNOTATIONS = 118_287, 860_001  # of COCO's train2017
SCENES = (5000, 7, 100)  # images, objects and detections in each, as in val2017


def measure_loader(options, _side: type, _peer: type | None) -> Iterator[dict]:
    """Processor time of an image, in batches of two and one thread, beside the plain way's; same images, same draws."""
    need_images(options)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for image_set in ("train", "val"):
        held = start_counting("cpu")
        fast, slow = load_both_ways(image_set, options.coco_path, options.passes)
        yield {"images": f"{2 * len(fast)} {image_set}", **summary(fast), "peak_gb": most_held("cpu") - held,
               "plain_s": summary(slow)["s"], "ratio": sum(slow) / sum(fast)}  # fmt: skip
    torch.set_num_threads(threads)


def load_both_ways(image_set: str, root: str, passes: int) -> tuple[list[float], list[float]]:
    """Load batches of two; return the seconds an image of each takes, here and the plain way."""
    dataset, plain = coco.build(image_set, root), plain_way(image_set)
    paths = [dataset.img_folder / str(name) for name in dataset.index.file_names]
    targets = [dataset._target(i, *dataset.sizes[i]) for i in range(len(dataset))]
    fast, slow = [], []
    for n, first in itertools.product(range(passes), range(0, len(dataset) - 1, 2)):
        dataset.set_epoch(n)
        begin, images = time.process_time(), []
        for i in (first, first + 1):
            with T.seeded(dataset.seed, n, i):
                images.append(plain(Image.open(paths[i]).convert("RGB"), targets[i])[0])
        plain_batch(images)
        middle = time.process_time()
        collate_fn([dataset[first], dataset[first + 1]])
        slow.append((middle - begin) / 2)
        fast.append((time.process_time() - middle) / 2)
    return fast, slow


def plain_batch(images: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad images [3, h, w] to a common size, and mark the padding: what most detection code does."""
    height, width = (max(image.shape[side] for image in images) for side in (1, 2))
    padded, mask = torch.zeros(len(images), 3, height, width), torch.ones(len(images), height, width).bool()
    for image, place, padding in zip(images, padded, mask, strict=True):
        place[:, : image.shape[1], : image.shape[2]] = image
        padding[: image.shape[1], : image.shape[2]] = False
    return padded, mask


def plain_way(image_set: str) -> T.Compose:
    """Build the same transforms on PIL images, then float tensors, normalised: what most detection code does."""
    published = coco.make_coco_transforms(image_set).transforms[:-2]
    return T.Compose([*published, T.ToTensor(), T.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])])


def measure_feed(options, _side: type, _peer: type | None) -> Iterator[dict]:
    """Images a second that main.py's training loader gives to a consumer that does nothing."""
    need_images(options)
    dataset, device = coco.build("train", options.coco_path), torch.device(options.device)
    for batch, workers in itertools.product(options.batch, options.workers):
        flags = f"--batch_size {batch} --num_workers {workers}".split()
        loader = build_train_loader(dataset, get_args_parser().parse_args(flags), device)
        rates = [feed(loader, epoch) for epoch in range(1 + options.passes)][1:]  # in the first the workers start
        yield {"batch": batch, "workers": workers, "images_per_s": statistics.median(rates)}


def feed(loader: DataLoader, epoch: int) -> float:
    """Go through an epoch; return images a second."""
    loader.dataset.set_epoch(epoch)
    begin = time.perf_counter()
    images = sum(len(targets) for _, targets in loader)
    return images / (time.perf_counter() - begin)


def measure_predict(options, side: type, _peer: type | None) -> Iterator[dict]:
    """Images a second from file to detections, by tools.predictor, at the shortest side of --size."""
    need_images(options)
    paths = sorted(Path(options.coco_path).glob("val2017/*"))[: 4 * max(options.batch)]
    compiled = (None, "any") if options.compile else (None,)
    ways = itertools.product(options.models, options.precision, compiled, options.batch)
    for name, precision, compile_it, batch in ways:
        torch._dynamo.reset()
        engine.allow_tf32(precision == "tf32")
        model = side(name, options.queries, options.device).model
        predictor = Predictor(model, {"bbox": PostProcess()}, {}, min(options.size[0]), device=options.device)
        predictor.faster(compile_it, precision if precision in engine.AMP_TYPES else None)

        def call(predictor=predictor, batch=batch):
            for start in range(0, len(paths), batch):
                predictor.many(paths[start : start + batch])

        (figures,) = timed([call], options.rounds, options.device)
        row = {"model": name, "precision": precision, "compiled": bool(compile_it), "batch": batch, **figures}
        yield row | {"images_per_s": len(paths) / row["s"]}


def need_images(options) -> None:
    """End with a sentence if there is no data in COCO's layout."""
    if not Path(options.coco_path or "").joinpath("annotations").is_dir():
        raise SystemExit(f"this reads real images in COCO's layout, and --coco_path is {options.coco_path}")


def measure_index(options, _side: type, _peer: type | None) -> Iterator[dict]:
    """Load a train2017-sized file, each time in a process of its own; then touch every image in a forked worker.

    `s` is the median of the rounds; `held_gb` is kept after loading, `peak_gb` the most on the way there.
    """
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "instances_train2017.json"
        write_annotations(path)
        rounds = {"pycocotools": [], "arrays": []}
        for kind in list(rounds) * options.rounds:
            results = spawn.SimpleQueue()
            process = spawn.Process(target=_load_and_touch, args=(kind, str(path), results))
            process.start()
            process.join()
            if process.exitcode:
                raise SystemExit(f"index: the process that read it by way of {kind} ended with {process.exitcode}")
            rounds[kind].append(results.get())
        for kind, loads in rounds.items():
            memory = {name: statistics.median(load[name] for load in loads) for name in loads[0] if name != "s"}
            yield {
                "index": kind,
                "json_mb": path.stat().st_size / 1e6,
                **summary([load["s"] for load in loads]),
                **memory,
            }


def write_annotations(path: Path) -> None:
    """Write an instances file with as many images, annotations and polygon corners as COCO's train2017."""
    rng = random.Random(0)
    polygon = json.dumps([[round(rng.uniform(0, 600), 2) for _ in range(54)]])
    with path.open("w") as file:
        file.write('{"images": [')
        for i in range(IMAGES):
            file.write(
                ", " * (i > 0) + f'{{"id": {i}, "file_name": "{i:012}.jpg", "height": 480, "width": 640, "license": 3}}'
            )
        file.write('], "annotations": [')
        for i in range(ANNOTATIONS):
            x, y, label = rng.uniform(0, 500), rng.uniform(0, 400), rng.randint(1, 90)
            file.write(
                ", " * (i > 0) + f'{{"segmentation": {polygon}, "area": 702.1, "iscrowd": 0, "image_id": {i % IMAGES}, '
                f'"bbox": [{x:.2f}, {y:.2f}, 50.5, 30.25], "category_id": {label}, "id": {i + 1}}}'
            )
        file.write(f'], "categories": {json.dumps([{"id": i, "name": str(i)} for i in range(1, 91)])}}}')


def private_memory() -> float:
    """Gigabytes that this process shares with nobody."""
    rows = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(row.split()[1]) for row in rows if row.startswith("Private")) * 1024 / 1e9


def _load_and_touch(kind: str, path: str, results) -> None:
    before, floor, begin = private_memory(), start_counting("cpu"), time.perf_counter()
    if kind == "arrays":
        index = read_coco_index(path)

        images = range(len(index.image_ids))

        def touch(i: int):
            return index.boxes[index.annotations_of(i)].sum()
    else:
        with contextlib.redirect_stdout(io.StringIO()):
            api = COCO(path)
        images = sorted(api.imgs)

        def touch(i: int):
            return [annotation["bbox"] for annotation in api.imgToAnns[i]]

    loaded = {"s": time.perf_counter() - begin, "held_gb": private_memory() - before}
    loaded["peak_gb"] = most_held("cpu") - floor
    grown = multiprocessing.get_context("fork").SimpleQueue()

    def worker() -> None:
        start = private_memory()
        for i in images:
            touch(i)
        grown.put(private_memory() - start)

    process = multiprocessing.get_context("fork").Process(target=worker)
    process.start()
    process.join()
    results.put(loaded | {"worker_grows_gb": grown.get()})


def measure_evaluator(options, _side: type, _peer: type | None) -> Iterator[dict]:
    """Time of AP over 5,000 images of 100 detections, beside pycocotools, which is run once."""
    api, results = scenes_and_detections(*SCENES)
    twelve = []
    with contextlib.redirect_stdout(io.StringIO()):
        (fast,) = timed([lambda: twelve.append(judge(api, results))], options.rounds, "cpu")
        begin = time.perf_counter()
        usual = judge_as_usual(api, results)
        slow = time.perf_counter() - begin
    off = max(abs(a - b) for a, b in zip(twelve[-1], usual, strict=True))
    yield {"images": SCENES[0], **fast, "pycocotools_s": slow, "ratio": slow / fast["s"], "numbers_off_by": off}


def judge(api: COCO, results: dict) -> list[float]:
    """Go from detections to the twelve numbers."""
    evaluator = CocoEvaluator(api, ["bbox"])
    evaluator.update(results)
    evaluator.synchronize_between_processes()
    evaluator.accumulate()
    evaluator.summarize()
    return evaluator.coco_eval["bbox"].stats[:12].tolist()


def judge_as_usual(api: COCO, results: dict) -> list[float]:
    """The same by way of COCO's result format and pycocotools."""
    found = [
        {"image_id": image, "category_id": label, "bbox": [x0, y0, x1 - x0, y1 - y0], "score": score}
        for image, result in results.items()
        for (x0, y0, x1, y1), label, score in zip(
            *(result[name].tolist() for name in ("boxes", "labels", "scores")), strict=True
        )
    ]
    evaluation = COCOeval(api, api.loadRes(found), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation.stats.tolist()


def scenes_and_detections(images: int, objects: int, detections: int) -> tuple[COCO, dict]:
    """Draw boxes of 80 classes, and detections around them with random scores; a fifth has the object's class."""
    rng, api = torch.Generator().manual_seed(0), COCO()
    corners = torch.rand(images, objects, 2, generator=rng) * 400
    sides = 20 + torch.rand(images, objects, 2, generator=rng) * 150
    api.dataset = {
        "images": [{"id": i, "height": 600, "width": 600} for i in range(images)],
        "categories": [{"id": c} for c in range(1, 81)],
        "annotations": [
            {"id": i * objects + k + 1, "image_id": i, "category_id": 1 + (i + k) % 80, "iscrowd": 0,
             "bbox": [*corners[i, k].tolist(), *sides[i, k].tolist()], "area": sides[i, k].prod().item()}
            for i in range(images) for k in range(objects)
        ],
    }  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        api.createIndex()
    results = {}
    for i in range(images):
        near = torch.randint(0, objects, (detections,), generator=rng)
        first = corners[i, near] + torch.randn(detections, 2, generator=rng) * 10
        boxes = torch.cat([first, first + sides[i, near]], 1)
        labels = torch.randint(1, 81, (detections,), generator=rng)
        labels[: detections // 5] = 1 + (i + near[: detections // 5]) % 80
        results[i] = {"scores": torch.rand(detections, generator=rng), "labels": labels, "boxes": boxes}
    return api, results
