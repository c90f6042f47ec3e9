"""From fitted methods and data to a report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ella.arguments import one_of
from ella.batches import Loader
from ella.inputs import Inputs
from ella.likelihoods import Discrete
from ella.predictions import Predictive
from ella.predictor import Predictor
from ella.report import statistics
from ella.report.bootstrap import Bootstrap, Sampled
from ella.report.cost import forward_ratio
from ella.report.examples import Examples, Methods, scores_of
from ella.report.hardest import Hardest, Picture
from ella.report.result import FEWEST, ClassGap, Metric, Report, Row, Verdict
from ella.scores import Uncertainty

SCALING = "temperature scaling"
"""What a method has to beat, if it is there: one number, and no cost."""
SHOWN = 8
"""Classes whose gaps are told."""


def evaluate(
    methods: Methods,
    test_loader: Loader,
    *,
    ood: Mapping[str, Loader] | None = None,
    shift: Mapping[str, Loader] | None = None,
    method: str | None = None,
    against: str | None = None,
    risk: float = 0.01,
    score: str = "entropy",
    classes: Sequence[str] | None = None,
    bootstrap: Bootstrap | None = None,
    progress: bool = True,
) -> Report:
    """Compare methods on the same data, and say whether one is worth it.

    Every metric has an interval over bootstrap samples of the examples, which are the same for all
    methods. It is about the data; another seed of training may differ by more.

    Args:
        methods: Fitted and calibrated methods for classes, at least two, by name.
        test_loader: Labelled data that no method was fitted, calibrated or chosen on.
        ood: Inputs of no known class, by name; labels, if any, are left out.
        shift: Labelled data under other conditions, by name.
        method: Who is judged; None takes the last.
        against: By whom; None takes "temperature scaling" if it is there, else the first.
        risk: Error rate that selective prediction is to keep.
        score: The field of `Uncertainty` that ranks examples, in and out of distribution.
        classes: Their names; None numbers them.
        bootstrap: Number and seed of resamples, level of intervals; None takes 1,000 and 95 %.
        progress: Whether to show progress bars.

    Raises:
        NotFittedError: If a method is not fitted.
        TypeError: If a method is none, or a loader or the labels have the wrong form.
        ValueError: If a name or a batch is bad, or a method is not for classes.
    """
    check_methods(methods)
    one_of(*(each.name for each in fields(Uncertainty)))("score", score)
    if not 0 < risk < 1:
        raise ValueError(f"`risk` must lie between 0 and 1, both excluded; got {risk!r}.")
    pair = Pair.of(list(methods), method, against)
    data = test_loader, ood or {}, shift or {}
    found = Findings.of(methods, *data, score, pair.judged, progress)
    resampling = Bootstrap() if bootstrap is None else bootstrap
    return _reported(found, pair, class_names(classes, found.test.num_classes), risk, resampling)


@dataclass(frozen=True)
class Pair:
    """Who is judged and by whom.

    Attributes:
        names: Of all methods.
        judged: Place of the one.
        other: Place of the other.
    """

    names: list[str]
    judged: int
    other: int

    @classmethod
    def of(cls, names: list[str], method: str | None, against: str | None) -> "Pair":
        """By names; see `evaluate`."""
        judged = names[-1] if method is None else method
        default = SCALING if SCALING in names and judged != SCALING else names[0]
        other = default if against is None else against
        one_of(*names)("method", judged)
        one_of(*names)("against", other)
        if judged == other:
            raise ValueError(f"`method` and `against` are both {judged!r}: nothing to compare.")
        return cls(names, names.index(judged), names.index(other))


@dataclass(frozen=True)
class Findings:
    """What the methods say of all data.

    Attributes:
        score: Which score.
        test: Of the test data.
        shifted: Of labelled data under other conditions, by name.
        outside: Scores out of distribution, (n', m), by name.
        pictures: The test inputs of which the judged method is least certain.
        costs: Of each method, seconds of a prediction over those of a forward pass, and bytes.
    """

    score: str
    test: Examples
    shifted: dict[str, Examples]
    outside: dict[str, Tensor]
    pictures: tuple[Picture, ...]
    costs: list[tuple[float | None, int]]

    @classmethod
    def of(
        cls,
        methods: Methods,
        test_loader: Loader,
        ood: Mapping[str, Loader],
        shift: Mapping[str, Loader],
        score: str,
        judged: int,
        progress: bool,
    ) -> "Findings":
        """Go through all data once."""
        hardest, first = Hardest(judged), _First()

        def watch(x: Inputs, part: Examples) -> None:
            hardest(x, part)
            first(x)

        test = Examples.of(methods, test_loader, score, watch, progress)
        shifted = {
            name: Examples.of(methods, loader, score, None, progress)
            for name, loader in shift.items()
        }
        outside = {name: scores_of(methods, each, score, progress) for name, each in ood.items()}
        return cls(score, test, shifted, outside, tuple(hardest.pictures), first.costs(methods))

    def measured(self, risk: float, bootstrap: Bootstrap) -> dict[Metric, Sampled]:
        """All metrics of all methods."""
        found = dict(of_test(self.test, risk, bootstrap))
        for name, scores in self.outside.items():
            statistic = statistics.auroc(self.test.scores, scores)
            metric = Metric(f"auroc {name}", f"AUROC, {name}", lower=False, digits=3)
            found[metric] = bootstrap.sampled(statistic, len(self.test.labels), len(scores))
        for name, examples in self.shifted.items():
            for metric, values in of_shifted(name, examples, bootstrap).items():
                found[metric] = values
        return found


def check_methods(methods: Methods) -> None:
    """Check that there are two methods for classes, of one device.

    Raises:
        TypeError: If they are not methods by name.
        ValueError: If there are fewer than two, or one cannot be compared.
    """
    if not isinstance(methods, Mapping):
        raise TypeError(
            f"`methods` must be a mapping of names to fitted methods, such as "
            f'{{"MAP": MAP(model).fit(loader), ...}}; got {type(methods).__name__}.'
        )
    for name, method in methods.items():
        if not isinstance(method, Predictive):
            raise TypeError(
                f"`methods` must hold methods of ella; {name!r} is a {type(method).__name__}. For "
                f"a plain model use ella.baselines.MAP(model).fit(train_loader)."
            )
        if not isinstance(method.likelihood, Discrete):
            raise ValueError(
                f"The report is for classes; {name!r} has the likelihood {method.likelihood!r}. "
                f"For real targets use gaussian_negative_log_likelihood, "
                f"root_mean_squared_error and interval_coverage of ella.metrics."
            )
        method._require_fitted()
    if len(methods) < 2:
        raise ValueError(
            f"`methods` must hold at least two methods to compare; got {list(methods)}. Add "
            f"ella.baselines.TemperatureScaling, which costs nothing."
        )
    devices = {str(method._device) for method in methods.values()}
    if len(devices) > 1:
        raise ValueError(f"All methods must be on one device; got {', '.join(sorted(devices))}.")


def class_names(classes: Sequence[str] | None, num_classes: int) -> tuple[str, ...]:
    """Names of all classes; numbers if there are none.

    Raises:
        ValueError: If there are too few or too many.
    """
    if classes is None:
        return tuple(str(number) for number in range(num_classes))
    if isinstance(classes, str) or len(classes) != num_classes:
        raise ValueError(
            f"`classes` must be a list of {num_classes} names, one an output; got {classes!r}."
        )
    return tuple(str(name) for name in classes)


def of_test(examples: Examples, risk: float, bootstrap: Bootstrap) -> dict[Metric, Sampled]:
    """What is measured on labelled data."""
    correct = examples.correct
    selective = examples.scores, ~correct
    found = {
        Metric("nll", "NLL", lower=True): statistics.mean_of(examples.nll),
        Metric("accuracy", "accuracy", lower=False): statistics.mean_of(correct.double()),
        Metric("brier", "Brier", lower=True): statistics.mean_of(examples.brier),
        Metric("ece", "ECE", lower=True): statistics.calibration_error(
            examples.confidence, correct
        ),
        Metric("aurc", "AURC", lower=True, digits=5): statistics.area_under_risk_coverage(
            *selective
        ),
        Metric(
            "coverage", f"coverage at {100 * risk:g} % error", lower=False, digits=3
        ): statistics.coverage_at(*selective, risk),
    }
    size = len(examples.labels)
    return {metric: bootstrap.sampled(statistic, size) for metric, statistic in found.items()}


def of_shifted(name: str, examples: Examples, bootstrap: Bootstrap) -> dict[Metric, Sampled]:
    """What is measured under a shift."""
    found = {
        Metric(f"nll {name}", f"NLL, {name}", lower=True): statistics.mean_of(examples.nll),
        Metric(f"ece {name}", f"ECE, {name}", lower=True): statistics.calibration_error(
            examples.confidence, examples.correct
        ),
    }
    size = len(examples.labels)
    return {metric: bootstrap.sampled(statistic, size) for metric, statistic in found.items()}


def worst_classes(
    examples: Examples, pair: Pair, names: Sequence[str], bootstrap: Bootstrap
) -> tuple[ClassGap, ...]:
    """The classes whose confidence is farthest from their accuracy, where the judged says so."""
    said = examples.predicted
    counts = said[:, pair.judged].bincount(minlength=len(names))
    own = [pair.judged, pair.other]
    told = {}
    for c in (counts >= FEWEST).nonzero().flatten().tolist():
        chosen = said[:, own] == c
        told[c] = statistics.gap_where(
            chosen, examples.confidence[:, own], examples.correct[:, own]
        )
    ones = torch.ones(len(said), dtype=torch.float64)
    worst = sorted(told, key=lambda c: -abs(told[c](ones)[0].item()))[:SHOWN]
    gaps = []
    for c in worst:
        sampled = bootstrap.sampled(told[c], len(said))
        correct = examples.correct[said[:, pair.judged] == c, pair.judged]
        accuracy, against = correct.double().mean().item(), sampled.estimates[1].item()
        gaps.append(ClassGap(names[c], int(counts[c]), accuracy, sampled.interval(0), against))
    return tuple(gaps)


class _First:
    """The first batch of the test data, on which predictions are timed."""

    def __init__(self) -> None:
        self.batch: Inputs | None = None

    def __call__(self, x: Inputs) -> None:
        self.batch = x if self.batch is None else self.batch

    def costs(self, methods: Methods) -> list[tuple[float | None, int]]:
        """See `Findings.costs`."""
        models = [m for m in methods.values() if isinstance(m, Predictor)]
        found: list[tuple[float | None, int]] = []
        for method in methods.values():
            ratio = None
            if models and self.batch is not None and isinstance(method, Predictor):
                ratio = _forward_ratio(method, models[0], self.batch)
            found.append((ratio, method.state_bytes))
        return found


@torch.no_grad()
def _forward_ratio(method: Predictor, plain: Predictor, x: Inputs) -> float:
    forward, predict = (lambda: plain.network(x)), (lambda: method.predict_proba(x))
    return forward_ratio(predict, forward, repeats=7, device=method._device)


def _reported(
    found: Findings, pair: Pair, classes: tuple[str, ...], risk: float, bootstrap: Bootstrap
) -> Report:
    table = found.measured(risk, bootstrap)
    rows = tuple(_row(name, i, table, pair, found.costs[i]) for i, name in enumerate(pair.names))
    return Report(
        rows,
        tuple(table),
        _verdict(rows, tuple(table), pair, bootstrap, len(found.test.labels)),
        risk,
        found.score,
        found.test,
        found.outside,
        found.pictures,
        classes,
        worst_classes(found.test, pair, classes, bootstrap),
    )


def _row(
    name: str,
    place: int,
    table: Mapping[Metric, Sampled],
    pair: Pair,
    cost: tuple[float | None, int],
) -> Row:
    compared = {} if place == pair.other else table
    return Row(
        name,
        {metric.key: values.interval(place) for metric, values in table.items()},
        {metric.key: each.difference(place, pair.other) for metric, each in compared.items()},
        *cost,
    )


def _verdict(
    rows: Sequence[Row], metrics: Sequence[Metric], pair: Pair, bootstrap: Bootstrap, size: int
) -> Verdict:
    judged, other = rows[pair.judged], rows[pair.other]
    words: dict[int, list[str]] = {1: [], 0: [], -1: []}
    for metric in metrics[1:]:
        values = (row.metrics[metric.key].estimate for row in (judged, other))
        this, that = (metric.written(value) for value in values)
        side = metric.better(judged.differences[metric.key])
        words[side].append(f"{metric.title} ({this} against {that})")
    return Verdict(
        judged.method,
        other.method,
        judged.differences["nll"],
        bootstrap.level,
        bootstrap.num_resamples,
        size,
        tuple(words[1]),
        tuple(words[-1]),
    )
