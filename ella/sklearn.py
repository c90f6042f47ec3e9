"""ELLA as a scikit-learn classifier, for data that are arrays. Needs the extra `sklearn`.

It is imported by name, `from ella.sklearn import ELLAClassifier`, never by `import ella`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from ella.batches import Batches, Loader
from ella.distance import Distance
from ella.eigenfunctions import EigenfunctionMethod, Eigenfunctions, NeuralEF
from ella.estimator import ELLA
from ella.inputs import slices
from ella.likelihoods import Bernoulli, Discrete, Likelihood, as_likelihood
from ella.linearize import Linearized
from ella.network import Network
from ella.saving import State
from ella.scores import Uncertainty

try:
    from sklearn.base import BaseEstimator, ClassifierMixin
    from sklearn.utils import check_random_state
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError as error:
    raise ImportError(
        'ella.sklearn needs scikit-learn 1.6 or newer: pip install "ella-laplace[sklearn]".'
    ) from error

if TYPE_CHECKING:
    from sklearn.utils import Tags
    from typing_extensions import Self

__all__ = ["ELLAClassifier"]

Array = NDArray[np.generic]
Trainer = Callable[[Array, Array], nn.Module]
"""(X, class indices) ↦ a module trained on them."""

Data = tuple[Array, Array]
"""Inputs and class indices."""

Pairs = list[tuple[Tensor, Tensor]]
"""The same as tensors, in batches: a loader."""

FLOATS = (np.float64, np.float32)
"""What arrays of numbers are read as; all but float32 become float64."""

SHARE = 0.2
"""Of the examples that validation="auto" holds out from a callable `module`."""


class ELLAClassifier(ClassifierMixin, BaseEstimator):
    """Trained module, or how to train one, with calibrated probabilities: `ELLA` over arrays.

    `fit` trains the module if it is a callable, fits an `ELLA` to it on the same examples, and
    calibrates that on examples which the callable was not given. Everything else that ELLA can do
    is in `ella_`.

    Args:
        module: A trained `nn.Module`, used as it is and never changed; or a callable
            `module(X, y)` that returns one trained on what it is given, a float array and class
            **indices**, as an honest cross-validation needs it. torch's global generator is seeded
            for the call, and restored. Outputs are logits of `classes_`, in their order; one
            logit for two classes is that of the second. X is converted to the module's
            floating-point dtype and moved to its device.
        likelihood: None for "binary" if there is one output for two classes, else
            "classification"; or a name or `Discrete` object, as for `ELLA`.
        eigenfunctions: As for `ELLA`. None takes `NeuralEF()`, of fewer than 64 eigenfunctions
            where the Jacobian at the examples spans fewer directions, as for small modules; the
            number is `ella_.eigenfunctions.rank`.
        prior_precision: As for `ELLA`.
        distance: As for `ELLA`.
        validation: What `ELLA.calibrate` gets, which must be examples that the module was not
            trained on. A share in (0, 1) of those given to `fit`, stratified (each class keeps
            at least one to train on) and lost to training; a pair (X, y), which no step of a
            pipeline transforms; or None for no calibration. "auto" is a share of 0.2 for a
            callable, and None for a trained module, which may have seen all that `fit` gets.
        batch_size: Examples a batch, in `fit` and in predictions.
        random_state: Seed of everything random. An integer is `ELLA`'s seed itself; None or a
            `RandomState` draws one.
        progress: Whether to show progress bars.

    Attributes:
        classes_: Sorted class labels, shape (c,).
        n_features_in_: Length of axis 1 of X.
        feature_names_in_: Column names of X, if it was a frame that has them.
        ella_: The fitted `ELLA`.
    """

    classes_: Array
    n_features_in_: int
    ella_: ELLA

    def __init__(
        self,
        module: nn.Module | Trainer,
        *,
        likelihood: str | Likelihood | None = None,
        eigenfunctions: EigenfunctionMethod | None = None,
        prior_precision: float | None = None,
        distance: Distance | None = None,
        validation: float | tuple[ArrayLike, ArrayLike] | str | None = "auto",
        batch_size: int = 256,
        random_state: int | np.random.RandomState | None = 0,
        progress: bool = False,
    ) -> None:
        self.module = module
        self.likelihood = likelihood
        self.eigenfunctions = eigenfunctions
        self.prior_precision = prior_precision
        self.distance = distance
        self.validation = validation
        self.batch_size = batch_size
        self.random_state = random_state
        self.progress = progress

    def fit(self, X: ArrayLike, y: ArrayLike) -> "Self":
        """Train the module if it is a callable, fit ELLA to it, and calibrate.

        Args:
            X: Numbers, shape (n, features) or (n, ...) for modules that take more axes.
            y: Labels of any kind, shape (n,).

        Raises:
            TypeError: If `module` is neither a module nor a callable that returns one.
            ValueError: If an argument or the data are bad, `y` has one class, or the module's
                outputs do not fit the classes; and whatever `ELLA.fit` and `calibrate` raise.
        """
        inputs, labels = validate_data(self, X, y, dtype=FLOATS, allow_nd=True)
        check_classification_targets(labels)
        self._check_settings()
        self.classes_, indices = np.unique(labels, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"`y` must hold at least 2 classes; got 1 class: {self.classes_[0]}.")
        seed = self._seed()
        train, validation = self._split(inputs, indices, seed)
        network = Network(self._trained(*train, seed))
        ella = self._fitted(network, self._pairs(*train, network), seed)
        if validation is not None:
            ella.calibrate(self._pairs(*validation, network))
        self.ella_ = ella
        return self

    def predict_proba(self, X: ArrayLike) -> Array:
        """Probabilities of `classes_`, averaged over the posterior.

        Returns:
            Shape (n, c), in the module's dtype (float32 for bfloat16, which NumPy lacks).

        Raises:
            sklearn.exceptions.NotFittedError: Before `fit`.
            ModelChangedError: If the module's weights changed since.
            ValueError: If the inputs are bad.
        """
        batches = self._inputs(X)
        found = self.ella_.predict_proba(batches).cpu()
        probs = (found.float() if found.dtype == torch.bfloat16 else found).numpy()
        one_logit = isinstance(self.ella_.likelihood, Bernoulli)
        return np.hstack([1 - probs, probs]) if one_logit else probs

    def predict(self, X: ArrayLike) -> Array:
        """The most probable of `classes_`, shape (n,).

        Raises:
            sklearn.exceptions.NotFittedError: Before `fit`.
            ModelChangedError: If the module's weights changed since.
            ValueError: If the inputs are bad.
        """
        batches = self._inputs(X)
        return self.classes_[self.ella_.predict(batches).flatten().cpu().numpy()]

    def uncertainty(self, X: ArrayLike) -> Uncertainty:
        """ELLA's scores, tensors of shape (n,); higher is less certain (see `Uncertainty`).

        Raises:
            sklearn.exceptions.NotFittedError: Before `fit`.
            ModelChangedError: If the module's weights changed since.
            ValueError: If the inputs are bad.
        """
        batches = self._inputs(X)
        return self.ella_.uncertainty(batches)

    def __sklearn_tags__(self) -> "Tags":
        """Images and sequences are accepted where the module takes them."""
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        return tags

    def _check_settings(self) -> None:
        if not (isinstance(self.batch_size, Integral) and self.batch_size >= 1):
            raise ValueError(f"`batch_size` must be an integer above 0; got {self.batch_size!r}.")
        if not callable(self.module):  # modules are
            raise TypeError(
                f"`module` must be a trained torch.nn.Module or a callable (X, y) -> module; got "
                f"{type(self.module).__name__}."
            )

    def _seed(self) -> int:
        """An integer that is given, or one drawn."""
        if isinstance(self.random_state, Integral):
            return int(self.random_state)
        return int(check_random_state(self.random_state).randint(2**31 - 1))

    def _split(self, X: Array, indices: Array, seed: int) -> tuple[Data, Data | None]:
        """What to train on, and what to calibrate on."""
        validation = self.validation
        if isinstance(validation, str) and validation == "auto":
            validation = None if isinstance(self.module, nn.Module) else SHARE
        match validation:
            case None:
                return (X, indices), None
            case (X_val, y_val):
                return (X, indices), self._checked_validation(X_val, y_val)
            case Real() if 0 < (share := float(validation)) < 1:
                held = held_out(indices, share, seed)
                return (X[~held], indices[~held]), (X[held], indices[held])
        raise ValueError(
            f'`validation` must be a share in (0, 1), a pair (X, y), "auto" or None; got '
            f"{validation!r}."
        )

    def _checked_validation(self, X: ArrayLike, y: ArrayLike) -> Data:
        """Validation data as an array and class indices.

        Raises:
            ValueError: If they are bad, or `fit` has no such class.
        """
        inputs, labels = validate_data(self, X, y, reset=False, dtype=FLOATS, allow_nd=True)
        if unknown := sorted(set(labels.tolist()) - set(self.classes_.tolist())):
            raise ValueError(f"`validation` holds labels that `y` does not: {unknown}.")
        return inputs, np.searchsorted(self.classes_, labels)

    def _trained(self, X: Array, indices: Array, seed: int) -> nn.Module:
        """The module, or what the callable makes of the data.

        Raises:
            TypeError: If that is no module.
        """
        if isinstance(self.module, nn.Module):
            return self.module
        devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            module = self.module(X, indices)
        if not isinstance(module, nn.Module):
            raise TypeError(
                f"`module(X, y)` must return a torch.nn.Module; got {type(module).__name__}."
            )
        return module

    def _fitted(self, network: Network, pairs: Pairs, seed: int) -> ELLA:
        """Before calibration."""
        example = pairs[0][0][:1].to(network.device)
        ella = ELLA(
            network.model,
            likelihood=fitting(self.likelihood, network(example), len(self.classes_)),
            eigenfunctions=AtMost(NeuralEF())
            if self.eigenfunctions is None
            else self.eigenfunctions,
            prior_precision=self.prior_precision,
            distance=self.distance,
            seed=seed,
            progress=self.progress,
        ).fit(pairs)
        if self.eigenfunctions is None:  # what it was, which can be saved and used again
            ella.eigenfunctions = NeuralEF(rank=len(ella.curvature))
        return ella

    def _inputs(self, X: ArrayLike) -> list[Tensor]:
        """Checked batches for predictions."""
        check_is_fitted(self, "ella_")
        checked = validate_data(self, X, reset=False, dtype=FLOATS, allow_nd=True)
        return self._batches(checked, self.ella_.network)

    def _batches(self, X: Array, network: Network) -> list[Tensor]:
        """Copies, in the module's dtype; ELLA moves them to its device one by one."""
        X = np.ascontiguousarray(X)  # torch reads no negative strides
        parts = slices(len(X), int(self.batch_size))
        return [torch.tensor(X[part], dtype=network.dtype) for part in parts]

    def _pairs(self, X: Array, indices: Array, network: Network) -> Pairs:
        """What ELLA takes for a loader."""
        labels = torch.tensor(indices, dtype=torch.int64).split(int(self.batch_size))
        return list(zip(self._batches(X, network), labels, strict=True))


