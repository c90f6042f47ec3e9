"""The narrow waist: eigenfunctions of the neural tangent kernel at n inputs."""

from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from ella.inputs import Inputs, check_choice
from ella.linearize import Linearized

RESIDUALS = ("diag", "exact", "factor", "none")
PRODUCT_RESIDUALS = ("diag", "exact", "none")
"""Those of the methods that make Jacobian products and so need to learn nothing."""


class Features(NamedTuple):
    r"""What the posterior needs of n inputs.

    Attributes:
        logits: f(x), shape (n, c).
        phi: φ(x) with :math:`φφ^\top ≈ κ`, shape (n, c, k).
        residual: R = κ(x, x) − φφᵀ, the prior variance (at δ = 1) outside the span of φ: its
            diagonal (n, c), its blocks (n, c, c), or None if it is dropped.
    """

    logits: Tensor
    phi: Tensor
    residual: Tensor | None


class Eigenfunctions(Protocol):
    """Fitted eigenfunctions."""

    def __call__(self, x: Inputs) -> Features:
        """Evaluate at n inputs."""

    def tensors(self) -> dict[str, Tensor]:
        """Everything that was fitted, for saving."""

    def settings(self) -> dict[str, Any]:
        """JSON-able description, from which, with `tensors`, the method's `restore` rebuilds."""


class EigenfunctionMethod(Protocol):
    """A way to find eigenfunctions: settings only; `fit` returns the fitted object."""

    def fit(
        self,
        linearized: Linearized,
        loader: Iterable[Any],
        *,
        residual: str,
        seed: int,
        progress: bool,
    ) -> Eigenfunctions:
        """Find the leading eigenfunctions on a loader of `(x, y, ...)`; y is not used."""

    def restore(
        self, linearized: Linearized, tensors: dict[str, Tensor], settings: dict[str, Any]
    ) -> Eigenfunctions:
        """Rebuild what `fit` returned from its `tensors()` and `settings()`."""


def check_product_residual(residual: str) -> None:
    """Methods that make Jacobian products give "diag", "exact" or "none".

    Raises:
        ValueError: For anything else, "factor" included.
    """
    if residual == "factor":
        raise ValueError(
            'residual="factor" is learned, by NeuralEF alone. This method has the real one: use '
            'residual="exact".'
        )
    check_choice("residual", residual, PRODUCT_RESIDUALS)
