"""How different pictures of one label are from each other.

Shapes: B labels, P pictures of each, H W pixels, D features.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from parscale_ear.metrics.features import FeatureExtractor


def mean_pairwise_distance(features: Tensor) -> float:
    """Mean Euclidean distance between two different pictures of a label.

    Args:
        features: (B, P, D).

    Returns:
        The mean over all pairs and labels; 0 for P = 1 and for equal features.

    Raises:
        ValueError: the shape is another.
    """
    if features.ndim != 3 or 0 in features.shape:
        raise ValueError(f"features must have shape (B, P, D), got {tuple(features.shape)}")
    count = features.shape[1]
    if count == 1:
        return 0.0
    values, total = features.double(), 0.0
    for k in range(1, count):  # picture by picture: all pairs at once would take P times the memory
        # Differences, not torch.cdist: equal features must be exactly 0 apart.
        total += float((values[:, k:] - values[:, k - 1 : k]).norm(dim=-1).sum())
    return total / (len(values) * count * (count - 1) / 2)


def feature_diversity(pictures: Tensor, extractor: FeatureExtractor) -> float:
    """Mean distance, in an extractor's features, between two pictures of a label.

    Args:
        pictures: (B, P, 3, H, W), 8-bit.
        extractor: of the features.

    Returns:
        See :func:`mean_pairwise_distance`; in the features' own unit, so that only values of one
        extractor compare.
    """
    features = extractor(pictures.flatten(0, 1))  # (B · P, D)
    return mean_pairwise_distance(features.unflatten(0, pictures.shape[:2]))


def pixel_cosine(pictures: Tensor) -> float | None:
    """Mean cosine between the pixels of two pictures of a label, centred at grey.

    The prototype's measure, for comparison: 1 for equal pictures; it says little of what is seen.

    Args:
        pictures: (B, P, 3, H, W), 8-bit.

    Returns:
        The mean over all pairs and labels; None for P = 1.
    """
    count = pictures.shape[1]
    if count == 1:
        return None
    vectors = (pictures.double() - 127.5).flatten(2)  # (B, P, 3HW), never all 0
    vectors = vectors / vectors.norm(dim=-1, keepdim=True)
    first, second = torch.triu_indices(count, count, offset=1)
    return float((vectors[:, first] * vectors[:, second]).sum(-1).mean())


def inception_score(logits: Tensor) -> float:
    """How sure a classifier is of each picture, and how varied its answers are: 1 to classes.

    ``exp(mean KL(p(y | x) ‖ p(y)))`` over one split. Source: Salimans et al., "Improved Techniques
    for Training GANs" (2016). With few pictures it says little: it cannot exceed their number.

    Args:
        logits: (N, classes), N ≥ 1, from ``Inception.logits``.

    Returns:
        1 to the number of classes; higher is better.
    """
    each = logits.double().log_softmax(dim=1)  # (N, classes)
    mean = each.logsumexp(dim=0) - math.log(len(logits))  # log p(y)
    return math.exp(float((each.exp() * (each - mean)).sum(dim=1).mean()))
