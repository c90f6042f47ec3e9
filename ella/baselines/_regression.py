"""What regression adds to the baselines: an argument to check."""

from ella.inputs import check_positive


def check_noise_variance(likelihood: str, value: float | None) -> None:
    """Raise a `ValueError` unless σ² is None, or above 0 and the likelihood is a Gaussian."""
    if value is None:
        return
    check_positive("noise_variance", value)
    if likelihood != "regression":
        raise ValueError('`noise_variance` is for likelihood="regression".')
