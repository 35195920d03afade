"""Rare classes: weights of the classes in the loss, and rare images drawn more often (`--class_balance`)."""

import math

import numpy as np
from torch.utils.data import Dataset, Subset

LARGEST_WEIGHT = 4.0


def class_weights(dataset: Dataset) -> list[float]:
    """Return the weight of each class id from 0: the root of the mean count over the class's, between 1/4 and 4.

    They are scaled so that the weights of all objects have a mean of 1. A class without objects has weight 1.
    """
    counts = np.bincount(dataset.index.labels[~dataset.index.iscrowd.astype(bool)], minlength=dataset.num_classes)
    present = counts > 0
    weights = np.ones(len(counts))
    if present.any():
        raw = np.sqrt(counts[present].mean() / counts[present])
        weights[present] = raw.clip(1 / LARGEST_WEIGHT, LARGEST_WEIGHT)
        weights[present] /= np.average(weights[present], weights=counts[present])
    return weights.tolist()


def repeat_rare(dataset: Dataset, seed: int = 0) -> Subset:
    """Repeat images of rare classes: LVIS's repeat factors (Gupta et al., CVPR 2019, arXiv 1908.03195, section 4.3).

    Class c in a share f(c) of the images has the factor max(1, sqrt(t / f(c))), an image the largest one of its
    classes, of which a fraction is rounded by chance. The threshold t is the mean of f over the classes (0.001 there).
    """
    index = dataset.index
    images = np.repeat(np.arange(len(index.image_ids)), np.diff(index.first))
    pairs = np.unique(np.stack([images, index.labels], axis=1), axis=0)  # each class of an image once
    share = np.bincount(pairs[:, 1], minlength=dataset.num_classes) / max(len(index.image_ids), 1)
    factors = np.ones(len(index.image_ids))
    if len(pairs):
        by_class = np.sqrt(share[share > 0].mean() / np.maximum(share, 1e-12)).clip(min=1)
        np.maximum.at(factors, pairs[:, 0], by_class[pairs[:, 1]])
    chance = np.random.default_rng(seed).random(len(factors))
    times = [math.floor(factor) + (draw < factor % 1) for factor, draw in zip(factors, chance, strict=True)]
    return Subset(dataset, np.repeat(np.arange(len(times)), times).tolist())
