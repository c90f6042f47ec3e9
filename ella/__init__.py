"""ella: calibrated, uncertainty-aware predictions from any trained PyTorch classifier.

Axes, everywhere: n examples, c outputs (classes), k eigenfunctions, p parameters.
"""

from ella import metrics, report
from ella.activations import FeatureTaps, Tap
from ella.choosing import choose_taps
from ella.distance import Distance
from ella.eigenfunctions import LastLayer, NeuralEF, Nystrom, Perturb, PerturbTokens
from ella.estimator import ELLA
from ella.evaluated import Evaluated
from ella.hyperparameters import Hyperparameters, Tuning
from ella.likelihoods import Bernoulli, Categorical, Discrete, Likelihood, Normal
from ella.linearize import Linearized
from ella.links import LaplaceBridge, Link, MonteCarlo, Probit
from ella.network import Network
from ella.predictions import NotFittedError, Predictive
from ella.predictive import LogitGaussian
from ella.predictor import ModelChangedError, Predictor
from ella.saving import State
from ella.scores import Uncertainty, entropy
from ella.spectral import NestedLoRA, NeuralEFObjective, Training

__all__ = [
    "ELLA",
    "Bernoulli",
    "Categorical",
    "Discrete",
    "Distance",
    "Evaluated",
    "FeatureTaps",
    "Hyperparameters",
    "LaplaceBridge",
    "LastLayer",
    "Likelihood",
    "Linearized",
    "Link",
    "LogitGaussian",
    "ModelChangedError",
    "MonteCarlo",
    "NestedLoRA",
    "Network",
    "NeuralEF",
    "NeuralEFObjective",
    "Normal",
    "NotFittedError",
    "Nystrom",
    "Perturb",
    "PerturbTokens",
    "Predictive",
    "Predictor",
    "Probit",
    "State",
    "Tap",
    "Training",
    "Tuning",
    "Uncertainty",
    "choose_taps",
    "entropy",
    "metrics",
    "report",
]


def __getattr__(name: str) -> str:
    """`__version__`, looked up when it is asked for: reading metadata takes milliseconds."""
    if name != "__version__":
        raise AttributeError(f"module 'ella' has no attribute {name!r}")
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("ella-laplace")
    except PackageNotFoundError:  # a source tree on the path, not installed
        return "0+unknown"
