"""What a report says: a row for each method, and a verdict."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from ella.report.bootstrap import Interval
from ella.report.examples import Examples, Gap
from ella.report.hardest import Picture
from ella.report.metric import Metric

if TYPE_CHECKING:
    import os

NO_DIFFERENCE = "no difference that these data can show"
MARKS = {1: " ▲", -1: " ▼", 0: ""}


@dataclass(frozen=True)
class Row:
    """One method.

    Attributes:
        method: Its name.
        metrics: By key, its value with a bootstrap interval.
        differences: By key, the value less that of the method compared with, with the interval of
            the paired difference; empty for that method itself.
        predict_ratio: Seconds of a prediction over those of the forward pass; None if the methods
            have no model to time.
        state_bytes: What prediction needs beyond the model.
    """

    method: str
    metrics: Mapping[str, Interval]
    differences: Mapping[str, Interval]
    predict_ratio: float | None
    state_bytes: int

    def better(self, metric: Metric) -> int:
        """1 if it is better than what is compared with, −1 if worse, 0 if that is not clear."""
        difference = self.differences.get(metric.key)
        return 0 if difference is None else metric.better(difference)


@dataclass(frozen=True)
class Verdict:
    """Whether a method is worth it, by its NLL against another's.

    Attributes:
        method: Who is judged.
        against: By whose NLL.
        difference: NLL of the method less that of the other, in nats, with its paired interval.
        level: Probability of the interval.
        num_resamples: Of the bootstrap.
        num_examples: Of the test data.
        better: What else is better, as words; by paired intervals, too.
        worse: What is worse.
    """

    method: str
    against: str
    difference: Interval
    level: float
    num_resamples: int
    num_examples: int
    better: tuple[str, ...] = ()
    worse: tuple[str, ...] = ()

    @property
    def decision(self) -> str:
        """What to do, by the side of 0 on which the interval lies."""
        return {-1: "use it", 1: "do not", 0: NO_DIFFERENCE}[self.difference.side]

    @property
    def sentence(self) -> str:
        """The difference, its interval and the decision."""
        found = self.difference
        where = "above" if found.estimate > 0 else "below"
        ends = f"{found.low:+.4f} to {found.high:+.4f}".replace("-", "−")
        return (
            f"The NLL of {self.method} is {abs(found.estimate):.4f} {where} that of "
            f"{self.against} ({100 * self.level:g} % interval of the difference {ends}, paired, "
            f"{self.num_resamples:,} bootstrap samples of {self.num_examples:,} test examples): "
            f"{self.decision}."
        )

    @property
    def beside(self) -> str:
        """What else differs, in a sentence; each by its own interval, so some may be chance."""
        parts = [
            f"{word} in {', '.join(what)}"
            for word, what in (("better", self.better), ("worse", self.worse))
            if what
        ]
        if not parts:
            return f"In nothing else measured can it be told from {self.against}."
        return f"Beside the NLL it is {'; '.join(parts)}."


@dataclass(frozen=True, eq=False)
class Report:
    """What `evaluate` found.

    Attributes:
        rows: One for each method, in the order given.
        metrics: What the rows hold, in the order of the table.
        verdict: On one method.
        risk: The error that selective prediction is to keep, if one is chosen.
        score: The uncertainty score.
        examples: What the methods say of the test data; its class is the kind of target.
        outside: Scores out of distribution, shape (n', m), by the name of the source.
        pictures: The test inputs of which the judged method is least certain, if they can be
            shown.
        classes: Names of the classes, labels or targets.
        gaps: Those that the judged method does worst, worst first.
    """

    rows: tuple[Row, ...]
    metrics: tuple[Metric, ...]
    verdict: Verdict
    risk: float | None
    score: str
    examples: Examples
    outside: Mapping[str, Tensor]
    pictures: tuple[Picture, ...]
    classes: tuple[str, ...]
    gaps: tuple[Gap, ...]

    @property
    def methods(self) -> list[str]:
        """Their names, in order."""
        return [row.method for row in self.rows]

    @property
    def score_name(self) -> str:
        """The score in words."""
        return self.score.replace("_", " ")

    def column(self, method: str) -> int:
        """The place of a method in the columns of `examples` and `outside`."""
        return self.methods.index(method)

    def to_markdown(self) -> str:
        """The verdict and the table, a row for each method; see `legend`."""
        titles = ["method", *(metric.title for metric in self.metrics)]
        lines = [[*titles, "predict × forward", "state bytes"]]
        lines.append(["---", *("---:" for _ in lines[0][1:])])
        for row in self.rows:
            cells = [self._cell(row, metric) for metric in self.metrics]
            ratio = "–" if row.predict_ratio is None else f"{row.predict_ratio:.1f}"
            lines.append([row.method, *cells, ratio, f"{row.state_bytes:,}"])
        escaped = (" | ".join(cell.replace("|", "\\|") for cell in line) for line in lines)
        table = "\n".join(f"| {line} |" for line in escaped)
        return f"{self.verdict.sentence} {self.verdict.beside}\n\n{table}\n\n{self.legend}\n"

    @property
    def legend(self) -> str:
        """What the table shows."""
        verdict = self.verdict
        return (
            f"{verdict.num_examples:,} test examples; in brackets {100 * verdict.level:g} % "
            f"intervals over {verdict.num_resamples:,} bootstrap samples. ▲ better, ▼ worse than "
            f"{verdict.against}: the interval of the paired difference excludes 0."
        )

    def to_json(self) -> str:
        """Everything but the examples, as JSON."""
        found = {
            "verdict": {
                **asdict(self.verdict),
                "decision": self.verdict.decision,
                "sentence": self.verdict.sentence,
            },
            "risk": self.risk,
            "score": self.score,
            "metrics": [asdict(metric) for metric in self.metrics],
            "rows": [asdict(row) for row in self.rows],
            self.examples.plural: [asdict(gap) for gap in self.gaps],
        }
        return json.dumps(found, indent=2, allow_nan=False, ensure_ascii=False)

    def to_html(self, path: "str | os.PathLike[str]", title: str = "Uncertainty report") -> Path:
        """Write one page that needs nothing else: no network, no scripts, light and dark.

        Args:
            path: Where to; an old file is replaced.
            title: Its heading.

        Returns:
            The path.

        Raises:
            ImportError: Without `ella-laplace[metrics]`.
            OSError: If it cannot be written.
        """
        from ella.report.page import page  # it needs matplotlib and Jinja

        target = Path(path)
        target.write_text(page(self, title), encoding="utf-8")
        return target

    def _cell(self, row: Row, metric: Metric) -> str:
        found = row.metrics[metric.key]
        ends = f"{metric.written(found.low)}, {metric.written(found.high)}"
        return f"{metric.written(found.estimate)} [{ends}]{MARKS[row.better(metric)]}"
