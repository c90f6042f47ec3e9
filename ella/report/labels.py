"""Several labels an example, each yes or no: what is kept, measured and shown."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ella.inputs import Inputs
from ella.report import figures, statistics
from ella.report.bootstrap import Bootstrap, Interval, Statistic
from ella.report.classes import ClassExamples, DiscreteExamples, selective
from ella.report.examples import SHOWN, Examples, Gap, Methods
from ella.report.metric import Metric, Pair
from ella.report.sections import Cell, Drawing, Section, Table, histograms, listed

if TYPE_CHECKING:
    from ella.report.result import Report

NAMED = 3
"""Labels that a caption names."""


@dataclass(frozen=True)
class LabelGap(Gap):
    """How far the probability of a label is from its frequency, by the method that is judged.

    Attributes:
        name: Of the label.
        place: Of the label among the outputs.
        frequency: Share of the test examples that have it.
        gap: Mean probability less frequency.
        error: ECE of the label, 15 bins of equal width.
        against: ECE of the same by the method compared with.
    """

    place: int
    frequency: float
    gap: float
    error: Interval
    against: float


@dataclass(frozen=True)
class LabelExamples(DiscreteExamples):
    """N examples of c labels each, and m methods.

    Attributes:
        labels: Which labels apply, 0 or 1, shape (n, c), float64.
        probs: Probability of each, shape (n, c, m), float64.
        nll: −log probability of all labels of an example, in nats, shape (n, m), float64.
        scores: Uncertainty, shape (n, m), float64.
    """

    labels: Tensor
    probs: Tensor
    plural: ClassVar[str] = "labels"
    stranger: ClassVar[str] = "an input from elsewhere"
    strangers: ClassVar[str] = "inputs from elsewhere"
    remark: ClassVar[str] = (
        "NLL is a sum over the labels of an example, Brier and mAP are means over labels, ECE is "
        "over all labels of all examples."
    )

    def outputs(self) -> int:
        """See `Examples.outputs`: c."""
        return self.labels.shape[1]

    @property
    def wrong(self) -> Tensor:
        """Share of the labels of each example that are wrong, shape (n, m)."""
        return ((self.probs > 0.5) != self.labels.unsqueeze(2).bool()).double().mean(1)

    @classmethod
    def of_batch(cls, methods: Methods, x: Inputs, y: Tensor, score: str) -> Examples:
        """See `Examples.of_batch`; one logit is two classes."""
        raws = [cls.prediction(method, x) for method in methods.values()]
        if raws[0].ndim != 2 or raws[0].shape[1] == 1:
            return ClassExamples.of_probabilities(methods, x, y, score, raws)
        found = []
        for method, raw in zip(methods.values(), raws, strict=True):
            labels = method.likelihood.check(y, raw.shape[1])
            own = torch.where(labels > 0.5, raw, 1 - raw)
            losses = -own.clamp_min(torch.finfo(raw.dtype).tiny).double().log().sum(1)
            columns = losses, cls.scored(method, x, raw, score), raw.double()
            found.append(tuple(each.cpu() for each in columns))
        nll, scores, probs = (torch.stack(each, -1) for each in zip(*found, strict=True))
        return cls(nll, scores, labels.cpu(), probs)

    def measures(self, risk: float | None) -> dict[Metric, Statistic]:
        """NLL, Hamming error, subset accuracy, Brier score, ECE, mAP, AURC, coverage at a risk."""
        allowed, wrong = self.checked_risk(risk) or 0.0, self.wrong
        title = f"coverage at {100 * allowed:g} % wrong labels"
        squares = (self.probs - self.labels.unsqueeze(2)).square()
        found = {
            Metric("nll", "NLL", lower=True): statistics.mean_of(self.nll),
            Metric("hamming", "Hamming error", lower=True): statistics.mean_of(wrong),
            Metric("subset", "subset accuracy", lower=False): statistics.mean_of(
                (wrong == 0).double()
            ),
            Metric("brier", "Brier", lower=True): statistics.mean_of(squares.mean(1)),
            Metric("ece", "ECE", lower=True): self._calibration_error(),
        }
        if self.labels.any():
            found[Metric("map", "mAP", lower=False)] = statistics.mean_average_precision(
                self.probs, self.labels
            )
        area = statistics.area_under_risk_coverage(self.scores, wrong)
        found[Metric("aurc", "AURC", lower=True, digits=5)] = area
        share = statistics.coverage_at(self.scores, wrong, allowed)
        found[Metric("coverage", title, lower=False, digits=3)] = share
        return found

    def shifted(self, name: str) -> dict[Metric, Statistic]:
        """NLL and ECE."""
        return {
            Metric(f"nll {name}", f"NLL, {name}", lower=True): statistics.mean_of(self.nll),
            Metric(f"ece {name}", f"ECE, {name}", lower=True): self._calibration_error(),
        }

    def gaps(self, pair: Pair, names: Sequence[str], bootstrap: Bootstrap) -> tuple[LabelGap, ...]:
        """The labels with the largest ECE."""
        errors = [
            statistics.calibration_error(
                self.probs[:, c][:, pair.own], self.labels[:, c, None].expand(-1, 2)
            )
            for c in range(self.outputs())
        ]
        ones = torch.ones(len(self), dtype=torch.float64)
        worst = sorted(range(len(errors)), key=lambda c: -errors[c](ones)[0].item())[:SHOWN]
        found = []
        for c in worst:
            sampled, frequency = bootstrap.sampled(errors[c], len(self)), self.labels[:, c].mean()
            gap = (self.probs[:, c, pair.judged].mean() - frequency).item()
            error, against = sampled.interval(0), sampled.estimates[1].item()
            found.append(LabelGap(names[c], c, frequency.item(), gap, error, against))
        return tuple(found)

    def sections(self, report: "Report") -> list[Section]:
        """Reliability over all labels, the worst labels, selective prediction, scores."""
        errors = {name: self.wrong[:, i] for i, name in enumerate(report.methods)}
        words = ("wrong labels", "fewer labels of the rest are wrong", "share of wrong labels")
        return [
            _reliability(self, report),
            _worst(self, report),
            selective(report, errors, words),
            histograms(report, report.score_name),
        ]

    def caption(self, report: "Report") -> tuple[str, str]:
        """See `Examples.caption`."""
        said = self.probs[0, :, 0] > 0.5
        right, own = (self._named(each, report.classes) for each in (self.labels[0] > 0.5, said))
        wrong = int(self.wrong[0, 0] * self.outputs() + 0.5)
        count = "none" if wrong == 0 else f"{wrong} of {self.outputs()}"
        return f"with {right}, predicted {own}", f"{right}; said {own} ({count} wrong)"

    @staticmethod
    def _named(chosen: Tensor, names: Sequence[str]) -> str:
        there = [names[c] for c in chosen.nonzero().flatten().tolist()]
        more = [f"{len(there) - NAMED} more"] if len(there) > NAMED else []
        return listed([*there[:NAMED], *more]) or "no label"

    def _calibration_error(self) -> Statistic:
        """ECE of the probability of yes, over all labels of all examples."""
        pairs = self.labels.flatten()[:, None].expand(-1, self.probs.shape[2])
        error = statistics.calibration_error(self.probs.flatten(0, 1), pairs)
        return lambda counts: error(counts.repeat_interleave(self.outputs()))


YES_OR_NO = ("probability", "share of ones")
"""What a reliability diagram of a label compares."""


def _reliability(examples: LabelExamples, report: "Report") -> Section:
    """A diagram for each method, over all labels."""
    found, (ece,) = [], [metric for metric in report.metrics if metric.key == "ece"]
    labels = examples.labels.flatten()
    for i, row in enumerate(report.rows):
        probs = examples.probs[:, :, i].flatten()
        error = ece.written(row.metrics["ece"].estimate)
        alt = (
            f"Reliability diagram of {row.method} over all labels: mean probability "
            f"{probs.mean().item():.3f}, share of ones {labels.mean().item():.3f}, calibration "
            f"error {error}."
        )
        source = figures.reliability(probs, labels, YES_OR_NO)
        found.append(Drawing(source, alt, f"{row.method}: ECE {error}"))
    note = (
        "A bar is how often a label of that probability applies, darker the more of them there "
        "are; the red part is the gap to the probability, which a calibrated method does not have."
    )
    return Section("Do labels apply as often as it says?", note, tuple(found))


def _worst(examples: LabelExamples, report: "Report") -> Section:
    """Diagrams and numbers of the labels that the judged method is worst at."""
    verdict, judged = report.verdict, report.column(report.verdict.method)
    gaps = [gap for gap in report.gaps if isinstance(gap, LabelGap)]
    drawings, rows = [], []
    for gap in gaps:
        probs, labels = examples.probs[:, gap.place, judged], examples.labels[:, gap.place]
        error = f"{gap.error.estimate:.3f}"
        alt = f"Reliability diagram of the label {gap.name} by {verdict.method}: ECE {error}."
        source = figures.reliability(probs, labels, YES_OR_NO)
        drawings.append(Drawing(source, alt, f"{gap.name}: ECE {error}"))
        gap_text = f"{gap.gap:+.3f}".replace("-", "−")
        cells = (Cell(f"{gap.frequency:.3f}"), Cell(gap_text), Cell.plain(gap.error))
        rows.append((gap.name, (*cells, Cell(f"{gap.against:.3f}"))))
    heads = (
        "label",
        "frequency",
        "mean probability − frequency",
        "ECE",
        f"the same, {verdict.against}",
    )
    note = (
        f"By the calibration error of {verdict.method}, label by label. The worst of many labels "
        f"are so by chance, too, and errors of rare ones are noise: look at the intervals."
    )
    table = Table("Worst-calibrated labels", heads, tuple(rows))
    return Section("Worst-calibrated labels", note, tuple(drawings), table, layout="grid")
