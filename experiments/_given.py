"""ELLA with eigenfunctions that are known already: many tunings of the same, dear Jacobians."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from ella import Evaluated, Linearized, LogitGaussian, entropy
from ella.baselines import TemperatureScaling
from ella.eigenfunctions import Eigenfunctions
from ella.metrics import auroc, expected_calibration_error, negative_log_likelihood

DRAWS = 64


class Remembered:
    """Fitted eigenfunctions that compute each batch of inputs once; the rest is read from memory.

    Args:
        fitted: The eigenfunctions.
    """

    def __init__(self, fitted: Eigenfunctions) -> None:
        self.fitted = fitted
        self._known: dict[str, LogitGaussian] = {}

    def __call__(self, x: Tensor) -> LogitGaussian:
        """Evaluate at n inputs."""
        key = digest(x)
        if key not in self._known:
            self._known[key] = self.fitted(x).to("cpu")
        return self._known[key].to(x.device)


@dataclass(frozen=True)
class Reduced:
    """Of exact products of a large rank: fewer eigenfunctions, and another residual.

    Attributes:
        whole: With R as blocks, (n, c, c).
        rank: k, at most that of `whole`.
        residual: "diag", "exact" or "none".
    """

    whole: Remembered
    rank: int
    residual: str

    def __call__(self, x: Tensor) -> LogitGaussian:
        """Evaluate at n inputs."""
        return reduced(self.whole(x), self.rank, self.residual)


@dataclass(frozen=True)
class Given:
    """A method that has its eigenfunctions already.

    Attributes:
        fitted: They.
    """

    fitted: Any

    def fit(
        self, linearized: Linearized, loader: Iterable[Any], *, seed: int, progress: bool
    ) -> Any:  # noqa: ANN401 - what was given
        """See `EigenfunctionMethod.fit`."""
        return self.fitted


def reduced(whole: LogitGaussian, rank: int, residual: str) -> LogitGaussian:
    """The first `rank` eigenfunctions of a prior with exact blocks R, with another residual.

    Args:
        whole: With R as blocks, (n, c, c).
        rank: k, at most that of `whole`.
        residual: "diag", "exact" or "none".

    Raises:
        ValueError: If `whole` has no residual.
    """
    if whole.residual is None:
        raise ValueError("`whole` must hold the exact residual.")
    left, rest = whole.factor[..., :rank], whole.factor[..., rank:]
    if residual == "none":
        return LogitGaussian(whole.mean, left)
    blocks = whole.residual + rest @ rest.mT
    if residual == "diag":
        return LogitGaussian(whole.mean, left, blocks.diagonal(dim1=1, dim2=2).clamp_min(0))
    return LogitGaussian(whole.mean, left, blocks)


def digest(tensor: Tensor) -> str:
    """A name made of the values."""
    values = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()[:20]


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


def batches_of(*columns: Tensor) -> DataLoader:
    """In order, always in the same parts."""
    return DataLoader(TensorDataset(*columns), batch_size=250)


def performance(
    known: Evaluated, labels: Tensor, outside: Evaluated, parts: list[Split]
) -> dict[str, float]:
    """NLL, ECE and AUROC (entropy) of a method, mean over the splits."""
    rows = []
    for split in parts:
        tuned = known.copied().calibrate([(split.val, labels[split.val])], n_samples=DRAWS)
        probs = tuned.predict_proba([split.test])
        away = outside.copied(tuned).predict_proba([torch.arange(len(outside))])
        rows.append(scores(probs, labels[split.test], entropy(away)))
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
