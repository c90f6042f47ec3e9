"""What several methods say of the examples of a data set: a few numbers each.

A kind of target is one subclass of `Examples`: what is kept of an example, what is measured and
how, and which figures and tables there are. `classes`, `labels` and `real` hold them.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, ClassVar, TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ella.arguments import one_of
from ella.batches import Batches, Loader
from ella.inputs import Inputs
from ella.predictions import Predictive
from ella.report.bootstrap import Bootstrap, Statistic
from ella.report.metric import Metric, Pair
from ella.scores import Uncertainty

if TYPE_CHECKING:
    from typing_extensions import Self

    from ella.report.result import Report
    from ella.report.sections import Section

T = TypeVar("T")

Methods = Mapping[str, Predictive]
"""Fitted and calibrated methods, by name."""

Watch = Callable[[Inputs, "Examples"], None]
"""Called with each batch of inputs and what the methods say of it."""

SCALING = "temperature scaling"
"""What a method has to beat, if it is there: one number, and no cost."""
SHOWN = 8
"""Rows of the table of the worst classes, labels or targets."""
SHARED = ("labels", "targets")
"""Columns that are the same for all methods."""


@dataclass(frozen=True)
class Gap:
    """What is told of one class, label or target.

    Attributes:
        name: Of it.
    """

    name: str


@dataclass(frozen=True)
class Examples(ABC):
    """N labelled examples and m methods; a subclass for each kind of target.

    Attributes:
        nll: −log of the density or probability of the target, in nats, shape (n, m), float64.
        scores: Uncertainty, shape (n, m), float64.
        plural: What outputs are called, as in JSON.
        opponents: Names of what a method has to beat, the strongest first.
        own_scores: Scores that this kind has beside those of `Uncertainty`, the default first.
        risk: The error that selective prediction is to keep if nobody says; None for none.
        stranger: An input that is out of distribution, in words.
        strangers: Several of them.
        remark: What has to be known to read the table.
    """

    nll: Tensor
    scores: Tensor
    plural: ClassVar[str]
    opponents: ClassVar[tuple[str, ...]] = (SCALING,)
    own_scores: ClassVar[tuple[str, ...]] = ("entropy",)
    risk: ClassVar[float | None] = 0.01
    stranger: ClassVar[str] = "an input of no class"
    strangers: ClassVar[str] = "inputs of no class"
    remark: ClassVar[str] = ""

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.nll)

    # Settings

    @classmethod
    def checked_score(cls, score: str | None) -> str:
        """The name of a score, or the default.

        Raises:
            ValueError: If there is none of that name.
        """
        names = [*cls.own_scores, *(each.name for each in fields(Uncertainty))]
        found = cls.own_scores[0] if score is None else score
        one_of(*dict.fromkeys(names))("score", found)
        return found

    @classmethod
    def checked_risk(cls, risk: float | None) -> float | None:
        """The error that selective prediction is to keep, or the default.

        Raises:
            ValueError: If it is out of range.
        """
        found = cls.risk if risk is None else risk
        if found is None or not 0 < found < 1:
            raise ValueError(f"`risk` must lie between 0 and 1, both excluded; got {risk!r}.")
        return found

    @abstractmethod
    def outputs(self) -> int:
        """How many classes, labels or targets there are."""

    # From methods and data

    @classmethod
    @abstractmethod
    def of_batch(cls, methods: Methods, x: Inputs, y: Tensor, score: str) -> "Examples":
        """What the methods say of a batch; of another kind if the outputs turn out to be so.

        Raises:
            TypeError: If the labels have the wrong form.
            ValueError: If a label is bad, or the outputs are of a form that has no report.
        """

    @classmethod
    @abstractmethod
    def prediction(cls, method: Predictive, x: Inputs) -> object:
        """All that a prediction is, as its time is measured."""

    @classmethod
    @abstractmethod
    def scores_of(cls, method: Predictive, x: Inputs, score: str) -> Tensor:
        """Uncertainty of a batch, shape (n,), float64."""

    @classmethod
    def joined(cls, parts: "Sequence[Self]") -> "Self":
        """All examples."""
        found: dict[str, Tensor] = {}
        for name in cls._columns(parts[0]):
            found[name] = torch.cat([getattr(part, name) for part in parts])
        return replace(parts[0], **found)

    def one(self, row: int, method: int) -> "Self":
        """One example, as one method sees it."""
        found: dict[str, Tensor] = {}
        for name, column in self._columns(self).items():
            here = column[row : row + 1]
            found[name] = here if name in SHARED else here[..., method : method + 1]
        return replace(self, **found)

    @staticmethod
    def _columns(examples: "Examples") -> dict[str, Tensor]:
        return {name: each for name, each in vars(examples).items() if isinstance(each, Tensor)}

    # What follows

    @abstractmethod
    def measures(self, risk: float | None) -> dict[Metric, Statistic]:
        """What is measured on test data; "nll" comes first, as the verdict is by it."""

    @abstractmethod
    def shifted(self, name: str) -> dict[Metric, Statistic]:
        """What is measured under a shift of that name."""

    @abstractmethod
    def gaps(self, pair: Pair, names: Sequence[str], bootstrap: Bootstrap) -> tuple[Gap, ...]:
        """The classes, labels or targets that the judged method does worst, worst first."""

    @abstractmethod
    def sections(self, report: "Report") -> "list[Section]":
        """What a page shows below the table, but for the inputs themselves."""

    @abstractmethod
    def caption(self, report: "Report") -> tuple[str, str]:
        """Of one example and one method: a text, to come after "Image", and a caption."""


def uncertainty(method: Predictive, x: Inputs, score: str) -> Tensor:
    """A field of `Uncertainty` of a batch, shape (n,), float64.

    Raises:
        ValueError: If this method has none.
    """
    found: Tensor | None = getattr(method.uncertainty(x), score)
    if found is None:
        raise ValueError(
            f"`score`={score!r} is not known to every method here: "
            f"{type(method).__name__} has none. Use 'entropy', which all have."
        )
    return found.double()


def gathered(
    kind: type[Examples],
    methods: Methods,
    loader: Loader,
    score: str,
    watch: Watch | None,
    progress: bool,
) -> Examples:
    """Go through a data set once, with all methods on each batch: it may be shuffled.

    Args:
        kind: Of the targets.
        methods: See `Methods`.
        loader: Labelled data.
        score: Which; see `Examples.checked_score`.
        watch: See `Watch`.
        progress: Whether to show a progress bar.

    Raises:
        TypeError: If a batch has the wrong form.
        ValueError: If a batch is bad, no label counts, or the outputs are of another kind.
    """
    parts = []
    with _batches(methods, loader).named() as batches:
        for x, y in _shown(batches.labelled(), progress):
            part = kind.of_batch(methods, x, y, score)
            parts.append(part)
            if watch is not None:
                watch(x, part)
    found = parts[0].joined(parts)
    if len(found) == 0:
        raise ValueError("No label of the data counts: all are ignored.")
    return found


def outside(
    kind: type[Examples], methods: Methods, loader: Loader, score: str, progress: bool
) -> Tensor:
    """Scores of inputs whose labels, if any, are left out, shape (n, m), float64.

    Args:
        kind: Of the targets that others have.
        methods: See `Methods`.
        loader: Inputs.
        score: Which; see `Examples.checked_score`.
        progress: Whether to show a progress bar.
    """
    parts = []
    with _batches(methods, loader).named() as batches:
        for x in _shown(batches.inputs(), progress):
            of_each = (kind.scores_of(m, x, score) for m in methods.values())
            parts.append(torch.stack([each.cpu() for each in of_each], 1))
    return torch.cat(parts)


def _batches(methods: Methods, loader: Loader) -> Batches:
    return next(iter(methods.values()))._batches(loader)


def _shown(items: Iterable[T], progress: bool) -> Iterable[T]:
    bar: Iterable[T] = tqdm(items, desc="report", disable=not progress, leave=False)
    return bar
