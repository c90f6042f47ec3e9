"""Links from the Gaussian over outputs to what is observed."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ella.arguments import SEED, settle, whole
from ella.predictive import LogitGaussian

DRAWS = whole(1, 2**20)
"""More draws than that change nothing but the memory they take."""

Response = Callable[[Tensor, int], Tensor]
"""What outputs say of an observation, such as softmax: `(outputs, axis of the outputs)`."""


class Link(ABC):
    """Averages a response over a Gaussian over outputs: E[softmax(f)], for example.

    Subclass it for an approximation of your own, and pass an object wherever a link is asked for.
    """

    @abstractmethod
    def __call__(self, gaussian: LogitGaussian, response: Response = torch.softmax) -> Tensor:
        """The averages of n examples, (n, c) or as wide as the response; probabilities sum to 1.

        Args:
            gaussian: Over the outputs.
            response: Such as `torch.softmax` or a likelihood's `response`.
        """

    def tempered(
        self, gaussian: LogitGaussian, response: Response = torch.softmax
    ) -> Callable[[float, float], Tensor]:
        """(T, τ) ↦ averages over `gaussian.tempered(T, τ)`, to be tried at many of them."""
        return lambda temperature, scale: self(gaussian.tempered(temperature, scale), response)


@dataclass(frozen=True)
class MonteCarlo(Link):
    r"""E[softmax(f)] by averaging over draws of f, exact as `num_samples` grows.

    Attributes:
        num_samples: Number of draws (antithetic pairs).
        seed: Seed of the draws; the same seed gives the same probabilities.

    Raises:
        ValueError: If `num_samples` is below 1.
    """

    num_samples: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        settle(self, num_samples=DRAWS, seed=SEED)

    def __call__(self, gaussian: LogitGaussian, response: Response = torch.softmax) -> Tensor:
        """See `Link`."""
        draws = gaussian.settled().compressed().draws(self.num_samples, self.seed)
        return response(draws, 1).mean(0).T.contiguous()

    def tempered(
        self, gaussian: LogitGaussian, response: Response = torch.softmax
    ) -> Callable[[float, float], Tensor]:
        """See `Link.tempered`, and `LogitGaussian.drawn`."""
        draws = gaussian.drawn(self.num_samples, self.seed)
        return lambda t, scale: response(draws(t, scale), 1).mean(0).T.contiguous()


@dataclass(frozen=True)
class Probit(Link):
    r"""The probit (mean-field) approximation: the response at :math:`m_c / \sqrt{1 + π/8 S_{cc}}`.

    Reference: Evidence for the generalized linear model: MacKay, The Evidence Framework Applied
    to Classification Networks (1992); multi-class form as in Laplace Redux (Daxberger et al.,
    2021), https://arxiv.org/abs/2106.14806
    """

    def __call__(self, gaussian: LogitGaussian, response: Response = torch.softmax) -> Tensor:
        """See `Link`."""
        return response(gaussian.mean / (1 + math.pi / 8 * gaussian.variance()).sqrt(), -1)


@dataclass(frozen=True)
class LaplaceBridge(Link):
    r"""The Laplace bridge: the mean of the Dirichlet matched to the Gaussian in softmax basis.

    :math:`α_j = \frac{1}{S_{jj}} (1 - \frac{2}{c} + \frac{e^{m_j}}{c^2} \sum_l e^{-m_l})`, with
    mean and covariance first projected onto the logits that sum to zero.

    Reference: Fast Predictive Uncertainty for Classification with Bayesian Deep Networks
    (Hobbhahn et al., 2022), https://arxiv.org/abs/2003.01227
    """

    def __call__(self, gaussian: LogitGaussian, response: Response = torch.softmax) -> Tensor:
        """See `Link`; the response is softmax, whatever is passed."""
        mean, covariance = gaussian.mean.double(), gaussian.covariance().double()
        c = mean.shape[-1]
        row_sum = covariance.sum(-1)
        total = row_sum.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
        mean = mean - row_sum * mean.sum(-1, keepdim=True) / total
        variance = covariance.diagonal(dim1=1, dim2=2) - row_sum.square() / total
        spread = torch.exp(mean + torch.logsumexp(-mean, -1, keepdim=True)) / c**2
        variance = variance.clamp_min(torch.finfo(torch.float32).eps)
        alpha = (1 - 2 / c + spread) / variance
        return (alpha / alpha.sum(-1, keepdim=True)).to(gaussian.mean.dtype)


LINKS: dict[str, type[Link]] = {"mc": MonteCarlo, "probit": Probit, "bridge": LaplaceBridge}


def make_link(link: str | Link, num_samples: int = 128, seed: int = 0) -> Link:
    """The link of that name: "mc", "probit" or "bridge"; a `Link` is what it is.

    Raises:
        ValueError: For another name, or `num_samples` below 1.
    """
    monte_carlo = MonteCarlo(num_samples, seed)
    if isinstance(link, Link):
        return link
    if not isinstance(link, str) or link not in LINKS:
        raise ValueError(f"`link` must be one of {tuple(LINKS)}, or a Link; got {link!r}.")
    return monte_carlo if link == "mc" else LINKS[link]()
