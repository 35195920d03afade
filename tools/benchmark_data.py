"""What the data costs: time of an image through one thread, and memory of the annotations, beside the usual way.

python tools/benchmark_data.py loader --coco_path /data/coco      # against PIL decode and resize, to_tensor, normalise
python tools/benchmark_data.py index                              # against pycocotools, on a file of train2017's size
"""

import argparse
import json
import multiprocessing
import random
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import datasets.transforms as T
from datasets import coco
from datasets.coco_index import read_coco_index

IMAGES, ANNOTATIONS = 118_287, 860_001  # of COCO's train2017


class PlainWay:
    """Decode and resize with PIL, then float tensors, normalised: what most detection code does."""

    def __init__(self, image_set: str):
        published = coco.make_coco_transforms(image_set).transforms[:-2]
        self.transforms = T.Compose(
            [*published, T.ToTensor(), T.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])]
        )

    def __call__(self, path: Path, target: dict):
        """Load one image and move its target along."""
        return self.transforms(Image.open(path).convert("RGB"), target)


def benchmark_loader(root: str, passes: int) -> None:
    """Compare processor time over the same images with the same random draws; print means and ratio."""
    torch.set_num_threads(1)
    print("| images | plain way, ms | this project, ms | ratio |\n|---|---|---|---|")
    for image_set in ("train", "val"):
        dataset, plain = coco.build(image_set, root), PlainWay(image_set)
        times = {"plain": [], "ours": []}
        for n in range(passes):
            dataset.set_epoch(n)
            for i in range(len(dataset)):
                path = dataset.img_folder / str(dataset.index.file_names[i])
                target = dataset._target(i, *dataset.sizes[i])
                begin = time.process_time()
                with T.seeded(dataset.seed, n, i):
                    plain(path, target)
                middle = time.process_time()
                dataset[i]
                times["plain"].append(middle - begin)
                times["ours"].append(time.process_time() - middle)
        slow, fast = (1e3 * float(np.mean(times[name])) for name in ("plain", "ours"))
        print(f"| {image_set}, {len(times['ours'])} | {slow:.1f} | {fast:.1f} | {slow / fast:.1f} |", flush=True)


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
    return sum(int(row.split()[1]) for row in rows if row.startswith("Private")) / 2**20


def _load_and_touch(kind: str, path: str, results) -> None:
    before, begin = private_memory(), time.perf_counter()
    if kind == "arrays":
        index = read_coco_index(path)

        def touch(i: int):
            return index.boxes[index.annotations_of(i)].sum()
    else:
        from pycocotools.coco import COCO

        api = COCO(path)
        ids = sorted(api.imgs)

        def touch(i: int):
            return [annotation["bbox"] for annotation in api.imgToAnns[ids[i]]]

    seconds, loaded = time.perf_counter() - begin, private_memory() - before
    grown = multiprocessing.get_context("fork").SimpleQueue()

    def worker() -> None:
        start = private_memory()
        for i in range(IMAGES):
            touch(i)
        grown.put(private_memory() - start)

    process = multiprocessing.get_context("fork").Process(target=worker)
    process.start()
    process.join()
    results.put((seconds, loaded, grown.get()))


def benchmark_index() -> None:
    """Load the same file both ways, each in a process of its own; then touch every image in a forked worker."""
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "instances_train2017.json"
        write_annotations(path)
        print(f"{IMAGES} images, {ANNOTATIONS} annotations, {path.stat().st_size / 1e6:.0f} MB of JSON\n")
        print("| index | load, s | memory after loading, GB | a worker grows by, GB |\n|---|---|---|---|")
        for kind in ("pycocotools", "arrays"):
            results = spawn.SimpleQueue()
            process = spawn.Process(target=_load_and_touch, args=(kind, str(path), results))
            process.start()
            process.join()
            seconds, loaded, grown = results.get()
            print(f"| {kind} | {seconds:.1f} | {loaded:.2f} | {grown:.3f} |", flush=True)


def main() -> None:
    """Run the benchmark that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("loader", "index"))
    parser.add_argument("--coco_path", help="data in COCO's layout, for loader")
    parser.add_argument("--passes", type=int, default=1, help="times over the images, for loader")
    options = parser.parse_args()
    if options.what == "index":
        benchmark_index()
    elif options.coco_path is None:
        parser.error("loader needs --coco_path")
    else:
        benchmark_loader(options.coco_path, options.passes)


if __name__ == "__main__":
    main()
