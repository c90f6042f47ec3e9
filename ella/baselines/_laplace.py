"""Running laplace-torch without letting it touch the user's model or random numbers."""

import importlib
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ella.arguments import BYTES, POSITIVE
from ella.batches import Batches, Loader, Split
from ella.inputs import Inputs
from ella.likelihoods import Categorical, Likelihood, Normal
from ella.linearize import DEFAULT_MEMORY_BUDGET, Linearized
from ella.outputs import Output
from ella.predictions import NotFittedError
from ella.predictor import Predictor
from ella.processes import Processes

if TYPE_CHECKING:
    from typing_extensions import Self


class LaplaceBaseline(Predictor):
    """What the laplace-torch baselines share: one `fit` that assigns only when it succeeded.

    Args:
        model: Maps x to logits (n, c).
        likelihood: "classification" or "regression", or `Categorical()` or a `Normal`.
        prior_precision: δ until `calibrate` chooses one.
        noise_variance: σ² for regression; None takes the training residuals' mean square.
        output: See `Predictor`.
        split: See `Predictor`.
        memory_budget: Bytes of working memory for Jacobian products.
        seed: Seed of everything random.
        progress: Whether to show progress bars.

    Raises:
        ValueError: If an argument is out of range, or laplace-torch lacks the likelihood.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        likelihood: str | Likelihood = "classification",
        prior_precision: float = 1.0,
        noise_variance: float | None = None,
        output: Output = None,
        split: Split | None = None,
        memory_budget: int = DEFAULT_MEMORY_BUDGET,
        seed: int = 0,
        progress: bool = True,
    ) -> None:
        self.prior_precision: float = POSITIVE("prior_precision", prior_precision)
        self.memory_budget = BYTES("memory_budget", memory_budget)
        super().__init__(
            model,
            likelihood=likelihood,
            noise_variance=noise_variance,
            output=output,
            split=split,
            seed=seed,
            progress=progress,
        )
        if not (self.likelihood == Categorical() or isinstance(self.likelihood, Normal)):
            raise ValueError(
                f"laplace-torch has no likelihood like {self.likelihood!r}; use "
                f'"classification" or "regression".'
            )

    def fit(self, train_loader: Loader) -> "Self":
        """Compute the curvature on the training data; calling it again starts again.

        For regression without a noise variance the data are first gone through for the residuals.

        Raises:
            ImportError: If laplace-torch or one of its backends is missing.
            TypeError: If the loader, the labels or the model have the wrong form.
            ValueError: If a batch, a label or a setting is bad, or several processes have a part
                of the data each, which laplace-torch knows nothing of.
        """
        require_baselines()
        if Processes(self.process_group).size > 1:
            raise ValueError(
                f"{type(self).__name__} is fitted by laplace-torch, in one process with all the "
                f"data. Give it a process group of its own, as its attribute `process_group`."
            )
        linearized = Linearized(self.network, memory_budget=self.memory_budget)
        with self._labelled_batches(train_loader).named() as batches, torch.inference_mode(False):
            scale = self._initial_scale(batches)
            assign = self._fit(linearized, batches)
        assign()
        self._set_fitted(self._started(float(self.prior_precision), scale))
        return self

    @abstractmethod
    def _fit(self, linearized: Linearized, batches: Batches) -> Callable[[], None]:
        """Do all the work, at σ² = 1; return what stores its result in `self`, and cannot fail.

        Args:
            linearized: The model.
            batches: Training data.
        """

    @property
    def _name(self) -> str:
        """What laplace-torch calls the likelihood."""
        return "regression" if isinstance(self.likelihood, Normal) else "classification"

    def _checked_batches(
        self, linearized: Linearized, batches: Batches, what: str
    ) -> Iterator[tuple[Inputs, Tensor]]:
        """Batches whose labels are checked against the number of outputs; real ones (n, c)."""
        for x, y in self._progress_over(batches.labelled(), what):
            y = self.likelihood.check(y, linearized.num_outputs(x))
            yield x, y.to(linearized.dtype) if y.is_floating_point() else y

    def _unfitted(self) -> NotFittedError:
        name = type(self).__name__
        return NotFittedError(f"This {name} is not fitted. Call {name}.fit(train_loader) first.")


class LaplaceLoader:
    """A loader in the form laplace-torch wants: re-iterable, with `len(loader.dataset)`.

    Args:
        make: Returns a new iterator over (x, y).
        num_examples: How many examples it yields in total; laplace-torch scales by it.
    """

    def __init__(
        self, make: Callable[[], Iterable[tuple[Tensor, Tensor]]], num_examples: int
    ) -> None:
        self.make = make
        self.dataset = range(num_examples)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.make())


def require_baselines() -> None:
    """Raise an `ImportError` that says what to install unless laplace-torch can be imported."""
    try:
        for name in ("laplace", "backpack", "curvlinops"):
            importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"The Laplace baselines need laplace-torch and its backends ({error}): "
            f'pip install "ella-laplace[baselines]".'
        ) from error


def fit_laplace(
    model: nn.Module,
    loader: Any,  # noqa: ANN401 - LaplaceLoader or DataLoader
    *,
    likelihood: str,
    backend: str,
    rng_seed: int,
    **settings: Any,  # noqa: ANN401
) -> Any:  # noqa: ANN401 - one of laplace-torch's classes
    """Fit laplace-torch at δ = σ² = 1. `model` must be a copy: it is changed.

    Args:
        model: A copy of the user's model, or of a part of it.
        loader: Training data.
        likelihood: "classification" or "regression".
        backend: Name in `laplace.curvature`.
        rng_seed: Seed of the global random numbers that laplace-torch may use.
        settings: Passed on to `laplace.Laplace`.
    """
    from laplace import Laplace, curvature

    with isolated(rng_seed), warnings.catch_warnings():
        # BackPACK's hooks sit on a layer whose inputs are data.
        warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)
        laplace: Any = Laplace(model, likelihood, backend=getattr(curvature, backend), **settings)
        laplace.fit(loader)
    return laplace


@contextmanager
def isolated(seed: int) -> Iterator[None]:
    """Autograd on, the global random state forked and seeded, and no way to end the process.

    Raises:
        RuntimeError: If laplace-torch, whose `symeig` calls `exit()`, gives up.
    """
    devices = list(range(torch.cuda.device_count()))
    try:
        with (
            torch.random.fork_rng(devices=devices),
            torch.inference_mode(False),
            torch.enable_grad(),
        ):
            torch.manual_seed(seed)
            yield
    except SystemExit as error:
        raise RuntimeError(
            "laplace-torch could not eigendecompose the curvature. Check the model's weights for "
            "extreme values, or convert it with model.double()."
        ) from error


def require_full_precision(linearized: Linearized) -> None:
    """Raise a `TypeError` for half precision, which eigendecompositions do not support."""
    if (dtype := linearized.network.dtype) not in (torch.float32, torch.float64):
        raise TypeError(
            f"This baseline needs a float32 or float64 model; got {dtype}. Convert it "
            f"with model.float()."
        )


def require_tensor(x: Inputs) -> Tensor:
    """`x` if it is one tensor, all that laplace-torch takes here."""
    if not isinstance(x, Tensor):
        raise TypeError(
            f"This baseline needs inputs that are one tensor; got {type(x).__name__}. "
            f"LastLayerLaplace takes tuples and mappings."
        )
    return x


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes that the tensors hold."""
    return sum(t.numel() * t.element_size() for t in tensors)
