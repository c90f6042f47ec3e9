"""Scores that need no posterior: detectors of `pytorch-ood`, and confidences made of logits.

Each is fitted to penultimate features and logits of training images, and has a setting or none.
One protocol tunes all: of its settings one takes that which tells the images to tune on from
perturbed copies of them (detection), or which ranks their mistakes (confidence). No detector sees
an input of no class before it is tested.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ella.metrics import area_under_risk_coverage, auroc

try:
    from pytorch_ood.detector import ASH, GEN, KNN, SCALE, EnergyBased, Mahalanobis, MaxLogit, ViM
except ImportError as error:
    raise ImportError('The rivals are those of pytorch-ood: pip install ".[rivals]".') from error


@dataclass(frozen=True)
class Read:
    """What a network makes of n images.

    Attributes:
        features: What its last layer reads, shape (n, d).
        logits: Shape (n, c).
    """

    features: Tensor
    logits: Tensor

    @classmethod
    def joined(cls, parts: Iterable["Read"]) -> "Read":
        """All images of several parts."""
        features, logits = zip(*((part.features, part.logits) for part in parts), strict=True)
        return cls(torch.cat(features), torch.cat(logits))


SHARES = (0.05, 0.2, 0.35, 0.5, *ASH.hyperparameter_space["percentile"])
"""Of activations that ASH and SCALE leave out: with those of OpenOOD, smaller ones."""
Score = Callable[[Read], Tensor]
"""From n images to (n,), higher for those that the network knows less about."""


@dataclass(frozen=True)
class Known:
    """What a detector is fitted to.

    Attributes:
        read: Training images.
        labels: Their classes.
        last: The network's last layer.
    """

    read: Read
    labels: Tensor
    last: nn.Linear


def detectors(known: Known) -> dict[str, dict[str, Score]]:
    """By name, scores by setting.

    References: those in the classes of pytorch-ood; of the p-norm, How to Fix a Broken Confidence
    Estimator (Cattelan & Silva, 2024), https://arxiv.org/abs/2305.15508
    """
    return {
        "max logit": {"": lambda read: MaxLogit.score(read.logits)},
        "max logit, p-norm": {f"p = {p}": p_norm(p) for p in (1.5, 2, 3, 4, 5, 6, 8)},
        "energy": {f"T = {t}": energy(t) for t in (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)},
        "GEN": {f"γ = {g}": generalized_entropy(g) for g in GEN.hyperparameter_space["gamma"]},
        "kNN, k = 20": {"": neighbours(known, 20)},
        "kNN, k = 50": {"": neighbours(known, 50)},
        "class Mahalanobis": {"": mahalanobis(known)},
        "ViM": {f"d = {d}": virtual_logit(known, d) for d in (10, 16, 24, 32, 48)},
        "ASH-S": {f"{p}": shaped(ASH, known, p) for p in SHARES},
        "SCALE": {f"{p}": shaped(SCALE, known, p) for p in SHARES},
    }


def p_norm(p: float) -> Score:
    """Minus the largest centred logit, divided by the p-norm of all."""

    def score(read: Read) -> Tensor:
        centred = read.logits - read.logits.mean(1, keepdim=True)
        return -centred.amax(1) / torch.linalg.vector_norm(centred, ord=p, dim=1)

    return score


def energy(temperature: float) -> Score:
    """−T log Σ exp(f/T)."""
    return lambda read: EnergyBased.score(read.logits, t=temperature)


def generalized_entropy(gamma: float) -> Score:
    """Mean of (p(1 − p))^γ over the classes."""
    return lambda read: GEN.score(read.logits, gamma=gamma)


def neighbours(known: Known, k: int) -> Score:
    """Distance to the k-th nearest training image, of normalised features."""
    found = KNN(None, k=k).fit_features(known.read.features, known.labels)
    return lambda read: found.predict_features(read.features)


def mahalanobis(known: Known) -> Score:
    """Squared distance to the nearest class mean under the shared covariance."""
    found = Mahalanobis(None).fit_features(known.read.features, known.labels)
    return lambda read: found.predict_features(read.features)


def virtual_logit(known: Known, d: int) -> Score:
    """Norm outside the d principal directions against the energy."""
    found = ViM(None, d=d, w=known.last.weight, b=known.last.bias)
    found.fit_features(known.read.features, known.labels)
    return lambda read: found.predict_features(read.features)


def shaped(kind: type[ASH] | type[SCALE], known: Known, percentile: float) -> Score:
    """Energy of the logits of features that are pruned or scaled."""

    def head(maps: Tensor) -> Tensor:
        return known.last(maps.flatten(1))

    found = kind(nn.Identity(), head, percentile=percentile)
    return lambda read: found.predict_feature_maps(read.features[..., None, None])


def best_detecting(inside: Mapping[str, Tensor], changed: Mapping[str, Tensor]) -> str:
    """The setting whose scores tell images best from perturbed copies of them."""
    return max(inside, key=lambda setting: auroc(inside[setting], changed[setting]))


def best_ranking(inside: Mapping[str, Tensor], wrong: Tensor) -> str:
    """The setting whose scores rank mistakes best."""
    return min(inside, key=lambda setting: area_under_risk_coverage(inside[setting], wrong))