@dataclass(frozen=True)
class AtMost:
    """Neural eigenfunctions: as many as were wanted, or as the data carry, where that is fewer.

    Attributes:
        wanted: The method; its `rank` is the most.
    """

    wanted: NeuralEF

    def fit(
        self, linearized: Linearized, loader: Loader | Batches, *, seed: int, progress: bool
    ) -> Eigenfunctions:
        """See `EigenfunctionMethod.fit`."""
        any_rank = replace(self.wanted, rank=1)
        sample = any_rank.sample(linearized, loader, seed=seed, progress=progress)
        method = replace(self.wanted, rank=min(self.wanted.rank, sample.axes.shape[1]))
        return method.learn(sample, seed=seed, progress=progress)

    def restore(
        self, network: Network, state: State, *, trainable: tuple[str, ...], memory_budget: int
    ) -> Eigenfunctions:
        """See `EigenfunctionMethod.restore`."""
        return self.wanted.restore(
            network, state, trainable=trainable, memory_budget=memory_budget
        )


def held_out(indices: Array, share: float, seed: int) -> NDArray[np.bool_]:
    """A random share of the examples, evenly over the classes; each class keeps at least one.

    Args:
        indices: Class indices, shape (n,).
        share: In (0, 1).
        seed: Of the choice.

    Returns:
        Mask, shape (n,).

    Raises:
        ValueError: If that leaves nothing to hold out.
    """
    order = np.random.RandomState(seed).permutation(len(indices))
    order = order[np.argsort(indices[order], kind="stable")]
    _, firsts = np.unique(indices[order], return_index=True)
    free = np.delete(order, firsts)
    count = min(round(share * len(indices)), len(free))
    if count == 0:
        raise ValueError(
            f"`validation`={share} of {len(indices)} examples in {len(firsts)} classes, each of "
            f"which keeps one, holds out none. Give more examples, or validation=None."
        )
    places = (np.arange(count) + 0.5) * len(free) / count  # every so many, class after class
    mask = np.zeros(len(indices), dtype=bool)
    mask[free[places.astype(int)]] = True
    return mask


def fitting(given: str | Likelihood | None, outputs: Tensor, num_classes: int) -> Likelihood:
    """The likelihood, if the module's outputs give probabilities of all classes.

    Args:
        given: What the user asks for; None chooses by the number of outputs.
        outputs: Of any examples, shape (n, c).
        num_classes: In `y`.

    Raises:
        ValueError: If it has no class probabilities, or the numbers do not fit.
    """
    c = outputs.shape[1]
    if given is None:
        given = "binary" if (c, num_classes) == (1, 2) else "classification"
    likelihood = as_likelihood(given)
    if not isinstance(likelihood, Discrete):
        raise ValueError(f"`likelihood` must give probabilities of classes; got {given!r}.")
    if isinstance(likelihood, Bernoulli):
        fits, expected = (c, num_classes) == (1, 2), "1 output for 2 classes"
    else:
        fits = likelihood.response(outputs, -1).shape[1] == num_classes
        expected = f"{num_classes} outputs"
    if not fits:
        raise ValueError(
            f"`module` does not fit the {num_classes} classes of `y`: expected {expected} with "
            f"{likelihood}, got {c}."
        )
    return likelihood
