"""What several methods say of the examples of a data set: a few numbers each, no probabilities."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ella.batches import Batches, Loader
from ella.inputs import Inputs
from ella.likelihoods import Bernoulli, Discrete
from ella.predictions import Predictive

if TYPE_CHECKING:
    from collections.abc import Sequence

T = TypeVar("T")

Methods = Mapping[str, Predictive]
"""Fitted and calibrated methods, by name."""

Watch = Callable[[Inputs, "Examples"], None]
"""Called with each batch of inputs and what the methods say of it."""


@dataclass(frozen=True)
class Examples:
    """N labelled examples and m methods.

    Attributes:
        num_classes: c.
        labels: Class indices, shape (n,).
        predicted: The most probable class, shape (n, m).
        confidence: Its probability, shape (n, m), float64.
        nll: −log of the label's probability, in nats, shape (n, m), float64.
        brier: Squared distance of the probabilities to the label, shape (n, m), float64.
        scores: Uncertainty, shape (n, m), float64.
    """

    num_classes: int
    labels: Tensor
    predicted: Tensor
    confidence: Tensor
    nll: Tensor
    brier: Tensor
    scores: Tensor

    @classmethod
    def of(
        cls, methods: Methods, loader: Loader, score: str, watch: Watch | None, progress: bool
    ) -> "Examples":
        """Go through a data set once, with all methods on each batch: it may be shuffled.

        Args:
            methods: See `Methods`.
            loader: Labelled data.
            score: A field of `Uncertainty`.
            watch: See `Watch`.
            progress: Whether to show a progress bar.

        Raises:
            TypeError: If a batch has the wrong form.
            ValueError: If a batch is bad, no label counts, or the outputs are of another kind.
        """
        parts = []
        with _batches(methods, loader).named() as batches:
            for x, y in _shown(batches.labelled(), progress):
                part = cls._of_batch(methods, x, y, score)
                parts.append(part)
                if watch is not None:
                    watch(x, part)
        found = cls.joined(parts)
        if len(found.labels) == 0:
            raise ValueError("No label of the data counts: all are ignored.")
        return found

    @classmethod
    def joined(cls, parts: "Sequence[Examples]") -> "Examples":
        """All examples."""
        names = [each.name for each in fields(cls)][1:]
        columns = [torch.cat([getattr(part, name) for part in parts]) for name in names]
        return cls(parts[0].num_classes, *columns)

    @property
    def correct(self) -> Tensor:
        """Whether the most probable class is the label, shape (n, m)."""
        return self.predicted == self.labels[:, None]

    @classmethod
    def _of_batch(cls, methods: Methods, x: Inputs, y: Tensor, score: str) -> "Examples":
        columns: list[tuple[Tensor, ...]] = []
        for method in methods.values():
            raw = method.predict_proba(x)
            probs = _class_probabilities(raw)
            labels, counted = _checked(method, y, raw)
            tiny = torch.finfo(raw.dtype).tiny
            own = probs.gather(1, labels.clamp(0, probs.shape[1] - 1)[:, None]).squeeze(1)
            confidence, predicted = probs.max(1)
            brier = probs.square().sum(1) - 2 * own + 1
            scores = _scores(method, x, raw, score)
            found = (predicted, confidence.clamp_max(1), -own.clamp_min(tiny).log(), brier, scores)
            columns.append(tuple(each[counted].cpu() for each in (labels, *found)))
        stacked = [torch.stack(each, 1) for each in zip(*columns, strict=True)]
        return cls(probs.shape[1], stacked[0][:, 0], *stacked[1:])


def scores_of(methods: Methods, loader: Loader, score: str, progress: bool) -> Tensor:
    """Uncertainty of inputs whose labels, if any, are left out, shape (n, m), float64.

    Args:
        methods: See `Methods`.
        loader: Inputs.
        score: A field of `Uncertainty`.
        progress: Whether to show a progress bar.
    """
    parts = []
    with _batches(methods, loader).named() as batches:
        for x in _shown(batches.inputs(), progress):
            of_each = (_scores(m, x, m.predict_proba(x), score) for m in methods.values())
            parts.append(torch.stack([each.cpu() for each in of_each], 1))
    return torch.cat(parts)


def _batches(methods: Methods, loader: Loader) -> Batches:
    return next(iter(methods.values()))._batches(loader)


def _shown(items: Iterable[T], progress: bool) -> Iterable[T]:
    bar: Iterable[T] = tqdm(items, desc="report", disable=not progress, leave=False)
    return bar


def _class_probabilities(raw: Tensor) -> Tensor:
    """Shape (n, c) in float64, also of the one probability of a `Bernoulli`."""
    wide = raw.double()
    return torch.cat([1 - wide, wide], 1) if wide.shape[1] == 1 else wide


def _checked(method: Predictive, y: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
    """Class indices, and which of them count."""
    likelihood = method.likelihood
    if isinstance(likelihood, Bernoulli) and raw.shape[1] > 1:
        raise ValueError(
            f"The report is for one class an example; {raw.shape[1]} labels of a Bernoulli are "
            f"{raw.shape[1]} questions. Use ella.metrics.binary_negative_log_likelihood."
        )
    if raw.ndim != 2:
        raise ValueError(
            f"The report is for one prediction an example; the model has outputs for every "
            f"position, {tuple(raw.shape)}. Use ella.metrics on predict_proba."
        )
    labels = likelihood.check(y, raw.shape[1])
    weights = likelihood.weights(labels)
    counted = torch.ones(len(y), dtype=torch.bool) if weights is None else weights > 0
    return labels.reshape(len(y)).long(), counted.to(labels.device)


def _scores(method: Predictive, x: Inputs, raw: Tensor, score: str) -> Tensor:
    likelihood = method.likelihood
    # These two are known from the probabilities: no second prediction.
    if isinstance(likelihood, Discrete) and score == "entropy":
        return likelihood.entropy(raw).double()
    if isinstance(likelihood, Discrete) and score == "confidence_deficit":
        return 1 - likelihood.confidence(raw).double()
    found: Tensor | None = getattr(method.uncertainty(x), score)
    if found is None:
        raise ValueError(
            f"`score`={score!r} is not known to every method here: "
            f"{type(method).__name__} has none. Use 'entropy', which all have."
        )
    return found.double()
