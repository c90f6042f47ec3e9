"""Which kind of target methods are for."""

from ella.likelihoods import Bernoulli, Discrete, Likelihood, Normal
from ella.report.classes import ClassExamples
from ella.report.examples import Examples, Methods
from ella.report.labels import LabelExamples
from ella.report.real import RealExamples


def kind_of(likelihood: Likelihood) -> type[Examples]:
    """The kind of target that a likelihood is for.

    Args:
        likelihood: Whether a `Bernoulli` is of one logit, and so of two classes, is seen when a
            method predicts; see `Examples.of_batch`.

    Raises:
        ValueError: If it has no report.
    """
    if isinstance(likelihood, Normal):
        return RealExamples
    if isinstance(likelihood, Bernoulli):
        return LabelExamples
    if isinstance(likelihood, Discrete):
        return ClassExamples
    raise ValueError(
        f"The report is for classes, labels and real targets (Categorical, Bernoulli, Normal); "
        f"got the likelihood {likelihood!r}."
    )


def kind_of_all(methods: Methods) -> type[Examples]:
    """The kind of target that all methods are for.

    Args:
        methods: See `Methods`. One logit and two classes go together.

    Raises:
        ValueError: If they are for different kinds, or for one that has no report.
    """
    kinds: dict[str, type[Examples]] = {}
    for name, method in methods.items():
        try:
            kinds[name] = kind_of(method.likelihood)
        except ValueError as error:
            raise ValueError(f"`methods`[{name!r}]: {error}") from None
    found = set(kinds.values())
    if len(found) > 1 and RealExamples in found:
        of_real = ", ".join(repr(name) for name, kind in kinds.items() if kind is RealExamples)
        raise ValueError(f"`methods` mixes kinds of targets: {of_real} are for real ones alone.")
    return found.pop() if len(found) == 1 else ClassExamples
