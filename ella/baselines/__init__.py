"""Baselines behind ELLA's own `fit` / `calibrate` / `predict_proba`, or `logits` for regression.

Every method is tuned by the same search on the same validation likelihood: laplace-torch's own
grid search never resets its metric and picks wrong precisions.
"""

from ella.baselines.kronecker import KroneckerLaplace
from ella.baselines.kronecker_layer import LastLayerKronecker
from ella.baselines.last_layer import LastLayerLaplace
from ella.baselines.nystrom import NystromLaplace
from ella.baselines.scaling import MAP, TemperatureScaling

__all__ = [
    "MAP",
    "KroneckerLaplace",
    "LastLayerKronecker",
    "LastLayerLaplace",
    "NystromLaplace",
    "TemperatureScaling",
]
