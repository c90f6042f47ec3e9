"""The spectral core: leading eigenfunctions of a kernel operator. It knows no classifier.

Function values have shape (n, c, k): n examples, c outputs, k eigenfunctions. A scalar kernel has
c = 1. The inner product is the mean over examples, summed over outputs.
"""

from ella.spectral.networks import ResidualMLP
from ella.spectral.nystrom import leading_eigenpairs, numerical_eigenpairs
from ella.spectral.objectives import NestedLoRA, NeuralEFObjective, Objective, Regression
from ella.spectral.operators import RBF, FeatureKernel, Kernel, KernelOperator, Polynomial, Teacher
from ella.spectral.ritz import Moments, rayleigh_ritz
from ella.spectral.train import Training, train

__all__ = [
    "RBF",
    "FeatureKernel",
    "Kernel",
    "KernelOperator",
    "Moments",
    "NestedLoRA",
    "NeuralEFObjective",
    "Objective",
    "Polynomial",
    "Regression",
    "ResidualMLP",
    "Teacher",
    "Training",
    "leading_eigenpairs",
    "numerical_eigenpairs",
    "rayleigh_ritz",
    "train",
]
