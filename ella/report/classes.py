"""One class an example: what is kept, measured and shown."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ella.inputs import Inputs
from ella.likelihoods import Bernoulli, Discrete
from ella.metrics import risk_coverage
from ella.predictions import Predictive
from ella.report import figures, statistics
from ella.report.bootstrap import Bootstrap, Interval, Statistic
from ella.report.examples import SHOWN, Examples, Gap, Methods, uncertainty
from ella.report.metric import Metric, Pair
from ella.report.sections import Cell, Drawing, Section, Table, histograms
from ella.report.statistics import kept_at

if TYPE_CHECKING:
    from ella.report.result import Report

FEWEST = 20
"""Predictions of a class from which its gap is told."""


@dataclass(frozen=True)
class ClassGap(Gap):
    """How far confidence is from accuracy where a method says that it is a class.

    Attributes:
        name: Of the class.
        count: Test examples of which it says so.
        accuracy: Share of them that are.
        gap: Mean confidence less accuracy: above 0 it is over-confident.
        against: The same of the method compared with, where that one says so.
    """

    count: int
    accuracy: float
    gap: Interval
    against: float


class DiscreteExamples(Examples):
    """What classes and labels have in common: a prediction is probabilities."""

    @classmethod
    def prediction(cls, method: Predictive, x: Inputs) -> Tensor:
        """See `Examples.prediction`: probabilities."""
        return method.predict_proba(x)

    @classmethod
    def scores_of(cls, method: Predictive, x: Inputs, score: str) -> Tensor:
        """See `Examples.scores_of`."""
        return cls.scored(method, x, method.predict_proba(x), score)

    @staticmethod
    def scored(method: Predictive, x: Inputs, probs: Tensor, score: str) -> Tensor:
        """Scores, given the probabilities: these two need no second prediction."""
        likelihood = method.likelihood
        if isinstance(likelihood, Discrete) and score == "entropy":
            return likelihood.entropy(probs).double()
        if isinstance(likelihood, Discrete) and score == "confidence_deficit":
            return 1 - likelihood.confidence(probs).double()
        return uncertainty(method, x, score)


@dataclass(frozen=True)
class ClassExamples(DiscreteExamples):
    """N examples of one class each, and m methods.

    Attributes:
        num_classes: c.
        labels: Class indices, shape (n,).
        predicted: The most probable class, shape (n, m).
        confidence: Its probability, shape (n, m), float64.
        brier: Squared distance of the probabilities to the label, shape (n, m), float64.
        nll: −log of the label's probability, in nats, shape (n, m), float64.
        scores: Uncertainty, shape (n, m), float64.
    """

    num_classes: int
    labels: Tensor
    predicted: Tensor
    confidence: Tensor
    brier: Tensor
    plural: ClassVar[str] = "classes"

    def outputs(self) -> int:
        """See `Examples.outputs`: c."""
        return self.num_classes

    @property
    def correct(self) -> Tensor:
        """Whether the most probable class is the label, shape (n, m)."""
        return self.predicted == self.labels[:, None]

    @classmethod
    def of_batch(cls, methods: Methods, x: Inputs, y: Tensor, score: str) -> "ClassExamples":
        """See `Examples.of_batch`."""
        raws = [cls.prediction(method, x) for method in methods.values()]
        return cls.of_probabilities(methods, x, y, score, raws)

    @classmethod
    def of_probabilities(
        cls, methods: Methods, x: Inputs, y: Tensor, score: str, raws: Sequence[Tensor]
    ) -> "ClassExamples":
        """The same, given what `predict_proba` says: (n, c) each, or (n, 1) of one logit."""
        columns: list[tuple[Tensor, ...]] = []
        for method, raw in zip(methods.values(), raws, strict=True):
            probs = _class_probabilities(raw)
            labels, counted = _checked(method, y, raw)
            tiny = torch.finfo(raw.dtype).tiny
            own = probs.gather(1, labels.clamp(0, probs.shape[1] - 1)[:, None]).squeeze(1)
            confidence, said = probs.max(1)
            brier = probs.square().sum(1) - 2 * own + 1
            nll, scores = -own.clamp_min(tiny).log(), cls.scored(method, x, raw, score)
            found = (nll, scores, said, confidence.clamp_max(1), brier)
            columns.append(tuple(each[counted].cpu() for each in (labels, *found)))
        labels, nll, scores, said, confidence, brier = (
            torch.stack(each, 1) for each in zip(*columns, strict=True)
        )
        return cls(nll, scores, probs.shape[1], labels[:, 0], said, confidence, brier)

    def measures(self, risk: float | None) -> dict[Metric, Statistic]:
        """NLL, accuracy, Brier score, ECE, AURC and coverage at a risk."""
        correct, allowed = self.correct, self.checked_risk(risk) or 0.0
        selective = self.scores, ~correct
        share = Metric("coverage", f"coverage at {100 * allowed:g} % error", lower=False, digits=3)
        return {
            Metric("nll", "NLL", lower=True): statistics.mean_of(self.nll),
            Metric("accuracy", "accuracy", lower=False): statistics.mean_of(correct.double()),
            Metric("brier", "Brier", lower=True): statistics.mean_of(self.brier),
            Metric("ece", "ECE", lower=True): statistics.calibration_error(
                self.confidence, correct
            ),
            Metric("aurc", "AURC", lower=True, digits=5): statistics.area_under_risk_coverage(
                *selective
            ),
            share: statistics.coverage_at(*selective, allowed),
        }

    def shifted(self, name: str) -> dict[Metric, Statistic]:
        """NLL and ECE."""
        return {
            Metric(f"nll {name}", f"NLL, {name}", lower=True): statistics.mean_of(self.nll),
            Metric(f"ece {name}", f"ECE, {name}", lower=True): statistics.calibration_error(
                self.confidence, self.correct
            ),
        }

    def gaps(self, pair: Pair, names: Sequence[str], bootstrap: Bootstrap) -> tuple[ClassGap, ...]:
        """The classes whose confidence is farthest from accuracy, where the judged says so."""
        said = self.predicted
        counts = said[:, pair.judged].bincount(minlength=len(names))
        told = {}
        for c in (counts >= FEWEST).nonzero().flatten().tolist():
            told[c] = statistics.gap_where(
                said[:, pair.own] == c, self.confidence[:, pair.own], self.correct[:, pair.own]
            )
        ones = torch.ones(len(said), dtype=torch.float64)
        worst = sorted(told, key=lambda c: -abs(told[c](ones)[0].item()))[:SHOWN]
        gaps = []
        for c in worst:
            sampled = bootstrap.sampled(told[c], len(said))
            correct = self.correct[said[:, pair.judged] == c, pair.judged]
            accuracy, against = correct.double().mean().item(), sampled.estimates[1].item()
            gaps.append(ClassGap(names[c], int(counts[c]), accuracy, sampled.interval(0), against))
        return tuple(gaps)

    def sections(self, report: "Report") -> list[Section]:
        """Reliability, selective prediction, scores in and out, the worst classes."""
        found = [
            _reliability(self, report),
            _selective(self, report),
            histograms(report, report.score_name),
        ]
        return [*found, _worst(report)] if report.gaps else found

    def caption(self, report: "Report") -> tuple[str, str]:
        """See `Examples.caption`."""
        label, said = (
            report.classes[int(each)] for each in (self.labels[0], self.predicted[0, 0])
        )
        confidence = self.confidence[0, 0].item()
        caption = f"{label}, {'rightly' if self.correct[0, 0] else f'taken for {said}'}"
        return (
            f"of class {label}, predicted {said} with probability {confidence:.2f}",
            f"{caption} ({100 * confidence:.0f}\u00a0%)",
        )


def _class_probabilities(raw: Tensor) -> Tensor:
    """Shape (n, c) in float64, also of the one probability of a `Bernoulli`."""
    wide = raw.double()
    return torch.cat([1 - wide, wide], 1) if wide.shape[1] == 1 else wide


def _checked(method: Predictive, y: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
    """Class indices, and which of them count."""
    likelihood = method.likelihood
    if raw.ndim != 2:
        raise ValueError(
            f"The report is for one prediction an example; the model has outputs for every "
            f"position, {tuple(raw.shape)}. Use ella.metrics on predict_proba."
        )
    if isinstance(likelihood, Bernoulli) and raw.shape[1] > 1:
        raise ValueError(
            f"`methods` mixes kinds of targets: {type(method).__name__} has {raw.shape[1]} labels "
            f"of a Bernoulli, another one class an example."
        )
    labels = likelihood.check(y, raw.shape[1])
    weights = likelihood.weights(labels)
    counted = torch.ones(len(y), dtype=torch.bool) if weights is None else weights > 0
    return labels.reshape(len(y)).long(), counted.to(labels.device)


def _reliability(examples: ClassExamples, report: "Report") -> Section:
    """A diagram for each method."""
    found, (ece,) = [], [metric for metric in report.metrics if metric.key == "ece"]
    for i, row in enumerate(report.rows):
        confidence, correct = examples.confidence[:, i], examples.correct[:, i]
        error = ece.written(row.metrics["ece"].estimate)
        mean, accuracy = confidence.mean().item(), correct.double().mean().item()
        alt = (
            f"Reliability diagram of {row.method}: mean confidence {mean:.3f}, accuracy "
            f"{accuracy:.3f}, calibration error {error}."
        )
        source = figures.reliability(confidence, correct)
        found.append(Drawing(source, alt, f"{row.method}: ECE {error}"))
    note = (
        "A bar is the accuracy among predictions of that confidence, darker the more of them "
        "there are; the red part is the gap to the confidence, which a calibrated method does not "
        "have."
    )
    return Section("Is it as often right as it says?", note, tuple(found))


def _selective(examples: ClassExamples, report: "Report") -> Section:
    errors = {name: ~examples.correct[:, i] for i, name in enumerate(report.methods)}
    words = ("error", "the rest is right more often", "error rate among them")
    return selective(report, errors, words)


def selective(
    report: "Report", errors: Mapping[str, Tensor], words: tuple[str, str, str]
) -> Section:
    """Risk-coverage curves, and the coverage at the chosen risk with its threshold.

    Args:
        report: Whose scores.
        errors: Of each method, the error of each example, (n,).
        words: What is risked, what is gained, and the name of the axis.
    """
    what, gained, axis = words
    risk, risks, kept = report.risk or 0.0, {}, []
    for i, (name, wrong) in enumerate(errors.items()):
        scores = report.examples.scores[:, i]
        risks[name] = risk_coverage(scores, wrong)[1]
        share = kept_at(risks[name], risk)
        count = round(share * len(scores))
        threshold = f"{scores.sort().values[count - 1].item():.3g}" if count else "–"
        kept.append((name, (Cell(f"{100 * share:.1f} %"), Cell(threshold))))
    level = f"{100 * risk:g} % {what}"
    told = "; ".join(f"{name} {share.text}" for name, (share, _) in kept)
    subject = axis.partition(" among")[0].capitalize()
    alt = f"{subject} against coverage. Coverage at {level}: {told}."
    note = (
        f"Refuse the inputs of the highest {report.score_name}, and {gained}. The dots are the "
        f"largest share that keeps the error at or under {100 * risk:g} % on these test data; a "
        f"threshold for use is better chosen on other data, with a margin."
    )
    heads = ("method", "coverage", f"{report.score_name} at most")
    return Section(
        f"How much can be answered at {level}?",
        note,
        (Drawing(figures.risk_coverage_curves(risks, risk, axis), alt),),
        Table("Coverage", heads, tuple(kept), cards=False),
        layout="",
    )


def _worst(report: "Report") -> Section:
    against = report.verdict.against
    rows = tuple(
        (
            gap.name,
            (
                Cell(f"{gap.count:,}"),
                Cell(f"{gap.accuracy:.3f}"),
                Cell.signed(gap.gap),
                Cell(f"{gap.against:+.3f}".replace("-", "−")),
            ),
        )
        for gap in report.gaps
        if isinstance(gap, ClassGap)
    )
    heads = ("class", "said of", "accuracy", "confidence − accuracy", f"the same, {against}")
    note = (
        f"Where {report.verdict.method} says that an input is of the class, at least {FEWEST} "
        f"times. Above 0 it is over-confident. The worst of many classes are so by chance, too: "
        f"look at the intervals."
    )
    table = Table("Worst-calibrated classes", heads, rows)
    return Section("Worst-calibrated classes", note, table=table)
