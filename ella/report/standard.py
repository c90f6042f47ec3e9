"""The methods that everybody should compare first."""

from torch import nn

from ella.baselines import MAP, TemperatureScaling
from ella.batches import Loader, Split
from ella.distance import Distance
from ella.eigenfunctions import EigenfunctionMethod
from ella.estimator import ELLA
from ella.likelihoods import Likelihood, Normal, as_likelihood
from ella.outputs import Output
from ella.predictor import Predictor
from ella.report.examples import SCALING
from ella.report.real import TUNED


def standard_methods(
    model: nn.Module,
    train_loader: Loader,
    val_loader: Loader,
    *,
    eigenfunctions: EigenfunctionMethod | None = None,
    distance: Distance | None = None,
    likelihood: str | Likelihood = "classification",
    output: Output = None,
    split: Split | None = None,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Predictor]:
    """Fit and calibrate MAP, temperature scaling (for real targets the noise alone) and ELLA.

    Args:
        model: Trained classifier or regressor; it stays as it is.
        train_loader: See `ELLA.fit`.
        val_loader: See `ELLA.calibrate`: data that the model was not trained on.
        eigenfunctions: See `ELLA`.
        distance: If given, "ELLA with distance" comes as a fourth.
        likelihood: See `Predictor`, as for the rest; the same for all methods.
        output: Where the logits are.
        split: Tells inputs and labels apart.
        seed: Of everything random.
        progress: Whether to show progress bars.

    Returns:
        The methods by name, as `evaluate` takes them. For real targets the second, σ² tuned, is
        "MAP, noise tuned". Errors are those of `fit` and `calibrate`.
    """
    scaling = TUNED if isinstance(as_likelihood(likelihood), Normal) else SCALING
    methods: dict[str, Predictor] = {
        name: kind(model, likelihood=likelihood, output=output, split=split)
        for name, kind in (("MAP", MAP), (scaling, TemperatureScaling))
    }
    terms = {"ELLA": None} if distance is None else {"ELLA": None, "ELLA with distance": distance}
    for name, term in terms.items():
        methods[name] = ELLA(
            model,
            likelihood=likelihood,
            eigenfunctions=eigenfunctions,
            distance=term,
            output=output,
            split=split,
        )
    return {
        name: _calibrated(method, train_loader, val_loader, seed, progress)
        for name, method in methods.items()
    }


def _calibrated(
    method: Predictor, train_loader: Loader, val_loader: Loader, seed: int, progress: bool
) -> Predictor:
    method.seed, method.progress = seed, progress
    return method.fit(train_loader).calibrate(val_loader)
