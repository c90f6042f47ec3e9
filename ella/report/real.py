"""Real targets with Gaussian predictions: what is kept, measured and shown."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ella.inputs import Inputs
from ella.predictions import Predictive
from ella.report import figures, statistics
from ella.report.bootstrap import Bootstrap, Interval, Statistic
from ella.report.examples import SHOWN, Examples, Gap, Methods, uncertainty
from ella.report.figures import shared_edges
from ella.report.metric import Metric, Pair
from ella.report.sections import (
    Cell,
    Drawing,
    Section,
    Table,
    histograms,
    listed,
    significant,
)
from ella.report.statistics import kept_at, retained_errors

if TYPE_CHECKING:
    from ella.report.result import Report

TUNED = "MAP, noise tuned"
"""The model with one number tuned, σ²: what temperature scaling is to classes."""
DEVIATION = "standard_deviation"
LEVELS = (0.5, 0.95)
"""Of the intervals whose coverage is told."""
SHARES = (0.5, 0.8, 0.9, 1.0)
"""Of the examples that are kept, surest first."""
NAMED = 2
"""Targets that a caption has."""
HIGHEST = 0.99
"""Share of the deviations that histograms show; the rest is in the last bin."""


@dataclass(frozen=True)
class TargetGap(Gap):
    """One of several targets, by the method that is judged.

    Attributes:
        name: Of the target.
        nll: Mean negative log density, in nats.
        difference: That less the same of the method compared with.
        rmse: In units of the target.
        half: Coverage of central 50 % intervals.
        most: Coverage of central 95 % intervals.
    """

    nll: float
    difference: Interval
    rmse: float
    half: float
    most: float


@dataclass(frozen=True)
class RealExamples(Examples):
    """N examples of c real targets each, and m methods that predict a Gaussian for each.

    The score `standard_deviation` is the geometric mean over targets of the predictive standard
    deviation, noise included: of one target, itself; of several, what ranks as the entropy does,
    whatever their units.

    Attributes:
        targets: Shape (n, c), float64.
        means: Shape (n, c, m), float64.
        variances: Noise included, shape (n, c, m), float64.
        nll: −log of the density of all targets of an example, in nats, shape (n, m), float64.
        scores: Uncertainty, shape (n, m), float64.
    """

    targets: Tensor
    means: Tensor
    variances: Tensor
    plural: ClassVar[str] = "targets"
    opponents: ClassVar[tuple[str, ...]] = (TUNED, "MAP")
    own_scores: ClassVar[tuple[str, ...]] = (DEVIATION,)
    risk: ClassVar[float | None] = None
    stranger: ClassVar[str] = "an input from elsewhere"
    strangers: ClassVar[str] = "inputs from elsewhere"
    remark: ClassVar[str] = (
        "NLL is in nats, RMSE and widths are in units of the targets, AURC in their squares: the "
        "squared error among the surest, averaged over all shares of examples. Errors of coverage "
        "and quantiles are distances from what they should be. Narrow intervals are better "
        "only where their coverage is right."
    )

    @classmethod
    def checked_risk(cls, risk: float | None) -> float | None:
        """The RMSE that selective prediction is to keep, in units of the targets.

        Raises:
            ValueError: If it is not above 0.
        """
        if risk is not None and not 0 < risk < math.inf:
            raise ValueError(f"`risk`, an RMSE, must be above 0 and finite; got {risk!r}.")
        return risk

    def outputs(self) -> int:
        """See `Examples.outputs`: c."""
        return self.targets.shape[1]

    @property
    def errors(self) -> Tensor:
        """Targets less means, shape (n, c, m)."""
        return self.targets.unsqueeze(2) - self.means

    @property
    def squares(self) -> Tensor:
        """Squared errors, mean over the targets, shape (n, m)."""
        return self.errors.square().mean(1)

    @property
    def quantiles(self) -> Tensor:
        """Probability of a lower target, Φ((y − m)/s), shape (n, c, m): uniform if calibrated."""
        return torch.special.ndtr(self.errors / self.variances.sqrt())

    def covered(self, level: float) -> Tensor:
        """Whether targets are in their central interval, shape (n, c, m)."""
        z = NormalDist().inv_cdf((1 + level) / 2)
        return self.errors.abs() <= z * self.variances.sqrt()

    @classmethod
    def of_batch(cls, methods: Methods, x: Inputs, y: Tensor, score: str) -> "RealExamples":
        """See `Examples.of_batch`."""
        columns = []
        for method in methods.values():
            mean, variance = cls.prediction(method, x)
            if len(mean) != len(y):
                raise ValueError(
                    f"The report is for one prediction an example; the model has outputs for "
                    f"every position: {len(mean)} rows for {len(y)} examples."
                )
            targets = method.likelihood.check(y, mean.shape[1]).double()
            losses = (targets - mean).square() / variance + (2 * math.pi * variance).log()
            scores = cls._scored(method, x, variance, score)
            found = 0.5 * losses.sum(1), scores, mean, variance
            columns.append(tuple(each.cpu() for each in found))
        nll, scores, *rest = (torch.stack(each, -1) for each in zip(*columns, strict=True))
        return cls(nll, scores, targets.cpu(), *rest)

    @classmethod
    def prediction(cls, method: Predictive, x: Inputs) -> tuple[Tensor, Tensor]:
        """Mean and variance, noise included, both (n, c) and float64."""
        gaussian, noise = method.gaussian(x), method._require_fitted().noise_variance
        return gaussian.mean.double(), gaussian.variance().double() + noise

    @classmethod
    def scores_of(cls, method: Predictive, x: Inputs, score: str) -> Tensor:
        """See `Examples.scores_of`."""
        if score != DEVIATION:
            return uncertainty(method, x, score)
        return cls._scored(method, x, cls.prediction(method, x)[1], score)

    @staticmethod
    def _scored(method: Predictive, x: Inputs, variance: Tensor, score: str) -> Tensor:
        if score != DEVIATION:
            return uncertainty(method, x, score)
        return (0.5 * variance.log().mean(1)).exp()

    def measures(self, risk: float | None) -> dict[Metric, Statistic]:
        """NLL, RMSE, coverage and width of intervals, quantiles, AURC, coverage at a risk."""
        squares, digits = self.squares, digits_of(self.squares.mean().item() ** 0.5)
        found = {
            Metric("nll", "NLL", lower=True): statistics.mean_of(self.nll),
            Metric("rmse", "RMSE", lower=True, digits=digits): statistics.root_mean_of(squares),
        }
        for level in reversed(LEVELS):
            title = f"error of {100 * level:g} % coverage"
            metric = Metric(f"off_{100 * level:g}", title, lower=True)
            found[metric] = statistics.distance_from(self.covered(level).double().mean(1), level)
        width = 2 * NormalDist().inv_cdf((1 + LEVELS[-1]) / 2) * self.variances.sqrt().mean(1)
        title = f"width of {100 * LEVELS[-1]:g} % intervals"
        found[Metric("width", title, lower=None, digits=digits)] = statistics.mean_of(width)
        found[Metric("quantiles", "error of quantiles", lower=True)] = statistics.quantile_error(
            self.quantiles
        )
        found[Metric("aurc", "AURC", lower=True, digits=digits_of(squares.mean().item()) + 1)] = (
            statistics.area_under_retention(self.scores, squares)
        )
        if risk is not None:
            metric = Metric("coverage", f"coverage at RMSE {risk:g}", lower=False, digits=3)
            found[metric] = statistics.retained_at(self.scores, squares, risk**2)
        return found

    def shifted(self, name: str) -> dict[Metric, Statistic]:
        """NLL and coverage of 95 % intervals."""
        level = LEVELS[-1]
        title = f"error of {100 * level:g} % coverage, {name}"
        inside = self.covered(level).double().mean(1)
        return {
            Metric(f"nll {name}", f"NLL, {name}", lower=True): statistics.mean_of(self.nll),
            Metric(f"off_{100 * level:g} {name}", title, lower=True): statistics.distance_from(
                inside, level
            ),
        }

    def gaps(
        self, pair: Pair, names: Sequence[str], bootstrap: Bootstrap
    ) -> tuple[TargetGap, ...]:
        """The targets whose NLL is worst against the other method, worst first."""
        ratios = self.errors.square() / self.variances
        losses = 0.5 * (ratios + (2 * math.pi * self.variances).log())
        count = self.outputs()
        sampled = bootstrap.sampled(
            statistics.mean_of(losses[..., pair.own].mT.flatten(1)), len(self)
        )
        half, most = (self.covered(level)[..., pair.judged].double().mean(0) for level in LEVELS)
        rmse = self.errors[..., pair.judged].square().mean(0).sqrt()
        found = [
            TargetGap(
                name,
                sampled.estimates[i].item(),
                sampled.difference(i, count + i),
                *(each[i].item() for each in (rmse, half, most)),
            )
            for i, name in enumerate(names)
        ]
        return tuple(sorted(found, key=lambda gap: -gap.difference.estimate)[:SHOWN])

    def sections(self, report: "Report") -> list[Section]:
        """Quantiles, what is left when the uncertain go, deviations, the targets."""
        scores = [self.scores, *report.outside.values()]
        top = torch.stack([each.quantile(HIGHEST, dim=0).max() for each in scores])
        low = torch.stack([each.min() for each in scores])
        deviations = histograms(report, report.score_name, shared_edges([low, top], 30))
        return [_quantiles(self, report), _retention(self, report), deviations, _targets(report)]

    def caption(self, report: "Report") -> tuple[str, str]:
        """See `Examples.caption`."""
        said = [
            f"{significant(mean)} ± {significant(variance**0.5)}"
            for mean, variance in torch.cat([self.means, self.variances], 2)[0, :NAMED].tolist()
        ]
        right = [significant(value) for value in self.targets[0, :NAMED].tolist()]
        rest = ", …" if self.outputs() > NAMED else ""
        own, expected = f"{', '.join(said)}{rest}", f"{', '.join(right)}{rest}"
        return f"with target {expected}, predicted {own}", f"{expected}; said {own}"


def digits_of(size: float) -> int:
    """Digits after the point with which a number of this size has four that count."""
    return 4 if size <= 0 else min(max(3 - math.floor(math.log10(size)), 0), 12)


def _quantiles(examples: RealExamples, report: "Report") -> Section:
    """How many targets lie below each predicted quantile."""
    (error,) = [metric for metric in report.metrics if metric.key == "quantiles"]
    levels = torch.linspace(0, 1, 101, dtype=torch.float64)
    quantiles, told = examples.quantiles.flatten(0, 1), []
    shares = {
        name: (quantiles[:, i, None] <= levels).double().mean(0)
        for i, name in enumerate(report.methods)
    }
    for row in report.rows:
        told.append(f"{row.method} {error.written(row.metrics['quantiles'].estimate)}")
    alt = f"Share of targets below each predicted quantile; mean distance: {'; '.join(told)}."
    note = (
        "Of the targets, p should lie below the quantile that is predicted for p: the curve of a "
        "calibrated method is the diagonal. Flat in the middle and steep at the ends: intervals "
        "are too narrow. The other way round: too wide."
    )
    drawing = Drawing(figures.quantile_curves(levels, shares), alt)
    coverage = tuple(
        (
            name,
            tuple(
                Cell(f"{100 * examples.covered(level)[..., i].double().mean().item():.1f} %")
                for level in LEVELS
            ),
        )
        for i, name in enumerate(report.methods)
    )
    heads = ("method", *(f"targets in {100 * level:g} % intervals" for level in LEVELS))
    table = Table("Coverage of intervals", heads, coverage, cards=False)
    return Section("Do intervals hold what they promise?", note, (drawing,), table, layout="")


def _retention(examples: RealExamples, report: "Report") -> Section:
    """What error is left among the surest."""
    curves, rows, risk = {}, [], report.risk
    for i, name in enumerate(report.methods):
        scores, squares = examples.scores[:, i], examples.squares[:, i]
        mean_squares = retained_errors(scores, squares)
        curves[name] = mean_squares.sqrt()
        digits = digits_of(squares.mean().item() ** 0.5)
        places = [max(1, round(share * len(scores))) - 1 for share in SHARES]
        cells = [Cell(f"{curves[name][place].item():.{digits}f}") for place in places]
        if risk is not None:
            cells.append(Cell(f"{100 * kept_at(mean_squares, risk**2):.1f} %"))
        rows.append((name, tuple(cells)))
    heads = ["method", *(f"RMSE, surest {100 * share:g} %" for share in SHARES)]
    heads += [] if risk is None else [f"coverage at RMSE {risk:g}"]
    told = "; ".join(f"{name} {listed([cell.text for cell in cells])}" for name, cells in rows)
    alt = f"RMSE among the surest examples against their share; {', '.join(heads[1:])}: {told}."
    note = (
        f"Set the inputs of the highest {report.score_name} aside, and the error of the rest "
        f"falls if the method knows where it errs. Inputs of the same {report.score_name} are set "
        f"aside in random order: a method with one {report.score_name} for all has a flat line."
    )
    source = figures.risk_coverage_curves(curves, risk, "RMSE among them", "lower right")
    table = Table("RMSE among the surest", tuple(heads), tuple(rows))
    heading = "How much error is left without the most uncertain?"
    return Section(heading, note, (Drawing(source, alt),), table, layout="")


def _targets(report: "Report") -> Section:
    against = report.verdict.against
    rows = tuple(
        (
            gap.name,
            (
                Cell(f"{gap.nll:.4f}"),
                Cell.signed(gap.difference),
                Cell(f"{gap.rmse:.{digits_of(gap.rmse)}f}"),
                Cell(f"{100 * gap.half:.1f} %"),
                Cell(f"{100 * gap.most:.1f} %"),
            ),
        )
        for gap in report.gaps
        if isinstance(gap, TargetGap)
    )
    heads = ("target", "NLL", f"less that of {against}", "RMSE")
    coverage = tuple(f"in {100 * level:g} % intervals" for level in LEVELS)
    note = (
        f"By {report.verdict.method}, those first whose NLL is worst against {against}. With one "
        f"noise variance for all, targets of different units or noise cannot all be calibrated."
    )
    return Section("Each target", note, table=Table("Each target", (*heads, *coverage), rows))
