"""The page of a report: one HTML file that needs nothing else."""

from importlib import resources
from types import ModuleType

from ella.metrics._extras import imported
from ella.report.metric import Metric
from ella.report.result import Report
from ella.report.sections import inputs, listed

TONES = {-1: "good", 0: "", 1: "bad"}


def page(report: Report, title: str) -> str:
    """The HTML; every value in it is escaped.

    Args:
        report: What it shows.
        title: Its heading.

    Raises:
        ImportError: Without `ella-laplace[metrics]`.
    """
    jinja: ModuleType = imported("jinja2")
    text = resources.files("ella.report").joinpath("page.html").read_text(encoding="utf-8")
    template = jinja.Environment(autoescape=True, undefined=jinja.StrictUndefined).from_string(
        text
    )
    side, groups = report.verdict.difference.side, _groups(report.metrics)
    sections = report.examples.sections(report)
    found: str = template.render(
        title=title,
        verdict=report.verdict,
        tone=TONES[side],
        heading=f"By its NLL: {report.verdict.decision}",
        rows=report.rows,
        groups=groups,
        less=listed([metric.title for metric in groups["test"] if metric.lower]),
        kind=report.examples,
        score=report.score_name,
        sections=[*sections, inputs(report)] if report.pictures else sections,
    )
    return found


def _groups(metrics: tuple[Metric, ...]) -> dict[str, list[Metric]]:
    """The columns of each table."""
    groups: dict[str, list[Metric]] = {"test": [], "auroc": [], "shift": []}
    for metric in metrics:
        kind, _, source = metric.key.partition(" ")
        groups["auroc" if kind == "auroc" else "shift" if source else "test"].append(metric)
    return groups
