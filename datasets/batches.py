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
        self.epoch, self.seen = 0, 0
        if not len(self):
            raise ValueError(
                f"{length} training images do not fill one batch of {batch_size} on each of {world_size} processes: "
                "lower --batch_size"
            )

    @property
    def images_per_step(self) -> int:
        """Images in a batch of all processes together."""
        return self.batch_size * self.world_size

    def set_epoch(self, epoch: int, seen: int = 0) -> None:
        """Choose the epoch, and how many images of its order lie behind already (whoever went through them)."""
        self.epoch, self.seen = epoch, min(seen, self.length)

    def __len__(self) -> int:
        return -(-(self.length - self.seen) // self.world_size) // self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(self.length, generator=torch.Generator().manual_seed(self.seed + self.epoch)).tolist()
        rest = order[self.seen :]
        rest += order[: -len(rest) % self.world_size]
        mine = rest[self.rank :: self.world_size]
        for k in range(len(self)):
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
