"""How good predictions are: numbers from probabilities, uncertainty scores or Gaussians.

Calibration errors come from netcal, rank statistics from scikit-learn and the diagram from
matplotlib: those need the extra `metrics`, the others nothing. Every argument may be a tensor, on
any device and with or without a graph, a NumPy array, or what turns into one (a pandas Series or
DataFrame). Predictions come first and labels second, which is not scikit-learn's order. The
numbers are computed in float64.
"""

from ella.metrics._checked import ROW_SUM_TOLERANCE
from ella.metrics.calibration import (
    adaptive_calibration_error,
    classwise_calibration_error,
    expected_calibration_error,
    maximum_calibration_error,
)
from ella.metrics.classification import (
    accuracy,
    binary_negative_log_likelihood,
    brier,
    cross_entropy_to,
    divergence_from,
    evaluate,
    negative_log_likelihood,
)
from ella.metrics.detection import aupr, auroc, fpr_at_95_tpr
from ella.metrics.regression import (
    gaussian_negative_log_likelihood,
    interval_coverage,
    root_mean_squared_error,
)
from ella.metrics.reliability import reliability_diagram
from ella.metrics.selection import area_under_risk_coverage, risk_coverage

__all__ = [
    "ROW_SUM_TOLERANCE",
    "accuracy",
    "adaptive_calibration_error",
    "area_under_risk_coverage",
    "aupr",
    "auroc",
    "binary_negative_log_likelihood",
    "brier",
    "classwise_calibration_error",
    "cross_entropy_to",
    "divergence_from",
    "evaluate",
    "expected_calibration_error",
    "fpr_at_95_tpr",
    "gaussian_negative_log_likelihood",
    "interval_coverage",
    "maximum_calibration_error",
    "negative_log_likelihood",
    "reliability_diagram",
    "risk_coverage",
    "root_mean_squared_error",
]
