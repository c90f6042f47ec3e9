r"""Likelihoods p(y | f): one class holds all that depends on what is observed.

Targets, the curvature Λ = −∂² log p/∂f², the density, the scale that `calibrate` searches, the
predictive, the decision, the scores. Pass an object of your own wherever a likelihood is asked
for: a subclass of `Discrete` if the response is probabilities, else of `Likelihood`.
"""

from collections.abc import Callable

from ella.arguments import POSITIVE
from ella.likelihoods.base import Discrete, Likelihood, Losses, Spreads
from ella.likelihoods.bernoulli import Bernoulli
from ella.likelihoods.categorical import Categorical
from ella.likelihoods.normal import Normal

__all__ = [
    "Bernoulli",
    "Categorical",
    "Discrete",
    "Likelihood",
    "Losses",
    "Normal",
    "Spreads",
    "as_likelihood",
]

SHORTHAND: dict[str, Callable[[], Likelihood]] = {
    "classification": Categorical,
    "multilabel": Bernoulli,
    "binary": Bernoulli,
    "regression": Normal,
}


def as_likelihood(likelihood: str | Likelihood, noise_variance: float | None = None) -> Likelihood:
    """The likelihood of that name; a `Likelihood` is what it is.

    Args:
        likelihood: "classification", "multilabel", "binary", "regression" or an object.
        noise_variance: Shorthand for `Normal(noise_variance)`, with "regression" alone.

    Raises:
        ValueError: For another name, or a noise variance of something else.
    """
    if noise_variance is not None:
        POSITIVE("noise_variance", noise_variance)
        if likelihood != "regression":
            raise ValueError('`noise_variance` is for likelihood="regression".')
        return Normal(noise_variance)
    if isinstance(likelihood, Likelihood):
        return likelihood
    if not isinstance(likelihood, str) or likelihood not in SHORTHAND:
        names = ", ".join(repr(name) for name in SHORTHAND)
        raise ValueError(
            f"`likelihood` must be one of {names}, or a Likelihood; got {likelihood!r}."
        )
    return SHORTHAND[likelihood]()
