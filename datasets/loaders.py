"""Data loaders for training and evaluation."""

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from datasets.batches import EvalBatches, TrainBatches
from datasets.class_balance import repeat_rare
from datasets.transforms import resized_size, seeded
from util.dist import get_rank, get_world_size
from util.interruption import worker_init
from util.logger import logger
from util.nested_tensor import collate_fn


def build_train_loader(train_set: Dataset, args, device: torch.device) -> DataLoader:
    """Build the loader of shuffled, augmented batches."""
    if args.class_balance == "repeat":
        train_set = repeat_rare(train_set, args.seed)
    batches = TrainBatches(len(train_set), args.batch_size, args.seed, get_rank(), get_world_size())
    dataset = SkipUnreadable(train_set) if args.on_bad_image == "skip" else train_set
    return _loader(SeededDataset(dataset, args.seed), batches, args.num_workers, device)


def build_val_loader(val_set: Dataset, args, device: torch.device) -> DataLoader:
    """Build the loader of every validation image once."""
    sizes = None
    if args.eval_padding_free:
        sizes = [resized_size(h, w, args.min_size, args.max_size) for h, w in val_set.sizes]
    batches = EvalBatches(len(val_set), args.batch_size, get_rank(), get_world_size(), sizes)
    return _loader(val_set, batches, args.num_workers, device)


def _loader(dataset: Dataset, batches: Sampler, num_workers: int, device: torch.device) -> DataLoader:
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate_fn,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        worker_init_fn=worker_init,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # its own: the global generator draws dropout, and loaders must not advance it
    )


class SeededDataset(Dataset):
    """A training set whose random draws are a function of (seed, epoch, index), in any worker and after a resume."""

    def __init__(self, dataset: Dataset, seed: int):
        self.dataset, self.seed = dataset, seed
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # one number, shared with running workers

    def __len__(self) -> int:
        return len(self.dataset)

    def set_epoch(self, epoch: int) -> None:
        """Draw the augmentation of this epoch from now on."""
        self._epoch.fill_(epoch)

    def __getitem__(self, index: int) -> tuple:
        with seeded(self.seed, int(self._epoch), index):
            return self.dataset[index]


class SkipUnreadable(Dataset):
    """A training set in which the next readable image takes the place of one that is damaged or missing.

    Errors of the system, such as a disk or network that fails, are raised: the image may be intact.
    """

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple:
        for offset in range(len(self)):
            try:
                return self.dataset[(index + offset) % len(self)]
            except (FileNotFoundError, ValueError) as error:
                logger.warning(f"skipping an image: {error}")
        raise ValueError("no training image can be read")
