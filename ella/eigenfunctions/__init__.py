"""Three ways to the eigenfunctions of the neural tangent kernel, behind one interface."""

from ella.eigenfunctions.augmentation import Augmentation, Perturb
from ella.eigenfunctions.base import EigenfunctionMethod, Eigenfunctions
from ella.eigenfunctions.last_layer import LastLayer, LastLayerFeatures
from ella.eigenfunctions.neural_features import NeuralFeatures
from ella.eigenfunctions.neuralef import NeuralEF
from ella.eigenfunctions.nystrom import JacobianProjection, Nystrom
from ella.eigenfunctions.sample import KernelSample
from ella.eigenfunctions.tokens import PerturbTokens

__all__ = [
    "Augmentation",
    "EigenfunctionMethod",
    "Eigenfunctions",
    "JacobianProjection",
    "KernelSample",
    "LastLayer",
    "LastLayerFeatures",
    "NeuralEF",
    "NeuralFeatures",
    "Nystrom",
    "Perturb",
    "PerturbTokens",
]
