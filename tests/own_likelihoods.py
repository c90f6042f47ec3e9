"""Two likelihoods as a user would add them: from outside the package, on its public names."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ella import Discrete, Likelihood, LogitGaussian, Uncertainty


class Poisson(Likelihood):
    """Counts with rate exp(f), one for each output: Λ = diag(exp(f))."""

    def check(self, y, num_outputs):
        y = y.unsqueeze(-1) if y.ndim == 1 else y
        if y.ndim != 2 or y.shape[1] != num_outputs or (y < 0).any() or (y != y.round()).any():
            raise ValueError(f"Counts must be whole numbers of shape (n, {num_outputs}).")
        return y.double()

    def log_density(self, outputs, y):
        return (y * outputs - outputs.exp() - torch.lgamma(y + 1)).sum(-1)

    def whitened(self, outputs, phi):
        return outputs.double().div(2).exp().unsqueeze(-1) * phi

    def response(self, outputs, dim):
        return outputs.exp()

    def uncertainty(self, gaussian: LogitGaussian, epistemic: LogitGaussian, link, scale):
        rate, spread = self.predictive(gaussian, link), epistemic.variance()
        entropy = 0.5 * (2 * math.pi * math.e * (rate + rate.square() * spread)).log()
        return Uncertainty(
            entropy.sum(-1), 0.5 * torch.log1p(rate * spread).sum(-1), spread.mean(-1)
        )


@dataclass(frozen=True)
class Ordinal(Discrete):
    """Ordered grades: one output f, and p(y ≤ j) = sigmoid(cuts_j − f)."""

    cuts: tuple[float, ...] = (-1.0, 0.5, 1.5)

    def check(self, y, num_outputs):
        if num_outputs != 1 or y.ndim != 1 or y.min() < 0 or y.max() > len(self.cuts):
            raise ValueError(f"Grades must lie in 0..{len(self.cuts)}, for a model of one output.")
        return y.long()

    def response(self, outputs: Tensor, dim: int) -> Tensor:
        below = (outputs.new_tensor(self.cuts) - outputs.movedim(dim, -1)).sigmoid()
        ends = below.new_zeros(*below.shape[:-1], 1)
        return torch.cat([ends, below, ends + 1], -1).diff(dim=-1).movedim(-1, dim)

    def log_density(self, outputs, y):
        probs = self.response(outputs, -1)
        index = y.expand(probs.shape[:-1]).unsqueeze(-1)
        return probs.gather(-1, index).squeeze(-1).clamp_min(1e-300).log()

    def whitened(self, outputs, phi):
        # The expected curvature Σ_j p_j'² / p_j, which is never negative.
        def slopes(f):
            return self.response(f, -1)

        wide = outputs.double()
        probs, slope = torch.func.jvp(slopes, (wide,), (torch.ones_like(wide),))
        return (slope / probs.clamp_min(1e-12).sqrt()).unsqueeze(-1) * phi
