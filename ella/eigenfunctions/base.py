"""The narrow waist: the prior over outputs at n inputs, in terms of eigenfunctions."""

from typing import Protocol

from ella.arguments import one_of
from ella.batches import Batches, Loader
from ella.inputs import Inputs
from ella.linearize import Linearized
from ella.network import Network
from ella.predictive import LogitGaussian
from ella.saving import State

PRODUCT_RESIDUALS = ("diag", "exact", "none")
"""Residuals of the methods that make Jacobian products and so need to learn nothing."""


class Eigenfunctions(Protocol):
    r"""Fitted eigenfunctions.

    Called with n inputs they give the prior at δ = 1 as a `LogitGaussian`: outputs f(x) as its
    mean, φ(x) with :math:`φφ^\top ≈ κ` as its factor, and as its residual
    :math:`R = κ(x, x) - φφ^\top`, the prior variance outside the span of φ: its diagonal (n, c),
    its blocks (n, c, c), or None if it is dropped.
    """

    @property
    def rank(self) -> int:
        """K."""

    def __call__(self, x: Inputs) -> LogitGaussian:
        """Evaluate at n inputs."""

    def state(self) -> State:
        """Everything that was fitted; the method's `restore` takes it."""


class EigenfunctionMethod(Protocol):
    """A way to find eigenfunctions: settings only; `fit` returns the fitted object."""

    def fit(
        self, linearized: Linearized, loader: Loader | Batches, *, seed: int, progress: bool
    ) -> Eigenfunctions:
        """Find the leading eigenfunctions on batches `(x, y)`; y is not used.

        Args:
            linearized: The model.
            loader: Training data (`as_batches` makes `Batches` of any loader).
            seed: Of everything random.
            progress: Whether to show progress bars.
        """

    def restore(
        self, network: Network, state: State, *, trainable: tuple[str, ...], memory_budget: int
    ) -> Eigenfunctions:
        """Rebuild what `fit` returned from its state.

        Args:
            network: The model.
            state: See `Eigenfunctions.state`.
            trainable: Names of the weights that were linearized.
            memory_budget: See `Linearized`.

        Raises:
            ValueError: If the state does not fit the model, or has parts that make no sense.
        """


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
    one_of(*PRODUCT_RESIDUALS)("residual", residual)
