"""The metrics of an evaluation: a table of functions, each of which builds an evaluator.

An evaluator has four methods. `update(predictions, batch)` takes the results of the box (and mask) post-processors by
image id, and the Batch they come from; `synchronize_between_processes()` brings everything to the main process;
`accumulate()` and `summarize()` compute, and the latter returns the numbers by their names in the log, {} on other
processes than the main one.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from datasets.coco_eval import CocoEvaluator
from datasets.detection_stats import DetectionStats
from datasets.examples import ExamplePictures
from datasets.panoptic_eval import PanopticEvaluator
from util.tensorboard import EXAMPLES


@dataclass
class Batch:
    """A batch of the evaluation: the model's outputs, its input, and the targets as the loader gave them."""

    outputs: dict
    samples: object  # NestedTensor
    targets: list[dict]

    @property
    def image_ids(self) -> list[int]:
        """Id of each image."""
        return [int(target["image_id"]) for target in self.targets]

    @property
    def original_sizes(self) -> Tensor:
        """(height, width) of each image as it is on disk, [B, 2]."""
        return torch.stack([target["orig_size"] for target in self.targets])

    @property
    def sizes(self) -> Tensor:
        """(height, width) of each image as it enters the model, without padding, [B, 2]."""
        return torch.stack([target["size"] for target in self.targets])


def box_and_mask_ap(postprocessors: dict, data_loader, base_ds, output_dir, coco_backend: str) -> CocoEvaluator:
    """AP of boxes, and of masks where they are post-processed."""
    return CocoEvaluator(base_ds, [name for name in ("segm", "bbox") if name in postprocessors], coco_backend)


class PanopticQuality:
    """PQ of the maps that the panoptic post-processor makes."""

    def __init__(self, postprocessor, evaluator: PanopticEvaluator):
        self.postprocessor, self.evaluator = postprocessor, evaluator

    def update(self, predictions: dict[int, dict], batch: Batch) -> None:
        """Add the maps of a batch."""
        padded = batch.samples.tensors.shape[-2:]
        maps = self.postprocessor(batch.outputs, batch.sizes, batch.original_sizes, padded_size=padded, first_id=1)
        named = zip(batch.image_ids, maps, strict=True)
        self.evaluator.update({**found, "image_id": image_id} for image_id, found in named)

    def synchronize_between_processes(self) -> None:
        """Bring the maps of every process to the main one."""
        self.evaluator.synchronize_between_processes()

    def accumulate(self) -> None:
        """Do nothing: `summarize` computes."""

    def summarize(self) -> dict[str, dict]:
        """Print the table; return PQ, SQ and RQ of all classes, things and stuff."""
        quality = self.evaluator.summarize() or {}
        names = {"PQ_all": "All", "PQ_th": "Things", "PQ_st": "Stuff"}
        return {name: quality[group] for name, group in names.items() if group in quality}


def panoptic_quality(postprocessors: dict, data_loader, base_ds, output_dir, coco_backend) -> PanopticQuality | None:
    """PQ, where there is a panoptic post-processor; the maps are written to `output_dir`/panoptic_eval."""
    if "panoptic" not in postprocessors:
        return None
    dataset = _whole(data_loader.dataset)
    folder = Path(output_dir) / "panoptic_eval" if output_dir else None
    outside = "outside_paths" in getattr(dataset, "allow", ())
    evaluator = PanopticEvaluator(dataset.ann_file, dataset.ann_folder, folder, outside)
    return PanopticQuality(postprocessors["panoptic"], evaluator)


def detection_stats(postprocessors: dict, data_loader, base_ds, output_dir, coco_backend) -> DetectionStats:
    """Count the detections for each object, and warn of useless detections."""
    return DetectionStats()


def example_pictures(postprocessors: dict, data_loader, base_ds, output_dir, coco_backend) -> ExamplePictures | None:
    """Draw the first images for TensorBoard, where its folder exists (`--tensorboard`)."""
    folder = Path(output_dir) / "tensorboard"
    if not output_dir or not folder.is_dir():
        return None
    return ExamplePictures(folder / EXAMPLES, getattr(_whole(data_loader.dataset), "class_names", {}))


def _whole(dataset: Dataset) -> Dataset:
    """Return the dataset that a Subset was taken from."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    return dataset


# Functions that build an evaluator, or return None where its metric does not apply. A metric of your own is one more.
EVALUATORS = {
    "coco": box_and_mask_ap,
    "panoptic": panoptic_quality,
    "detections": detection_stats,
    "examples": example_pictures,
}


def build_evaluators(
    postprocessors: dict, data_loader: Iterable, base_ds, output_dir: str, coco_backend: str = "auto"
) -> dict:
    """Build the evaluators that apply to these post-processors, by the names of the table."""
    built = {
        name: build(postprocessors, data_loader, base_ds, output_dir, coco_backend)
        for name, build in EVALUATORS.items()
    }
    return {name: evaluator for name, evaluator in built.items() if evaluator is not None}
