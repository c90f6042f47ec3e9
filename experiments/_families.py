"""The methods of the CIFAR-10 study in `_suite.py`."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from _settings import option
from _store import ProjectedOnce, SampledOnce
from _suite import Family, Network, StudySettings, Tune, keep, tune
from torch import Tensor

from ella import ELLA, Evaluated, NeuralEF, Nystrom, Predictor, Training
from ella.baselines import (
    KroneckerLaplace,
    LastLayerLaplace,
    NystromLaplace,
    TemperatureScaling,
)
from ella.metrics import negative_log_likelihood

PAPER_PRECISION = 25.0
"""δ of the ELLA paper on CIFAR-10."""


@dataclass(frozen=True)
class MethodSettings(StudySettings):
    """Sizes of the study with its methods.

    Attributes:
        slow: Whether to add what takes hours without a GPU.
        fit_slow_on: Training images for G, for methods that need exact Jacobians.
        num_rows: Rows of Nyström.
    """

    slow: bool = option(False, "add what takes hours without a GPU")
    fit_slow_on: int = option(50_000, "for exact Jacobians")
    num_rows: int = option(2000, "rows of Nyström")


QUIET: dict[str, Any] = {"progress": False}


def families(settings: MethodSettings) -> list[Family]:
    """All methods that were asked for."""
    return [*cheap(settings), *(exact_products(settings) if settings.slow else [])]


def neural_ef(settings: StudySettings) -> NeuralEF:
    """Of the study's size."""
    method = NeuralEF(num_inputs=settings.num_inputs, num_directions=settings.num_directions)
    if settings.smoke:
        short = Training(steps=30, batch_size=32)
        method = replace(method, rank=4, num_directions=16, width=16, teacher=short)
    return method


def scaling(network: Network) -> Predictor:
    """The network itself, or with a temperature."""
    return TemperatureScaling(network.body, **QUIET)


def cheap(settings: MethodSettings) -> list[Family]:
    """Methods that need no Jacobian to predict."""

    def last_layer(structure: str) -> Callable[[Network], Predictor]:
        return lambda network: LastLayerLaplace(network.body, structure=structure, **QUIET)

    def neural(residual: str) -> Callable[[Network], Predictor]:
        def make(network: Network) -> Predictor:
            method = replace(neural_ef(settings), residual=residual)
            found = SampledOnce(method, network.stores[0])
            return ELLA(network.model, eigenfunctions=found, **QUIET)

        return make

    count = settings.fit_on
    return [
        Family(scaling, {"MAP": keep, "temperature scaling": tune}, count),
        Family(last_layer("full"), {"last-layer Laplace, full": tune}, count),
        Family(last_layer("kron"), {"last-layer Laplace, Kronecker": tune}, count),
        Family(neural("diag"), {"ELLA, NeuralEF": tune}, count),
        Family(neural("factor"), {"ELLA, NeuralEF, factor": tune}, count),
    ]


def exact_products(settings: MethodSettings) -> list[Family]:
    """Methods that need Jacobians of every image."""
    rank, few = (6, 4) if settings.smoke else (64, 20)
    exact = Nystrom(rank, settings.num_rows, residual="exact")

    def nystrom(k: int, residual: str) -> Callable[[Network], Predictor]:
        def make(network: Network) -> Predictor:
            found = ProjectedOnce(exact, k, network.stores[0], residual)
            return ELLA(network.model, eigenfunctions=found, **QUIET)

        return make

    def published(network: Network) -> Predictor:
        return NystromLaplace(network.model, rank=few, subsample=settings.num_rows, **QUIET)

    def kronecker(network: Network) -> Predictor:
        return KroneckerLaplace(network.model, **QUIET)

    def paper(method: Evaluated, rows: Tensor, labels: Tensor) -> Evaluated:
        return stopped_early(method, rows, labels, settings.fit_slow_on)

    both = {
        "ELLA, Nyström k = 20, as in the paper": paper,
        "ELLA, Nyström k = 20, no residual": tune,
    }
    made: list[tuple[Callable[[Network], Predictor], dict[str, Tune]]] = [
        (nystrom(few, "none"), both),
        (nystrom(few, "diag"), {"ELLA, Nyström k = 20": tune}),
        (nystrom(rank, "diag"), {"ELLA, Nyström k = 64": tune}),
        (nystrom(rank, "exact"), {"ELLA, Nyström k = 64, full residual": tune}),
        (published, {"laplace-torch ELLA, k = 20": tune}),
        (kronecker, {"Kronecker Laplace, all weights": tune}),
    ]
    return [Family(make, names, settings.fit_slow_on, slow=True) for make, names in made]


def stopped_early(
    method: Evaluated, rows: Tensor, labels: Tensor, fitted_on: int, num_train: int = 50_000
) -> Evaluated:
    """The paper's choice: how many examples n to stop after, by validation NLL, at δ = 25.

    It scales the prior by n/N on the way, so stopping is tempering: with G summed over m of N
    examples, :math:`S = (m/n) φ (G + δ m/N)^{-1} φ^T` (G growing evenly).
    """
    start = method.hyperparameters
    assert start is not None
    scores = {}
    for n in range(1000, num_train + 1, 1000):
        precision = PAPER_PRECISION * fitted_on / num_train
        method.hyperparameters = replace(
            start, prior_precision=precision, temperature=fitted_on / n, logit_temperature=1.0
        )
        scores[n] = negative_log_likelihood(method.predict_proba([rows], n_samples=64), labels)
    best = min(scores, key=lambda n: scores[n])
    assert method.hyperparameters is not None
    method.hyperparameters = replace(method.hyperparameters, temperature=fitted_on / best)
    return method
