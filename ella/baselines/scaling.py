"""The model itself, and the model with one number tuned: no posterior at all."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ella.baselines._regression import check_noise_variance
from ella.curvature import noise_variance_of
from ella.inputs import (
    Inputs,
    batches,
    check_class_labels,
    check_inputs,
    check_real_targets,
)
from ella.predictive import LogitGaussian
from ella.predictor import Hyperparameters, Predictor

if TYPE_CHECKING:
    from typing_extensions import Self


class _Deterministic(Predictor):
    """A Gaussian over logits with no variance."""

    def __init__(
        self,
        model: nn.Module,
        *,
        likelihood: str = "classification",
        noise_variance: float | None = None,
        seed: int = 0,
        progress: bool = True,
    ) -> None:
        super().__init__(model, likelihood=likelihood, seed=seed, progress=progress)
        check_noise_variance(likelihood, noise_variance)
        self.noise_variance = noise_variance

    def fit(self, train_loader: Iterable[Any]) -> "Self":
        """Check the first batch and the model's outputs for it; nothing is learned but σ².

        Raises:
            TypeError: If the loader, the labels or the model's outputs have the wrong form.
            ValueError: If the first batch is bad, or, for regression, any batch.
        """
        noise_variance = self.noise_variance or 1.0
        if self.likelihood == "regression" and self.noise_variance is None:
            noise_variance = noise_variance_of(
                lambda x: evaluate(self.model, x), train_loader, self._device
            )
        else:
            self._check_first_batch(train_loader)
        self.hyperparameters = Hyperparameters(prior_precision=1.0, noise_variance=noise_variance)
        self.tuning = None
        return self

    def _check_first_batch(self, loader: Iterable[Any]) -> None:
        x, y = next(batches(loader, self._device))
        num_outputs = evaluate(self.model, x).shape[1]
        assert y is not None
        if self.likelihood == "classification":
            check_class_labels(y, num_outputs)
        else:
            check_real_targets(y, num_outputs)

    @property
    def state_bytes(self) -> int:
        """Bytes beyond the model: 0."""
        return 0

    def _evaluate(self, x: Inputs) -> tuple[Tensor | None, ...]:
        return (evaluate(self.model, x),)

    def _gaussian(
        self, evaluation: tuple[Tensor | None, ...], prior_precision: float
    ) -> LogitGaussian:
        (logits,) = evaluation
        assert logits is not None
        return LogitGaussian(logits, logits.new_zeros(*logits.shape, 0))

    def _precisions(self, evaluation: tuple[Tensor | None, ...]) -> list[float]:
        return []


class MAP(_Deterministic):
    """The trained model as it is: softmax of its logits, or N(f(x), σ²) for regression.

    It has nothing to choose: `calibrate` does nothing, and does not read its data.

    Args:
        model: Maps x to logits (n, c).
        likelihood: "classification" or "regression".
        noise_variance: σ² for regression; None takes the training residuals' mean square.
        seed: Not used; every method has one.
        progress: Whether to show progress bars.
    """

    @property
    def _tunable(self) -> bool:
        return False


class TemperatureScaling(_Deterministic):
    """softmax(f(x) / τ), with τ chosen by `calibrate`; until then τ = 1, the MAP.

    For regression it is N(f(x), σ²) with σ² chosen by `calibrate`.

    Reference: On Calibration of Modern Neural Networks (Guo et al., 2017),
    https://arxiv.org/abs/1706.04599

    Args:
        model: Maps x to logits (n, c).
        likelihood: "classification" or "regression".
        noise_variance: σ² until `calibrate`; None takes the training residuals' mean square.
        seed: Not used; every method has one.
        progress: Whether to show progress bars.
    """


def evaluate(model: nn.Module, x: Inputs) -> Tensor:
    """Logits f(x) of shape (n, c), in eval mode; works without trainable weights, too.

    Raises:
        TypeError: If the model does not return a tensor or an object with `.logits`.
        ValueError: If the outputs are not (n, c), or not finite.
    """
    device = next((t.device for t in [*model.parameters(), *model.buffers()]), torch.device("cpu"))
    n = check_inputs(x, device)
    with _eval_mode(model), torch.no_grad():
        if isinstance(x, Tensor):
            outputs = model(x)
        elif isinstance(x, Mapping):
            outputs = model(**x)
        else:
            outputs = model(*x)
    outputs = getattr(outputs, "logits", outputs)
    if not isinstance(outputs, Tensor):
        raise TypeError(
            f"`model` must return a tensor of logits, or an object with `.logits`; got "
            f"{type(outputs).__name__}."
        )
    if outputs.ndim != 2 or len(outputs) != n:
        raise ValueError(
            f"`model` must return logits of shape (n, c) with n = {n}; got {tuple(outputs.shape)}."
        )
    if not torch.isfinite(outputs).all():
        raise ValueError("`model` returned NaN or infinite logits. Check its weights and inputs.")
    return outputs


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
