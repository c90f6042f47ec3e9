"""ella: calibrated, uncertainty-aware predictions from any trained PyTorch classifier.

Axes, everywhere: n examples, c outputs (classes), k eigenfunctions, p parameters.
"""

from importlib.metadata import PackageNotFoundError, version

from ella import metrics
from ella.calibrate import Tuning
from ella.eigenfunctions import LastLayer, NeuralEF, Nystrom, Perturb
from ella.estimator import ELLA
from ella.inputs import NotFittedError
from ella.predictive import LogitGaussian, Uncertainty
from ella.predictor import Hyperparameters, Predictor
from ella.spectral import NestedLoRA, NeuralEFObjective, Training

try:
    __version__ = version("ella")
except PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "0+unknown"

__all__ = [
    "ELLA",
    "Hyperparameters",
    "LastLayer",
    "LogitGaussian",
    "NestedLoRA",
    "NeuralEF",
    "NeuralEFObjective",
    "NotFittedError",
    "Nystrom",
    "Perturb",
    "Predictor",
    "Training",
    "Tuning",
    "Uncertainty",
    "metrics",
]
