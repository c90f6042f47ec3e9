"""How good Gaussian predictions of real numbers are: numbers from (mean, variance, targets).

Shapes are (n, c), or (n,) for c = 1; nothing else is broadcast.
"""

import math
from statistics import NormalDist

from torch import Tensor

from ella.metrics._checked import Array, check_one_shape, columns


def gaussian_negative_log_likelihood(mean: Array, variance: Array, targets: Array) -> float:
    r"""Mean negative log density of independent Gaussian outputs, in nats an example.

    .. math:: \frac{1}{n} \sum_i \sum_c
        \frac{1}{2} \Big( \frac{(y_{ic} - m_{ic})^2}{s^2_{ic}} + \log 2π s^2_{ic} \Big)

    With targets, means and standard deviations divided by a, it is less by c · log a.

    Args:
        mean: m, shape (n, c) or (n,).
        variance: s², noise included, in the same shape.
        targets: y, in the same shape.

    Raises:
        TypeError: If an argument is neither a tensor nor a NumPy array; lists are refused.
        ValueError: If shapes differ, values are not finite, or a variance is not positive. The
            same for every regression metric here.
    """
    error, variances = _errors_and_variances(mean, variance, targets)
    log_normalizer = (2 * math.pi * variances).log()
    return 0.5 * (error.square() / variances + log_normalizer).sum(1).mean().item()


def root_mean_squared_error(mean: Array, targets: Array) -> float:
    r"""RMSE, :math:`\sqrt{\frac{1}{nc} \sum_i \sum_c (y_{ic} - m_{ic})^2}`, in units of y.

    Args:
        mean: m, shape (n, c) or (n,).
        targets: y, in the same shape.
    """
    return _errors(mean, targets).square().mean().sqrt().item()


def interval_coverage(mean: Array, variance: Array, targets: Array, level: float = 0.95) -> float:
    r"""Share of targets in the central interval :math:`m ± z s`; `level` if calibrated.

    z is the quantile of the standard normal distribution at (1 + level) / 2, and the interval is
    closed. With several outputs it is the share of all n · c targets.

    Args:
        mean: m, shape (n, c) or (n,).
        variance: s², noise included, in the same shape.
        targets: y, in the same shape.
        level: Probability of the interval, in (0, 1).

    Reference: Accurate Uncertainties for Deep Learning Using Calibrated Regression (Kuleshov et
    al., 2018), https://arxiv.org/abs/1807.00263
    """
    if not 0 < level < 1:
        raise ValueError(f"`level` must lie between 0 and 1, both excluded; got {level}.")
    error, variances = _errors_and_variances(mean, variance, targets)
    z = NormalDist().inv_cdf((1 + level) / 2)
    return (error.abs() <= z * variances.sqrt()).double().mean().item()


def _errors(mean: Array, targets: Array) -> Tensor:
    """The differences y - m, shape (n, c)."""
    predicted, observed = columns("mean", mean), columns("targets", targets)
    check_one_shape(mean=predicted, targets=observed)
    return observed - predicted


def _errors_and_variances(mean: Array, variance: Array, targets: Array) -> tuple[Tensor, Tensor]:
    """The differences y - m and the variances s², both (n, c)."""
    errors, variances = _errors(mean, targets), columns("variance", variance)
    check_one_shape(mean=errors, variance=variances)
    if (variances <= 0).any():
        raise ValueError(f"`variance` must be positive; got {variances.min().item():.3g}.")
    return errors, variances
