"""From fitted methods and data to a report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ella.batches import Loader
from ella.inputs import Inputs
from ella.predictions import Predictive
from ella.predictor import Predictor
from ella.report import statistics
from ella.report.bootstrap import Bootstrap, Sampled
from ella.report.cost import forward_ratio
from ella.report.examples import Examples, Methods, gathered, outside
from ella.report.hardest import Hardest, Picture
from ella.report.kinds import kind_of_all
from ella.report.metric import Metric, Pair
from ella.report.result import Report, Row, Verdict


def evaluate(
    methods: Methods,
    test_loader: Loader,
    *,
    ood: Mapping[str, Loader] | None = None,
    shift: Mapping[str, Loader] | None = None,
    method: str | None = None,
    against: str | None = None,
    risk: float | None = None,
    score: str | None = None,
    classes: Sequence[str] | None = None,
    bootstrap: Bootstrap | None = None,
    progress: bool = True,
) -> Report:
    """Compare methods on the same data, and say whether one is worth it.

    Every metric has an interval over bootstrap samples of the examples, which are the same for all
    methods. It is about the data; another seed of training may differ by more.

    Args:
        methods: Fitted and calibrated methods, at least two, by name, for one kind of targets:
            classes, labels that are yes or no (`Bernoulli`), or real numbers (`Normal`).
        test_loader: Labelled data that no method was fitted, calibrated or chosen on.
        ood: Inputs of no known class, or from elsewhere, by name; labels, if any, are left out.
        shift: Labelled data under other conditions, by name.
        method: Who is judged; None takes the last.
        against: By whom; None takes "temperature scaling" if it is there, for real targets
            "MAP, noise tuned" or "MAP", else the first.
        risk: What selective prediction is to keep: an error rate, of labels the share that is
            wrong, of real targets an RMSE. None takes .01, of real targets none.
        score: The field of `Uncertainty` that ranks examples, in and out of distribution, or
            "standard_deviation" of real targets; None takes that, of others "entropy".
        classes: Names of the classes, labels or targets; None numbers them.
        bootstrap: Number and seed of resamples, level of intervals; None takes 1,000 and 95 %.
        progress: Whether to show progress bars.

    Raises:
        NotFittedError: If a method is not fitted.
        TypeError: If a method is none, or a loader or the labels have the wrong form.
        ValueError: If a name, a number or a batch is bad, or methods are for different kinds of
            targets or for one that has no report.
    """
    check_methods(methods)
    kind = kind_of_all(methods)
    score, risk = kind.checked_score(score), kind.checked_risk(risk)
    pair = Pair.of(list(methods), method, against, kind.opponents)
    data = test_loader, ood or {}, shift or {}
    found = Findings.of(kind, methods, *data, score, pair.judged, progress)
    resampling = Bootstrap() if bootstrap is None else bootstrap
    return _reported(found, pair, class_names(classes, found.test.outputs()), risk, resampling)


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
        kind: type[Examples],
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

        test = gathered(kind, methods, test_loader, score, watch, progress)
        shifted = {
            name: gathered(kind, methods, loader, score, None, progress)
            for name, loader in shift.items()
        }
        far = {name: outside(kind, methods, each, score, progress) for name, each in ood.items()}
        costs = first.costs(methods, kind)
        return cls(score, test, shifted, far, tuple(hardest.pictures), costs)

    def measured(self, risk: float | None, bootstrap: Bootstrap) -> dict[Metric, Sampled]:
        """All metrics of all methods."""
        found = _sampled(self.test, self.test.measures(risk), bootstrap)
        for name, scores in self.outside.items():
            statistic = statistics.auroc(self.test.scores, scores)
            metric = Metric(f"auroc {name}", f"AUROC, {name}", lower=False, digits=3)
            found[metric] = bootstrap.sampled(statistic, len(self.test), len(scores))
        for name, examples in self.shifted.items():
            found |= _sampled(examples, examples.shifted(name), bootstrap)
        return found


def check_methods(methods: Methods) -> None:
    """Check that there are two methods, fitted and of one device.

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
    """Names of all outputs; numbers if there are none.

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


def _sampled(
    examples: Examples, found: Mapping[Metric, statistics.Statistic], bootstrap: Bootstrap
) -> dict[Metric, Sampled]:
    """Metrics of one data set on its resamples."""
    return {name: bootstrap.sampled(statistic, len(examples)) for name, statistic in found.items()}


class _First:
    """The first batch of the test data, on which predictions are timed."""

    def __init__(self) -> None:
        self.batch: Inputs | None = None

    def __call__(self, x: Inputs) -> None:
        self.batch = x if self.batch is None else self.batch

    def costs(self, methods: Methods, kind: type[Examples]) -> list[tuple[float | None, int]]:
        """See `Findings.costs`."""
        models = [m for m in methods.values() if isinstance(m, Predictor)]
        found: list[tuple[float | None, int]] = []
        for method in methods.values():
            ratio = None
            if models and self.batch is not None and isinstance(method, Predictor):
                ratio = _forward_ratio(kind, method, models[0], self.batch)
            found.append((ratio, method.state_bytes))
        return found


@torch.no_grad()
def _forward_ratio(kind: type[Examples], method: Predictor, plain: Predictor, x: Inputs) -> float:
    forward, predict = (lambda: plain.network(x)), (lambda: kind.prediction(method, x))
    return forward_ratio(predict, forward, repeats=7, device=method._device)


def _reported(
    found: Findings, pair: Pair, classes: tuple[str, ...], risk: float | None, bootstrap: Bootstrap
) -> Report:
    table = found.measured(risk, bootstrap)
    rows = tuple(_row(name, i, table, pair, found.costs[i]) for i, name in enumerate(pair.names))
    return Report(
        rows,
        tuple(table),
        _verdict(rows, tuple(table), pair, bootstrap, len(found.test)),
        risk,
        found.score,
        found.test,
        found.outside,
        found.pictures,
        classes,
        found.test.gaps(pair, classes, bootstrap),
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
