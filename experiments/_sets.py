"""Conformal sets from the probabilities of a method, by MAPIE: size and coverage.

A set holds the true class with a probability of at least the confidence level, over draws of
images and of those that it is calibrated on; not for each kind of image. How far coverage is from
the level on hard images, and under shift, is up to the probabilities.
"""

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from _images import Data
from _suite import Tuned, listed
from torch import Tensor

LEVELS = (0.95, 0.99)
SCORES = ("aps", "raps")
NUM_CONFORMAL = 2000
"""Images that sets are calibrated on, or half of those that are left, if that is less."""
AGREEMENT = {"all agree": (0.99, 1.01), "most": (0.9, 0.99), "some": (0.0, 0.9)}
"""Groups of images by the share of people who named the most frequent class (CIFAR-10H)."""


def conformal_sets(
    calibrated_on: tuple[Tensor, Tensor], probs: Tensor, score: str, seed: int
) -> Tensor:
    """Which classes are in the set of each image, at each level, shape (n, c, levels).

    References: Classification with Valid and Adaptive Coverage (Romano et al., 2020),
    https://arxiv.org/abs/2006.02544; Uncertainty Sets for Image Classifiers using Conformal
    Prediction (Angelopoulos et al., 2020), https://arxiv.org/abs/2009.14193

    Args:
        calibrated_on: Probabilities (m, c), and labels.
        probs: Shape (n, c).
        score: "aps" or "raps"; randomised, so that coverage is the level and no more.
        seed: Of what is random.
    """
    try:
        from mapie.classification import SplitConformalClassifier
        from sklearn.base import BaseEstimator, ClassifierMixin
    except ImportError as error:
        raise ImportError('Sets are those of MAPIE: pip install ".[rivals]".') from error

    class Known(ClassifierMixin, BaseEstimator):
        """A classifier of row numbers, whose probabilities are known."""

        def __init__(self, probs: np.ndarray) -> None:
            self.probs = probs
            self.classes_ = np.arange(probs.shape[1])

        def predict_proba(self, rows: np.ndarray) -> np.ndarray:
            return self.probs[rows[:, 0]]

        def predict(self, rows: np.ndarray) -> np.ndarray:
            return self.predict_proba(rows).argmax(1)

    first, labels = calibrated_on
    both = torch.cat([first, probs]).double()
    known = Known((both / both.sum(1, keepdim=True)).numpy())
    rows = np.arange(len(both))[:, None]
    sets = SplitConformalClassifier(
        known, confidence_level=LEVELS, conformity_score=score, prefit=True, random_state=seed
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sets may be empty, which is as it should be
        sets.conformalize(rows[: len(first)], labels.numpy())
        options = {"include_last_label": "randomized"}
        _, found = sets.predict_set(rows[len(first) :], conformity_score_params=options)
    return torch.from_numpy(found)


def set_rows(tuned: list[Tuned], data: Data) -> Iterator[dict[str, Any]]:
    """Of each score and level; lists over the seeds."""
    for score in SCORES:
        found = [_of_seed(each, data, score) for each in tuned]
        for i, level in enumerate(LEVELS):
            yield {"score": score, "level": level, **listed([each[i] for each in found])}


def _of_seed(each: Tuned, data: Data, score: str) -> list[dict[str, float]]:
    """At each level: over test images, groups of them, and severities."""
    count = min(NUM_CONFORMAL, len(each.rest) // 2)
    own, rest = each.rest[:count], each.rest[count:]
    labels, probs = [data.test.y[rest]], [each.test.predict_proba([rest])]
    places = [torch.zeros(len(rest), dtype=torch.long)]
    for (_, severity), images in each.elsewhere.shifted.items():
        some = rest[rest < len(images)]
        probs.append(images.copied(each.test).predict_proba([some]))
        labels.append(data.test.y[some])
        places.append(torch.full((len(some),), severity))
    known = each.test.predict_proba([own]), data.test.y[own]
    sets = conformal_sets(known, torch.cat(probs), score, each.seed)
    size = sets.sum(1).double()
    hit = sets[torch.arange(len(sets)), torch.cat(labels)].double()
    agreed, place = data.human[rest].amax(1), torch.cat(places)
    groups = {f"severity {i}" if i else "all": place == i for i in range(6)}
    for name, (low, high) in AGREEMENT.items():
        inside = (agreed >= low) & (agreed < high)
        groups[name] = torch.cat([inside, torch.zeros(len(sets) - len(rest), dtype=torch.bool)])
    return [
        {
            f"{what} {name}": values[where, i].mean().item()
            for name, where in groups.items()
            for what, values in (("size", size), ("coverage", hit))
        }
        for i in range(len(LEVELS))
    ]
