"""A run's log for TensorBoard (`--tensorboard`): losses, rates, metrics and example pictures, epoch by epoch."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

NUMBERS = {"coco_eval_bbox": "box", "coco_eval_masks": "mask"}
FIRST_NUMBERS = ("AP", "AP50", "AP75")
EXAMPLES = "examples.png"  # the picture of an evaluation (datasets/examples.py)


class TensorBoard:
    """Writes rows of `log.txt` to a folder for TensorBoard.

    Raises ValueError if the package is not installed.
    """

    def __init__(self, folder: Path):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ValueError("--tensorboard needs a package: pip install tensorboard") from None
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.writer, self._open = folder, None, SummaryWriter

    def write(self, row: dict) -> None:
        """Add a row, and the picture of the last evaluation; a run that is resumed hides rows it wrote before."""
        epoch = row["epoch"]
        self.writer = self.writer or self._open(self.folder, purge_step=epoch)
        for name, value in scalars(row):
            self.writer.add_scalar(name, value, epoch)
        if (self.folder / EXAMPLES).is_file():
            self.writer.add_image("examples", np.asarray(Image.open(self.folder / EXAMPLES)), epoch, dataformats="HWC")
        self.writer.flush()


def scalars(row: dict) -> Iterator[tuple[str, float]]:
    """Yield the numbers of a row: "train/loss", "test/class_error", "AP/box", "PQ/all" and so on."""
    for entry, value in row.items():
        part, _, name = entry.partition("_")
        if name in NUMBERS:
            for metric, number in zip(FIRST_NUMBERS, value, strict=False):
                yield f"{metric}/{NUMBERS[name]}", number
        elif name.startswith("PQ_"):
            yield f"PQ/{name.removeprefix('PQ_')}", value["pq"]
        elif part in ("train", "test") and isinstance(value, (int, float)):
            yield f"{part}/{name}", value
