"""Denoising queries: extra decoder queries, in training only, whose targets are known without matching.

DN-DETR (Li et al., "DN-DETR: Accelerate DETR Training by Introducing Query DeNoising", CVPR 2022, arXiv 2203.01305): a
query is made of a ground-truth box with noise and the class of the object, and must reconstruct the object. So the
decoder learns to predict the object near a given box before the matching is stable. The negatives are from DINO (Zhang
et al., 2022, arXiv 2203.03605): queries made with more noise, whose target is "no object". They teach the decoder to
predict each object once.

The denoising queries run through the same decoder in the same pass. An attention mask hides each group from the other
groups and from the object queries, and the object queries from all groups. The trained network is not changed: the
parameters below live in a module of their own, beside it.

Shapes: B images, Q object queries, G groups, T the most objects in one image of the batch, C hidden width. A group has
2 T queries: T noised objects, then T negatives; D = 2 G T. Boxes are cxcywh in 0..1.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from models.criterion import SetCriterion
from models.matcher import Indices

PREFIX = "dn_"  # of the names of the denoising losses


class DenoisingQueries(nn.Module):
    """Turns the objects of a batch into denoising queries; it has all parameters that exist only in training.

    `groups` is the number of times each object is noised. `box_noise` is the largest shift of a corner, as a share of
    half the box's sides (negatives: between one and two times that); `label_noise` is the share of classes replaced by
    random ones.
    """

    def __init__(self, width: int, num_classes: int, groups: int, box_noise: float = 0.4, label_noise: float = 0.2):
        super().__init__()
        self.num_classes, self.groups = num_classes, groups
        self.box_noise, self.label_noise = box_noise, label_noise
        self.label_embed = nn.Embedding(num_classes, width)
        self.box_embed = nn.Linear(2 * width, width)

    def forward(self, targets: list[dict[str, Tensor]]) -> Tensor:
        """Objects of B images -> queries [B, D, C]."""
        labels, boxes = self.noised(targets)
        codes = sine_code(boxes, self.label_embed.embedding_dim // 4)
        return self.label_embed(labels) + self.box_embed(codes)

    @torch.no_grad()
    def noised(self, targets: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
        """Draw classes [B, D] and boxes [B, D, 4] of the denoising queries.

        An image with fewer than T objects is filled up with random ones, whose target is "no object".
        """
        most = max(1, *(len(target["labels"]) for target in targets))
        labels, boxes = _padded_objects(targets, most, self.num_classes)
        copies = 2 * self.groups  # of each group, first the noised objects, then the negatives
        labels, boxes = labels.repeat(1, copies), boxes.repeat(1, copies, 1)
        random_labels = torch.randint_like(labels, self.num_classes)
        labels = torch.where(torch.rand(labels.shape, device=labels.device) < self.label_noise, random_labels, labels)

        negative = torch.arange(copies, device=labels.device).repeat_interleave(most) % 2
        share = torch.rand_like(boxes) + negative[:, None]  # 0..1 of the noise, negatives 1..2
        sign = torch.randint_like(boxes, 2) * 2 - 1
        half = boxes[..., 2:].repeat(1, 1, 2) / 2
        centre = boxes[..., :2].repeat(1, 1, 2)
        corners = centre + half * torch.tensor([-1.0, -1.0, 1.0, 1.0], device=boxes.device)
        corners = (corners + sign * share * self.box_noise * half).clamp(0, 1)
        low = torch.minimum(corners[..., :2], corners[..., 2:])
        high = torch.maximum(corners[..., :2], corners[..., 2:])
        return labels, torch.cat([(low + high) / 2, high - low], dim=-1)

    def attention_mask(self, queries: int, denoising: int, device: torch.device) -> Tensor:
        """True where a query must not attend: bool [Q + D, Q + D]."""
        group = torch.arange(denoising, device=device) // (denoising // self.groups)
        owner = torch.cat([torch.full((queries,), -1, device=device), group])  # object queries are a group of their own
        return owner[:, None] != owner[None, :]


def denoising_losses(criterion: SetCriterion, outputs: dict, targets: list[dict], groups: int) -> dict[str, Tensor]:
    """Compute the losses of classes and boxes of every decoder layer, without matching.

    Query t of each group is matched to object t; the target of the negatives is "no object". The `outputs` [B, D, ...]
    have `aux_outputs`, as DETR's.
    """
    indices = denoising_indices(targets, outputs["pred_logits"], groups)
    num_boxes = criterion.count_objects(targets, outputs["pred_logits"].device) * groups
    losses: dict[str, Tensor] = {}
    for i, layer in enumerate([outputs, *outputs.get("aux_outputs", ())]):
        suffix = f"_{i - 1}" if i else ""
        values = criterion.loss_labels(layer, targets, indices, num_boxes, log=False)
        values |= criterion.loss_boxes(layer, targets, indices, num_boxes)
        losses |= {f"{name}{suffix}": value for name, value in values.items()}
    return losses


def denoising_indices(targets: list[dict], logits: Tensor, groups: int) -> Indices:
    """Return, for each image, the denoising queries that reconstruct an object, and the object of each."""
    most = logits.shape[1] // (2 * groups)
    first = torch.arange(groups, device=logits.device) * 2 * most
    pairs = []
    for target in targets:
        objects = torch.arange(len(target["labels"]), device=logits.device)
        pairs.append(((first[:, None] + objects).flatten(), objects.repeat(groups)))
    return pairs


def sine_code(boxes: Tensor, frequencies: int) -> Tensor:
    """Sines and cosines of each coordinate, as positions in the image have them: [..., 4] -> [..., 8 * frequencies].

    A query that is a linear map of them can attend to a place; one of the four numbers cannot.
    """
    wavelengths = 10000 ** (torch.arange(frequencies, device=boxes.device) / frequencies)
    angles = 2 * math.pi * boxes[..., None] / wavelengths
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2)


def _padded_objects(targets: list[dict[str, Tensor]], most: int, num_classes: int) -> tuple[Tensor, Tensor]:
    """Classes [B, T] and boxes [B, T, 4] of all objects, filled up with random ones to T = `most`."""
    labels = pad_sequence([target["labels"] for target in targets], batch_first=True, padding_value=-1)
    boxes = pad_sequence([target["boxes"].float().reshape(-1, 4) for target in targets], batch_first=True)
    if labels.shape[1] == 0:
        labels, boxes = labels.new_full((len(targets), most), -1), boxes.new_zeros(len(targets), most, 4)
    missing = labels < 0
    labels = torch.where(missing, torch.randint_like(labels, num_classes), labels)
    size = torch.rand_like(boxes[..., 2:]) * 0.5 + 0.05
    centre = size / 2 + torch.rand_like(size) * (1 - size)
    return labels, torch.where(missing[..., None], torch.cat([centre, size], dim=-1), boxes)
