"""The number of detections for each object, and warnings of detections that show that a model has not learned."""

import torch
from torch import Tensor

from util.dist import gather_to_main
from util.logger import logger

SHOWN = 0.5  # score from which a detection is usually shown
FEW_IMAGES = 10  # with fewer, boxes may be alike by chance
ALIKE = 0.01  # mean standard deviation of a query's box over images, as a share of the image's sides


class DetectionStats:
    """An evaluator (see datasets/evaluators.py): `boxes_per_object`, and warnings of useless detections."""

    def __init__(self):
        self.images: dict[int, tuple[Tensor, Tensor, int]] = {}  # boxes [Q, 4] in 0..1, scores [Q], objects; by id

    def update(self, predictions: dict[int, dict[str, Tensor]], batch) -> None:
        """Add the results of a batch: `scores` [Q] and `boxes` [Q, 4] (corners in pixels) by image id."""
        for image_id, (height, width), target in zip(
            batch.image_ids, batch.original_sizes.tolist(), batch.targets, strict=True
        ):
            result = predictions[image_id]
            boxes = result["boxes"].detach().float().cpu() / torch.tensor([width, height, width, height])
            self.images[image_id] = boxes, result["scores"].detach().float().cpu(), len(target.get("labels", ()))

    def synchronize_between_processes(self) -> None:
        """Bring every process's images to the main one."""
        parts = gather_to_main(self.images) or []
        self.images = {image_id: entry for part in parts for image_id, entry in part.items()}

    def accumulate(self) -> None:
        """Do nothing: `summarize` computes."""

    def summarize(self) -> dict[str, float]:
        """Log the warnings; return `boxes_per_object`, the detections that score above 0.5 over the objects.

        It is 1 for a perfect detector, and larger where several queries detect the same object. Without objects: {}.
        """
        objects = sum(count for _, _, count in self.images.values())
        if not objects:
            return {}
        crowded = [image_id for image_id, (boxes, _, count) in self.images.items() if count > len(boxes)]
        if crowded:
            logger.warning(
                f"{len(crowded)} images have more objects than the model has queries (--num_queries): "
                f"images {crowded[:5]}"
            )
        shown = sum(int((scores > SHOWN).sum()) for _, scores, _ in self.images.values())
        if not shown:
            logger.warning(f"no detection of {len(self.images)} images scores above {SHOWN}: nothing would be shown")
        elif len(self.images) >= FEW_IMAGES and self._deviation() < ALIKE:
            logger.warning("each query finds nearly the same box in every image: the detector does not see the images")
        return {"boxes_per_object": shown / objects}

    def _deviation(self) -> float:
        """Return the standard deviation of a query's box over the images, averaged over the queries."""
        boxes = [boxes for boxes, _, _ in self.images.values()]
        if len({len(each) for each in boxes}) > 1:  # a post-processor that drops queries: rows are not queries
            return 1.0
        return float(torch.stack(boxes).std(dim=0).mean())
