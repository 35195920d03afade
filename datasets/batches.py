"""Samplers: which images form a batch, on which process."""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


class TrainBatches(Sampler[list[int]]):
    """Batches in a new random order each epoch, a function of (seed, epoch), split between the processes.

    The order is filled up with its own beginning to a multiple of the number of processes, and images that do not fill
    a batch at its end are left out of the epoch. Batch k of all processes together has the images of batch k of one
    process with their total batch size. Raises ValueError if there are too few images for a single batch.
    """

    def __init__(self, length: int, batch_size: int, seed: int = 0, rank: int = 0, world_size: int = 1):
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.epoch, self.seen = 0, 0
        if not len(self):
            raise ValueError(
                f"{length} training images do not fill one batch of {batch_size} on each of {world_size} processes: "
                "use a smaller batch size"
            )

    @property
    def images_per_step(self) -> int:
        """Number of images in a batch of all processes together."""
        return self.batch_size * self.world_size

    def set_epoch(self, epoch: int, seen: int = 0) -> None:
        """Choose the epoch; `seen` is the number of images already consumed in it, by all processes together."""
        self.epoch, self.seen = epoch, min(seen, self.length)

    def __len__(self) -> int:
        images_per_process = math.ceil((self.length - self.seen) / self.world_size)
        return images_per_process // self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(self.length, generator=torch.Generator().manual_seed(self.seed + self.epoch)).tolist()
        rest = order[self.seen :]
        rest += order[: -len(rest) % self.world_size]
        mine = rest[self.rank :: self.world_size]
        for k in range(len(self)):
            yield mine[k * self.batch_size : (k + 1) * self.batch_size]


class EvalBatches(Sampler[list[int]]):
    """Every image once, split between the processes; some may get one image more than others, or none.

    With `sizes`, one (height, width) for each image as it enters the model, only images of equal size share a batch:
    no image is padded, so its predictions do not depend on the others in the batch.
    """

    def __init__(
        self, length: int, batch_size: int, rank: int = 0, world_size: int = 1, sizes: Sequence[tuple] | None = None
    ):
        groups: dict[tuple, list[int]] = defaultdict(list)
        for i in range(rank, length, world_size):
            groups[() if sizes is None else sizes[i]].append(i)
        self.batches = [
            group[k : k + batch_size] for group in groups.values() for k in range(0, len(group), batch_size)
        ]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)
