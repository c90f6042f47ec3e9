"""Kronecker-factored Laplace over the last layer, in closed form: for any number of classes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ella.activations import FeatureTaps
from ella.arguments import COUNT, POSITIVE
from ella.batches import Loader, Split
from ella.choosing import input_of, last_linear
from ella.inputs import Inputs
from ella.likelihoods import Categorical
from ella.outputs import Output
from ella.predictions import NotFittedError
from ella.predictive import Evaluation, LogitGaussian
from ella.predictor import Predictor
from ella.processes import Processes

if TYPE_CHECKING:
    from typing_extensions import Self


class LastLayerKronecker(Predictor):
    r"""Last-layer Laplace with the curvature :math:`B ⊗ A` in weight and bias, in closed form.

    With h the input of the layer and a one, :math:`A = \sum_i h_i h_i^\top / N` and
    :math:`B = \sum_i Λ_i`; with :math:`A = P a P^\top, B = Q b Q^\top`

    .. math:: S(x) = Q \, \mathrm{diag}_i(s_i(x)) \, Q^\top,
              \qquad s_i(x) = \sum_j \frac{(P^\top h)_j^2}{b_i a_j + δ}.

    Covariances of outputs are kept for the leading `directions` of Q, of the others only what they
    add to each variance; with as many as classes nothing is left out. It holds c² + d² numbers and
    needs no Jacobian. `LastLayerLaplace` does the same through laplace-torch, with a block of its
    own for the bias, and c columns of curvature for each example.

    Reference: A Scalable Laplace Approximation for Neural Networks (Ritter et al., 2018),
    https://openreview.net/forum?id=Skdvd2xAZ; of the last layer as in Laplace Redux (Daxberger et
    al., 2021), https://arxiv.org/abs/2106.14806

    Args:
        model: Maps x to logits (n, c) that are the output of an `nn.Linear`.
        directions: Leading eigenvectors of B whose covariance is kept.
        prior_precision: δ until `calibrate` chooses one.
        output: See `Predictor`.
        split: See `Predictor`.
        seed: Seed of the draws.
        progress: Whether to show progress bars.

    Raises:
        ValueError: If an argument is not above 0.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        directions: int = 32,
        prior_precision: float = 1.0,
        output: Output = None,
        split: Split | None = None,
        seed: int = 0,
        progress: bool = True,
    ) -> None:
        COUNT("directions", directions)
        POSITIVE("prior_precision", prior_precision)
        super().__init__(
            model,
            likelihood=Categorical(),
            output=output,
            split=split,
            seed=seed,
            progress=progress,
        )
        self.directions, self.prior_precision = directions, prior_precision
        self._posterior: _Posterior | None = None

    def fit(self, train_loader: Loader) -> "Self":
        """Sum both factors over the training data; calling it again starts again.

        Raises:
            TypeError: If the loader, the labels or the model's outputs have the wrong form.
            ValueError: If a batch is bad, the logits are no linear layer's, there are no data, or
                several processes have a part of the data each.
        """
        if Processes(self.process_group).size > 1:
            raise ValueError("LastLayerKronecker is fitted in one process with all the data.")
        taps, sums = None, None
        with self._labelled_batches(train_loader).named() as batches:
            self._check_first_batch(batches)
            for x, _ in self._progress_over(batches.labelled(), "curvature"):
                taps = taps or self._tap(x)
                part = _Sums.of(*_read(taps, x))
                sums = part if sums is None else sums + part
        if taps is None or sums is None:
            raise ValueError("No data: expected at least one example.")
        self._posterior = sums.posterior(taps, self.directions, self.network.wide)
        self._set_fitted(self._started(float(self.prior_precision), 1.0))
        return self

    @property
    def state_bytes(self) -> int:
        """Bytes of both decompositions."""
        found = self._posterior
        tensors = [] if found is None else [found.a, found.p, found.b, found.q]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def _tap(self, x: Inputs) -> FeatureTaps:
        name = last_linear(self.network, x)
        if name is None:
            raise ValueError(
                "LastLayerKronecker needs a model whose logits come straight from an nn.Linear."
            )
        return FeatureTaps(self.network, [input_of(self.network.model, name)])

    def _evaluate(self, x: Inputs) -> "_Evaluation":
        found = self._posterior
        if found is None:
            raise NotFittedError("Call LastLayerKronecker.fit(train_loader) first.")
        logits, h = _read(found.taps, x)
        return _Evaluation(logits, (h @ found.p).square(), found)


@dataclass(frozen=True)
class _Sums:
    """Σ h hᵀ and Σ Λ in float64, and how many examples they are of."""

    inputs: Tensor
    curvature: Tensor
    count: int

    @classmethod
    def of(cls, logits: Tensor, h: Tensor) -> "_Sums":
        probs, h = logits.double().softmax(-1), h.double()
        return cls(h.T @ h, torch.diag(probs.sum(0)) - probs.T @ probs, len(h))

    def __add__(self, other: "_Sums") -> "_Sums":
        return _Sums(
            self.inputs + other.inputs, self.curvature + other.curvature, self.count + other.count
        )

    def posterior(self, taps: FeatureTaps, directions: int, dtype: torch.dtype) -> "_Posterior":
        a, p = torch.linalg.eigh(self.inputs / self.count)
        b, q = (found.flip(-1) for found in torch.linalg.eigh(self.curvature))  # leading first
        return _Posterior(
            taps, directions, a.clamp_min(0), p.to(dtype), b.clamp_min(0), q.to(dtype)
        )


@dataclass(frozen=True)
class _Posterior:
    """Both decompositions; eigenvalues stay float64."""

    taps: FeatureTaps
    directions: int
    a: Tensor
    p: Tensor
    b: Tensor
    q: Tensor


@dataclass(frozen=True)
class _Evaluation(Evaluation):
    """Logits (n, c), and (Pᵀh)² of each example, (n, d + 1)."""

    logits: Tensor
    squares: Tensor
    posterior: _Posterior

    def rows(self, index: Tensor | slice) -> "_Evaluation":
        return _Evaluation(self.logits[index], self.squares[index], self.posterior)

    @classmethod
    def joined(cls, parts: "Sequence[_Evaluation]") -> "_Evaluation":
        logits, squares = (
            torch.cat([getattr(part, name) for part in parts]) for name in ("logits", "squares")
        )
        return cls(logits, squares, parts[0].posterior)

    def prior_variance(self) -> float:
        return self.squares.double().sum(-1).mean().item()

    def gaussian(self, prior_precision: float) -> LogitGaussian:
        found = self.posterior
        inverse = (torch.outer(found.a, found.b) + prior_precision).reciprocal()
        scale = self.squares @ inverse.to(self.squares)
        k, q = found.directions, found.q
        factor = q[:, :k] * scale[:, :k].sqrt().unsqueeze(1)
        rest = None if k >= len(q) else scale[:, k:] @ q[:, k:].square().T
        return LogitGaussian(self.logits, factor, rest)


def _read(taps: FeatureTaps, x: Inputs) -> tuple[Tensor, Tensor]:
    """Logits (n, c), and the input of the last layer with a one, (n, d + 1)."""
    logits, features = taps(x)
    h = features[:, : features.shape[1] - logits.shape[1]]
    return logits, torch.cat([h, h.new_ones(len(h), 1)], dim=1)
