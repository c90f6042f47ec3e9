"""What a page is made of: sections with drawings and tables, as plain data."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from ella.report import figures

if TYPE_CHECKING:
    from ella.report.bootstrap import Interval
    from ella.report.result import Report


@dataclass(frozen=True)
class Drawing:
    """An image with what it says in words.

    Attributes:
        source: Its address.
        alt: What it shows.
        caption: Under it.
    """

    source: str
    alt: str
    caption: str = ""


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        text: What it says.
        ends: The interval, in small letters.
    """

    text: str
    ends: str = ""

    @classmethod
    def signed(cls, found: "Interval") -> "Cell":
        """A difference with its interval."""
        return cls(sign(found.estimate), f"{sign(found.low)} to {sign(found.high)}")

    @classmethod
    def plain(cls, found: "Interval") -> "Cell":
        """A value with its interval."""
        return cls(f"{found.estimate:.3f}", f"{found.low:.3f} to {found.high:.3f}")


@dataclass(frozen=True)
class Table:
    """A table whose first column names the rows.

    Attributes:
        label: Its name.
        heads: Of all columns.
        rows: A name and its cells.
        cards: Whether rows become cards where the page is narrow.
    """

    label: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]
    cards: bool = True


@dataclass(frozen=True)
class Section:
    """A heading and what is under it.

    Attributes:
        heading: A question or a name.
        note: How to read it.
        drawings: Images.
        table: Below them.
        layout: "small" for drawings side by side, "grid" for many of them, "inputs" for small
            pictures, "" for one.
    """

    heading: str
    note: str
    drawings: tuple[Drawing, ...] = ()
    table: Table | None = None
    layout: str = "small"


def sign(value: float) -> str:
    """A number with its sign."""
    return f"{value:+.3f}".replace("-", "−")


def significant(value: float) -> str:
    """Three digits."""
    return f"{value:.3g}".replace("-", "−")


def histograms(report: "Report", xlabel: str, edges: Tensor | None = None) -> Section:
    """Scores of each method, in and out of distribution.

    Args:
        report: Whose scores.
        xlabel: Of the scores.
        edges: Of bins; None takes the range of each method.
    """
    found, kind = [], type(report.examples)
    for i, row in enumerate(report.rows):
        scores = {"test": report.examples.scores[:, i]}
        scores |= {name: each[:, i] for name, each in report.outside.items()}
        told = ", ".join(f"{name} {each.median().item():.3g}" for name, each in scores.items())
        alt = f"Histograms of the {report.score_name} by {row.method}; medians: {told}."
        source = figures.score_histogram(scores, xlabel, edges)
        found.append(Drawing(source, alt, row.method))
    others = f" and of {kind.strangers}: the less they overlap, the better"
    note = f"The {report.score_name} of test inputs{others if report.outside else ''}."
    return Section("Does it know what it does not know?", note, tuple(found))


def inputs(report: "Report") -> Section:
    """The most uncertain inputs."""
    found = []
    for shown in report.pictures:
        alt, caption = shown.example.caption(report)
        kind = "Image" if shown.values.ndim == 3 else "Signal"
        text = f"{kind} {alt}, {report.score_name} {shown.score:.2f}."
        found.append(Drawing(figures.picture(shown.values), text, caption))
    note = (
        f"By the {report.score_name} of {report.verdict.method}, highest first. Look whether you "
        f"could tell, and whether the labels are right."
    )
    return Section("The most uncertain test inputs", note, tuple(found), layout="inputs")


def listed(words: Sequence[str]) -> str:
    """Words with commas, and "and" before the last."""
    return " and ".join(part for part in (", ".join(words[:-1]), *words[-1:]) if part)
