"""Which kind of target methods are for."""

from ella.likelihoods import Discrete, Normal
from ella.report.classes import ClassExamples
from ella.report.examples import Examples, Methods
from ella.report.labels import LabelExamples, is_for
from ella.report.real import RealExamples


def kind_of(methods: Methods) -> type[Examples]:
    """The kind of target that all methods are for.

    Args:
        methods: See `Methods`. Whether a `Bernoulli` is of one logit, and so of two classes, is
            seen when it predicts; see `LabelExamples.of_batch`.

    Raises:
        ValueError: If they are for different kinds, or for one that has no report.
    """
    for name, method in methods.items():
        if not isinstance(method.likelihood, (Discrete, Normal)):
            raise ValueError(
                f"The report is for classes, labels and real targets (Categorical, Bernoulli, "
                f"Normal); `methods`[{name!r}] has the likelihood {method.likelihood!r}."
            )
    real = {name: isinstance(each.likelihood, Normal) for name, each in methods.items()}
    if len(set(real.values())) > 1:
        of_real = ", ".join(repr(name) for name in real if real[name])
        raise ValueError(f"`methods` mixes kinds of targets: {of_real} are for real ones alone.")
    if all(real.values()):
        return RealExamples
    return LabelExamples if is_for(methods) else ClassExamples
