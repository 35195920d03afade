"""Which images go together in a batch, on which process."""

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


class TrainBatches(Sampler[list[int]]):
    """A new random order each epoch, a function of (seed, epoch), dealt out to the processes image by image.

    The order is filled up with its own beginning to a multiple of the number of processes, and what does not fill a
    batch at its end is left out until the next epoch. Batch k of all processes together is what one process with their
    total batch size would see. Raises ValueError if there are too few images for a single batch.
    """

    def __init__(self, length: int, batch_size: int, seed: int = 0, rank: int = 0, world_size: int = 1):
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.epoch, self.done = 0, 0
        if not self.batches_per_epoch:
            raise ValueError(
                f"{length} training images do not fill one batch of {batch_size} on each of {world_size} processes: "
                "lower --batch_size"
            )

    @property
    def batches_per_epoch(self) -> int:
        """Batches in a whole epoch, on each process."""
        return -(-self.length // self.world_size) // self.batch_size

    def set_epoch(self, epoch: int, done: int = 0) -> None:
        """Choose the epoch, and how many of its batches lie behind already."""
        self.epoch, self.done = epoch, done

    def __len__(self) -> int:
        return self.batches_per_epoch - self.done

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(self.length, generator=torch.Generator().manual_seed(self.seed + self.epoch)).tolist()
        order += order[: -self.length % self.world_size]
        mine = order[self.rank :: self.world_size]
        for k in range(self.done, self.batches_per_epoch):
            yield mine[k * self.batch_size : (k + 1) * self.batch_size]


class EvalBatches(Sampler[list[int]]):
    """Every image once, dealt out to the processes; some may get one image more than others, or none.

    With `sizes`, one (height, width) for each image as it enters the model, only images of equal size share a batch:
    then nothing is padded, and what the model says of an image does not depend on its neighbours.
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
