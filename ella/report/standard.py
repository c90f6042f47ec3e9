"""The methods that everybody should compare first."""

from typing import Any

from torch import nn

from ella.baselines import MAP, TemperatureScaling
from ella.batches import Loader
from ella.distance import Distance
from ella.eigenfunctions import EigenfunctionMethod
from ella.estimator import ELLA
from ella.predictor import Predictor


def standard_methods(
    model: nn.Module,
    train_loader: Loader,
    val_loader: Loader,
    *,
    eigenfunctions: EigenfunctionMethod | None = None,
    distance: Distance | None = None,
    **options: Any,  # noqa: ANN401 - of `Predictor`
) -> dict[str, Predictor]:
    """Fit and calibrate MAP, temperature scaling and ELLA.

    Args:
        model: Trained classifier; it stays as it is.
        train_loader: See `ELLA.fit`.
        val_loader: See `ELLA.calibrate`: data that the model was not trained on.
        eigenfunctions: See `ELLA`.
        distance: If given, "ELLA with distance" comes as a fourth.
        options: For all of them: `likelihood`, `output`, `split`, `seed`, `progress`.

    Returns:
        The methods by name, as `evaluate` takes them.

    Raises:
        TypeError: If the loaders, the labels or an option have the wrong form.
        ValueError: If a value is bad.
    """
    methods: dict[str, Predictor] = {
        "MAP": MAP(model, **options),
        "temperature scaling": TemperatureScaling(model, **options),
        "ELLA": ELLA(model, eigenfunctions=eigenfunctions, **options),
    }
    if distance is not None:
        methods["ELLA with distance"] = ELLA(
            model, eigenfunctions=eigenfunctions, distance=distance, **options
        )
    for method in methods.values():
        method.fit(train_loader).calibrate(val_loader)
    return methods
