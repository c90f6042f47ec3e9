"""What another test set might have said: statistics of resampled examples."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

Statistic = Callable[..., Tensor]
"""How often each example of each data set counts, (n,), ↦ values of m methods, (m,); all float64.

With a count of 1 each it is the estimate.
"""

CHANCE = 3.0
"""Standard errors of the mean of resamples, up to which its bias may be none."""


@dataclass(frozen=True)
class Interval:
    """An estimate and where it would lie on other samples of the same data.

    Attributes:
        estimate: On the data themselves.
        low: Lower end.
        high: Upper end.
    """

    estimate: float
    low: float
    high: float

    @property
    def side(self) -> int:
        """−1 if all of it is below 0, 1 if all of it is above, 0 if 0 lies within."""
        return (self.low > 0) - (self.high < 0)


@dataclass(frozen=True)
class Bootstrap:
    """Resamples of data sets with replacement, n out of n, the same for all methods.

    The interval of a statistic θ has as ends the quantiles of θ* over the resamples, less the bias
    mean(θ*) − θ where that is more than chance. Means have none; calibration errors are larger on
    resamples than on the data, and the quantiles alone may then miss the estimate itself.

    Attributes:
        num_resamples: How many.
        level: Probability of an interval.
        seed: Of the resamples.

    Raises:
        ValueError: If a number is out of range.

    Reference: An Introduction to the Bootstrap (Efron & Tibshirani, 1993).
    """

    num_resamples: int = 1000
    level: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_resamples < 2:
            raise ValueError(f"`num_resamples` must be at least 2; got {self.num_resamples}.")
        if not 0 < self.level < 1:
            raise ValueError(f"`level` must lie between 0 and 1; got {self.level}.")

    def sampled(self, statistic: Statistic, *sizes: int) -> "Sampled":
        """A statistic on the data and on all resamples.

        Args:
            statistic: See `Statistic`.
            sizes: Of its data sets. The resamples of the first depend on its size and the seed
                alone, so that any two statistics of it are paired; the same for the second.
        """
        ones = [torch.ones(n, dtype=torch.float64) for n in sizes]
        resamples = zip(*(self.counts(n, i) for i, n in enumerate(sizes)), strict=True)
        values = torch.stack([statistic(*counts) for counts in resamples])
        return Sampled(statistic(*ones), values, self.level)

    def counts(self, n: int, stream: int = 0) -> Iterator[Tensor]:
        """How often each of n examples is in a resample, (n,), one resample after another."""
        generator = torch.Generator().manual_seed(self.seed + (stream << 32))
        for _ in range(self.num_resamples):
            yield torch.bincount(torch.randint(n, (n,), generator=generator), minlength=n).double()


@dataclass(frozen=True)
class Sampled:
    """A statistic of m methods on the data and on B resamples.

    Attributes:
        estimates: On the data, shape (m,).
        values: On the resamples, shape (B, m).
        level: Probability of an interval.
    """

    estimates: Tensor
    values: Tensor
    level: float

    def interval(self, method: int) -> Interval:
        """Of one method."""
        return self._interval(self.estimates[method], self.values[:, method])

    def difference(self, method: int, reference: int) -> Interval:
        """Of one method less another, on the same resamples."""
        return self._interval(
            self.estimates[method] - self.estimates[reference],
            self.values[:, method] - self.values[:, reference],
        )

    def _interval(self, estimate: Tensor, values: Tensor) -> Interval:
        ends = torch.tensor([(1 - self.level) / 2, (1 + self.level) / 2], dtype=torch.float64)
        bias, chance = values.mean() - estimate, CHANCE * values.std() / len(values) ** 0.5
        low, high = torch.quantile(values, ends) - (bias if bias.abs() > chance else 0)
        return Interval(estimate.item(), low.item(), high.item())
