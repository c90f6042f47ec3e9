"""ELLA on features that are computed once: many tunings of the same, dear Jacobian products."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ella.baselines import TemperatureScaling
from ella.calibrate import ClassificationScore, Tuning, precision_grid, search
from ella.curvature import Softmax
from ella.eigenfunctions import Features
from ella.metrics import auroc, expected_calibration_error, negative_log_likelihood
from ella.posterior import GaussianPosterior
from ella.predictive import LogitGaussian, MonteCarlo, entropy

LINK = MonteCarlo(64)


@dataclass(frozen=True)
class Split:
    """Which of the labelled examples tune, and which test.

    Attributes:
        val: Indices.
        test: Indices.
    """

    val: Tensor
    test: Tensor


def splits(num_examples: int, num_val: int, count: int) -> list[Split]:
    """The first takes the examples in order, the others at random, each by its own seed."""
    orders = [torch.arange(num_examples)]
    for seed in range(1, count):
        orders.append(torch.randperm(num_examples, generator=torch.Generator().manual_seed(seed)))
    return [Split(order[:num_val], order[num_val:]) for order in orders]


def select(features: Features, rows: Tensor) -> Features:
    """Some of the examples."""
    residual = None if features.residual is None else features.residual[rows]
    return Features(features.logits[rows], features.phi[rows], residual)


def evaluated(
    eigenfunctions: Callable[[Tensor], Features],
    images: Tensor,
    device: torch.device,
    batch_size: int = 250,
) -> Features:
    """Features of many images, on the CPU."""
    parts = [eigenfunctions(part.to(device)) for part in images.split(batch_size)]
    residuals = [part.residual.cpu() for part in parts if part.residual is not None]
    return Features(
        torch.cat([part.logits.cpu() for part in parts]),
        torch.cat([part.phi.cpu() for part in parts]),
        torch.cat(residuals) if residuals else None,
    )


def reduced(features: Features, rank: int, residual: str) -> Features:
    """Of φ and the exact R blocks: the first `rank` eigenfunctions with another residual.

    Args:
        features: With R as blocks, (n, c, c).
        rank: k, at most that of `features`.
        residual: "diag", "exact" or "none".
    """
    logits, phi, inside = features
    assert inside is not None
    left, rest = phi[..., :rank], phi[..., rank:]
    if residual == "none":
        return Features(logits, left, None)
    blocks = inside + rest @ rest.mT
    if residual == "diag":
        return Features(logits, left, blocks.diagonal(dim1=1, dim2=2).clamp_min(0))
    return Features(logits, left, blocks)


def temper(features: Features, posterior: GaussianPosterior, tuning: Tuning) -> Tensor:
    """Probabilities at the tuned (δ, T, τ)."""
    if tuning.temperature == 0:
        return (features.logits / tuning.scale).softmax(-1)
    gaussian = posterior.gaussian(*features, tuning.prior_precision)
    return LINK(gaussian.tempered(tuning.temperature, tuning.scale))


def tuned(
    curvature: Features, features: Features, labels: Tensor, split: Split, num_train: int
) -> tuple[GaussianPosterior, Tuning]:
    """The posterior from some training examples, standing for `num_train`, and (δ, T, τ)."""
    matrix = Softmax().projected_hessian(curvature.logits, curvature.phi)
    posterior = GaussianPosterior.from_curvature(matrix * (num_train / len(curvature.logits)))
    val = select(features, split.val)

    def gaussian(prior_precision: float) -> LogitGaussian:
        return posterior.gaussian(*val, prior_precision)

    prior = gaussian(1e12).variance().double().mean().item() * 1e12
    score = ClassificationScore(labels[split.val], LINK)
    return posterior, search(gaussian, score, precision_grid(prior))


def performance(
    curvature: Features,
    features: Features,
    labels: Tensor,
    ood: Features,
    parts: list[Split],
    num_train: int,
) -> dict[str, float]:
    """NLL, ECE and AUROC (entropy) of ELLA, mean over the splits."""
    rows = []
    for split in parts:
        posterior, tuning = tuned(curvature, features, labels, split, num_train)
        probs = temper(select(features, split.test), posterior, tuning)
        outside = entropy(temper(ood, posterior, tuning))
        rows.append(scores(probs, labels[split.test], outside))
    return _mean(rows)


def temperature_scaling(
    logits: Tensor, labels: Tensor, ood: Tensor, parts: list[Split]
) -> dict[str, float]:
    """The same figures of temperature scaling, tuned by the same search."""
    rows = []
    for split in parts:
        method = scaled(logits, labels, split)
        probs = method.predict_proba(logits[split.test])
        rows.append(scores(probs, labels[split.test], entropy(method.predict_proba(ood))))
    return _mean(rows)


def scaled(logits: Tensor, labels: Tensor, split: Split) -> TemperatureScaling:
    """Temperature scaling of a "model" that is given its logits."""
    method = TemperatureScaling(torch.nn.Identity(), progress=False)
    val = [(logits[split.val], labels[split.val])]
    return method.fit(val).calibrate(val)


def scores(probs: Tensor, labels: Tensor, outside: Tensor) -> dict[str, float]:
    """One row's figures."""
    return {
        "nll": negative_log_likelihood(probs, labels),
        "ece": expected_calibration_error(probs, labels),
        "auroc": auroc(entropy(probs), outside),
    }


def _mean(rows: list[dict[str, float]]) -> dict[str, float]:
    return {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}


def variances(features: Features) -> Tensor:
    """Prior variance of the logits, tr(φφᵀ + R) of each example."""
    inside = features.phi.square().sum((1, 2))
    residual: Any = features.residual
    if residual is None:
        return inside
    diagonal = residual.diagonal(dim1=1, dim2=2) if residual.ndim == 3 else residual
    return inside + diagonal.sum(1)
