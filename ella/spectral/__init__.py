"""The spectral core: leading eigenfunctions of a kernel operator. It knows no classifier.

Function values have shape (n, c, k): n examples, c outputs, k eigenfunctions. A scalar kernel has
c = 1. The inner product is the mean over examples, summed over outputs.
"""

from ella.spectral.eigenbasis import Eigenbasis, learn_eigenbasis, ritz_basis, ritz_head
from ella.spectral.laplacian import Jet
from ella.spectral.losses import Loss, Regression, SpectralLoss, least_squares
from ella.spectral.networks import LinearHead, ParallelMLP, ResidualMLP, SideBySide
from ella.spectral.nystrom import NystromBasis, leading_eigenpairs, numerical_eigenpairs
from ella.spectral.objectives import (
    NestedLoRA,
    NeuralEFObjective,
    Objective,
    TraceObjective,
)
from ella.spectral.operators import (
    RBF,
    FeatureKernel,
    Graph,
    Kernel,
    KernelOperator,
    Polynomial,
)
from ella.spectral.problems import (
    Pair,
    Population,
    Problem,
    Samples,
    Schrodinger,
    Views,
    WholeGraph,
    halves,
    whole,
)
from ella.spectral.ritz import Moments, feature_ritz, rayleigh_ritz
from ella.spectral.train import Training, train

__all__ = [
    "RBF",
    "Eigenbasis",
    "FeatureKernel",
    "Graph",
    "Jet",
    "Kernel",
    "KernelOperator",
    "LinearHead",
    "Loss",
    "Moments",
    "NestedLoRA",
    "NeuralEFObjective",
    "NystromBasis",
    "Objective",
    "Pair",
    "ParallelMLP",
    "Polynomial",
    "Population",
    "Problem",
    "Regression",
    "ResidualMLP",
    "Samples",
    "Schrodinger",
    "SideBySide",
    "SpectralLoss",
    "TraceObjective",
    "Training",
    "Views",
    "WholeGraph",
    "feature_ritz",
    "halves",
    "leading_eigenpairs",
    "learn_eigenbasis",
    "least_squares",
    "numerical_eigenpairs",
    "rayleigh_ritz",
    "ritz_basis",
    "ritz_head",
    "train",
    "whole",
]
