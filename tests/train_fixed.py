"""A program for test_distributed.py: train some steps on images of one size and write each step's loss.

python -m torch.distributed.run --standalone --nproc_per_node 2 -m tests.train_fixed OUT BATCH [fail|unequal]
"""

import json
import sys
import time
from pathlib import Path

import torch

from datasets.batches import TrainBatches
from engine import train_one_epoch
from main import build_run, distribute
from models import build_model
from models.training import build_training
from tests.helpers import loader_of, parse
from util.dist import all_gather, get_rank, get_world_size, process_group
from util.meters import merge_sums
from util.nested_tensor import collate_fn


class Recorder:
    """Stands in for `util.run.Run`: record each step's losses, averaged over processes."""

    batches_done, sums, with_targets = 0, {}, True

    def __init__(self):
        self.losses = []

    def after_step(self, batches, metrics):
        sums = merge_sums(all_gather(metrics.sums()))
        self.losses.append({name: total / count for name, (total, count) in sums.items()})


class Pictures(torch.utils.data.Dataset):
    """Noise with two objects each: with equal sizes and counts, the losses do not depend on who has which image.

    With `unequal` counts, those of the boxes still do not; the class loss is each process's own mean.
    """

    class_names = {1: "thing"}

    def __init__(self, unequal: bool):
        self.unequal = unequal

    def __len__(self):
        return 12

    def __getitem__(self, i):
        rng = torch.Generator().manual_seed(i)
        objects = 1 + i % 5 if self.unequal else 2
        boxes = torch.rand(objects, 4, generator=rng) * 0.3 + 0.3
        image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8, generator=rng)
        return image, {"boxes": boxes, "labels": torch.arange(objects) % 2 + 1, "image_id": torch.tensor([i])}


def main(out: str, batch_size: int, how: str) -> None:
    """Train an epoch of six steps at a global batch of two, with a high rate so that errors would grow."""
    args = parse("--dropout 0 --lr 1e-3 --lr_backbone 1e-3 --num_classes 3 --accum_steps 2 --encoder_loss_coef 1")
    with process_group("cpu") as processes:
        if how == "fail":
            if get_rank() == 1:
                raise ZeroDivisionError("the second process is broken")
            for _ in range(100):  # working on its own, with a collective call now and then
                time.sleep(1)
                all_gather(0)
        torch.manual_seed(1 + get_rank())  # the wrapper must give every process the first one's weights
        model, criterion, _ = build_model(args)
        network, criterion, _ = build_training(args, model, criterion)
        pictures = Pictures(how == "unequal")
        run = build_run(args, model, loader_of(), pictures.class_names)
        batches = TrainBatches(12, batch_size, 0, get_rank(), get_world_size())
        loader = torch.utils.data.DataLoader(pictures, batch_sampler=batches, collate_fn=collate_fn)
        recorder = Recorder()
        network = distribute(network, processes, torch.device("cpu"))
        train_one_epoch(
            network, criterion, loader, run.optimizer, torch.device("cpu"), 0, 0.1, accum_steps=2, state=recorder
        )
        if get_rank() == 0:
            Path(out).write_text(json.dumps(recorder.losses))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], int(sys.argv[2]), sys.argv[-1])
