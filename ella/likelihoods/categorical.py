"""Classes."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ella.arguments import SHARE, optional, settle, whole
from ella.inputs import slices
from ella.likelihoods.base import Discrete, Losses
from ella.links import LaplaceBridge, Link, MonteCarlo
from ella.lumped import Lumped
from ella.predictive import LogitGaussian
from ella.scores import Uncertainty, corrected_energy, energy, max_logit_p_norm
from ella.targets import check_class_labels

MANY_CLASSES = 128
"""With more of them draws are made for the most probable and for groups of others."""
KEPT_CLASSES = 64
"""How many those are."""
GROUPS = 8
"""How many groups of others there are."""
AT_ONCE = 256
"""Examples whose losses are computed together."""


@dataclass(frozen=True)
class Categorical(Discrete):
    r"""Classes: p = softmax(f), Λ = diag(p) − ppᵀ.

    With more than 128 classes an average over draws is made over the 64 of the largest logits and
    over 8 groups of others (`Lumped`), unless the residual is of blocks. Other links see all.

    Attributes:
        class_weights: Weight of the examples of each class, as in the classifier's own training
            loss; None for 1 each. Any sequence of c numbers.
        ignore_index: Label of examples that do not count.
        label_smoothing: ε of the training loss, in [0, 1): the log-density is that of the smoothed
            label. Λ does not depend on it, nor do validation scores.

    Raises:
        ValueError: If a value is out of range.
    """

    class_weights: Sequence[float] | None = None
    ignore_index: int | None = None
    label_smoothing: float = 0.0
    links: ClassVar[tuple[type[Link], ...]] = (MonteCarlo, LaplaceBridge)
    fewest_normalised: ClassVar[int | None] = 3  # two centred logits have no direction left

    def __post_init__(self) -> None:
        settle(
            self,
            ignore_index=optional(whole(-(2**63), 2**63 - 1)),
            label_smoothing=SHARE,
        )
        if self.class_weights is not None:
            if not isinstance(self.class_weights, Iterable) or isinstance(self.class_weights, str):
                raise ValueError(
                    f"`class_weights` must be numbers, one a class; got {self.class_weights!r}."
                )
            weights = tuple(float(weight) for weight in self.class_weights)
            if not weights or not all(0 < weight < math.inf for weight in weights):
                raise ValueError(
                    f"`class_weights` must be finite numbers above 0, one a class; got {weights}."
                )
            object.__setattr__(self, "class_weights", weights)
        if self.label_smoothing == 1:
            raise ValueError(f"`label_smoothing` must lie in [0, 1); got {self.label_smoothing}.")

    def check(self, y: Tensor, num_outputs: int) -> Tensor:
        """Class indices of shape (n,) in [0, c), or `ignore_index`; see `check_class_labels`."""
        if self.class_weights is not None and len(self.class_weights) != num_outputs:
            raise ValueError(
                f"`class_weights` must have one number for each of the {num_outputs} outputs; got "
                f"{len(self.class_weights)}."
            )
        counted = y if self.ignore_index is None else y[y != self.ignore_index]
        check_class_labels(counted, num_outputs)
        return y.long()

    def weights(self, y: Tensor) -> Tensor | None:
        """Class weights, 0 for ignored examples."""
        if self.class_weights is None and self.ignore_index is None:
            return None
        weights = torch.ones(len(y), dtype=torch.float64, device=y.device)
        if self.class_weights is not None:
            of_class = torch.tensor(self.class_weights, dtype=torch.float64, device=y.device)
            weights = of_class[y.clamp(0, len(of_class) - 1)]
        return weights if self.ignore_index is None else weights * (y != self.ignore_index)

    def statistics(self, outputs: Tensor, y: Tensor) -> Tensor:
        """See `Likelihood.statistics`; of smoothed labels."""
        log_probs = outputs.double().log_softmax(-1)
        density = self._of(log_probs, y)
        if self.label_smoothing:
            density = density + self.label_smoothing * (log_probs.mean(-1) - density)
        weights = self.weights(y)
        return (density if weights is None else density * weights).sum().unsqueeze(0)

    def log_density(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Log softmax(f)[y]."""
        return self._of(outputs.log_softmax(-1), y)

    def log_probability(self, probs: Tensor, y: Tensor) -> Tensor:
        """See `Discrete.log_probability`; of ignored examples, of any class."""
        return super().log_probability(probs, y.clamp(0, probs.shape[1] - 1))

    def whitened(self, outputs: Tensor, phi: Tensor) -> Tensor:
        r"""Centred, weighted features: :math:`Λ = \sum_c p_c (e_c - p)(e_c - p)^\top`.

        No cancellation can then make G indefinite.
        """
        probs = outputs.double().softmax(-1)
        centred = phi - torch.einsum("nc,nck->nk", probs, phi).unsqueeze(1)
        return probs.sqrt().unsqueeze(-1) * centred

    def response(self, outputs: Tensor, dim: int) -> Tensor:
        """softmax(f)."""
        return outputs.softmax(dim)

    def condensed(
        self, gaussian: LogitGaussian, link: Link, y: Tensor | None = None, scale: float = 1.0
    ) -> LogitGaussian:
        """With many classes and draws, the `Lumped` Gaussian; the labels are among its classes."""
        blocks = gaussian.residual is not None and gaussian.residual.ndim == 3
        few = gaussian.mean.shape[1] <= MANY_CLASSES
        if few or blocks or not isinstance(link, MonteCarlo) or isinstance(gaussian, Lumped):
            return gaussian
        labels = None if y is None else y.clamp(0, gaussian.mean.shape[1] - 1)
        return Lumped.of(gaussian, KEPT_CLASSES, GROUPS, y=labels, scale=scale)

    def losses(self, gaussian: LogitGaussian, y: Tensor, link: Link) -> Losses:
        """See `Likelihood.losses`."""
        found = self.condensed(gaussian, link, y)
        if not (isinstance(found, Lumped) and isinstance(link, MonteCarlo)):
            return super().losses(gaussian, y, link)
        place = found.position_of(y.clamp(0, found.classes.shape[1] + found.others.shape[1] - 1))
        # No softmax of all: the probability of one class needs the sum alone.
        parts = [
            _densities(found.rows(part), place[part], link) for part in slices(len(y), AT_ONCE)
        ]

        def at(temperature: float, scale: float) -> Tensor:
            return self.scored(-torch.cat([part(temperature, scale) for part in parts]), y)

        return at

    def uncertainty(
        self, gaussian: LogitGaussian, epistemic: LogitGaussian, link: Link, scale: float
    ) -> Uncertainty:
        """All scores.

        With many classes entropy and confidence are those of the probabilities, mutual
        information is that of the logits of `Lumped`, whose groups are shared out in fixed
        proportions, which adds nothing to it; the other scores are of all logits.
        """
        found = super().uncertainty(
            self.condensed(gaussian, link, scale=scale), epistemic, link, scale
        )
        return replace(
            found,
            energy=energy(gaussian),
            corrected_energy=corrected_energy(epistemic),
            max_logit_p_norm=max_logit_p_norm(gaussian),
        )

    def _of(self, log_probs: Tensor, y: Tensor) -> Tensor:
        index = y.clamp(0, log_probs.shape[-1] - 1).expand(log_probs.shape[:-1])
        return log_probs.gather(-1, index.unsqueeze(-1)).squeeze(-1)


def _densities(gaussian: Lumped, place: Tensor, link: MonteCarlo) -> Losses:
    """(T, τ) ↦ log of the averaged probability of the logit at a place (n,), float64."""
    drawn = gaussian.drawn(link.num_samples, link.seed)

    def at(temperature: float, scale: float) -> Tensor:
        if temperature == 0 and gaussian.outside is None:
            draws = gaussian.tempered(0.0, scale).mean.T.unsqueeze(0)
        else:
            draws = drawn(temperature, scale)
        index = place.expand(len(draws), 1, -1)
        each = draws.gather(1, index).squeeze(1) - draws.logsumexp(1)
        return each.double().logsumexp(0) - math.log(len(each))

    return at
