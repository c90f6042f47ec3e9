"""The page of a report: one HTML file that needs nothing else."""

from importlib import resources
from types import ModuleType

from torch import Tensor

from ella.metrics import risk_coverage
from ella.metrics._extras import imported
from ella.report import figures
from ella.report.hardest import Picture
from ella.report.result import FEWEST, Metric, Report
from ella.report.statistics import kept_at

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
    side = report.verdict.difference.side
    found: str = template.render(
        title=title,
        verdict=report.verdict,
        tone=TONES[side],
        heading=f"By its NLL: {report.verdict.decision}",
        rows=report.rows,
        groups=_groups(report.metrics),
        score=report.score.replace("_", " "),
        risk=report.risk,
        gaps=report.gaps,
        fewest=FEWEST,
        signed=lambda value: f"{value:+.3f}".replace("-", "−"),
        reliability=_reliability(report),
        histograms=_histograms(report),
        pictures=[_picture(report, each) for each in report.pictures],
        **_selective(report),
    )
    return found


def _groups(metrics: tuple[Metric, ...]) -> dict[str, list[Metric]]:
    """The columns of each table."""
    groups: dict[str, list[Metric]] = {"test": [], "auroc": [], "shift": []}
    for metric in metrics:
        kind, _, source = metric.key.partition(" ")
        groups["auroc" if kind == "auroc" else "shift" if source else "test"].append(metric)
    return groups


def _reliability(report: Report) -> list[dict[str, str]]:
    """A diagram for each method."""
    found, (ece,) = [], [metric for metric in report.metrics if metric.key == "ece"]
    for i, row in enumerate(report.rows):
        confidence, correct = report.examples.confidence[:, i], report.examples.correct[:, i]
        error = ece.written(row.metrics["ece"].estimate)
        mean, accuracy = confidence.mean().item(), correct.double().mean().item()
        alt = (
            f"Reliability diagram of {row.method}: mean confidence {mean:.3f}, accuracy "
            f"{accuracy:.3f}, calibration error {error}."
        )
        source = figures.reliability(confidence, correct)
        found.append({"source": source, "alt": alt, "caption": f"{row.method}: ECE {error}"})
    return found


def _selective(report: Report) -> dict[str, object]:
    """Risk-coverage curves, and the coverage at the chosen risk with its threshold."""
    risks: dict[str, Tensor] = {}
    kept = []
    for i, name in enumerate(report.methods):
        scores = report.examples.scores[:, i]
        risks[name] = risk_coverage(scores, ~report.examples.correct[:, i])[1]
        share = kept_at(risks[name], report.risk)
        count = round(share * len(scores))
        threshold = f"{scores.sort().values[count - 1].item():.3g}" if count else "–"
        kept.append({"method": name, "coverage": f"{100 * share:.1f} %", "threshold": threshold})
    told = "; ".join(f"{each['method']} {each['coverage']}" for each in kept)
    alt = f"Error rate against coverage. Coverage at {100 * report.risk:g} % error: {told}."
    curves = {"source": figures.risk_coverage_curves(risks, report.risk), "alt": alt}
    return {"curves": curves, "kept": kept}


def _histograms(report: Report) -> list[dict[str, str]]:
    """Scores of each method, in and out of distribution."""
    found, score = [], report.score.replace("_", " ")
    for i, row in enumerate(report.rows):
        scores = {"test": report.examples.scores[:, i]}
        scores |= {name: each[:, i] for name, each in report.outside.items()}
        told = ", ".join(f"{name} {each.median().item():.3g}" for name, each in scores.items())
        alt = f"Histograms of the {score} by {row.method}; medians: {told}."
        source = figures.score_histogram(scores, score)
        found.append({"source": source, "alt": alt, "caption": row.method})
    return found


def _picture(report: Report, shown: Picture) -> dict[str, str]:
    label, predicted = report.classes[shown.label], report.classes[shown.predicted]
    kind = "Image" if shown.values.ndim == 3 else "Signal"
    caption = f"{label}, taken for {predicted} ({100 * shown.confidence:.0f}\u00a0%)"
    if shown.label == shown.predicted:
        caption = f"{label}, rightly ({100 * shown.confidence:.0f}\u00a0%)"
    alt = (
        f"{kind} of class {label}, predicted {predicted} with probability "
        f"{shown.confidence:.2f}, {report.score.replace('_', ' ')} {shown.score:.2f}."
    )
    return {"source": figures.picture(shown), "alt": alt, "caption": caption}
