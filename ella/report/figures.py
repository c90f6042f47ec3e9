"""The pictures of a report, by matplotlib (`ella-laplace[metrics]`), as text for a page."""

import base64
import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ella.metrics._extras import imported
from ella.metrics.reliability import draw_reliability
from ella.report.hardest import scaled
from ella.report.statistics import kept_at

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#4477AA", "#EE6677", "#2E9B57", "#B8860B", "#AA55AA", "#2AA5B8", "#888888")
"""Told apart by most colour-blind people, and from white and from near-black alike."""
DASHES = ("-", "--", "-.", ":")
POINTS = 400
"""Of a curve."""


def reliability(
    confidence: Tensor, correct: Tensor, names: tuple[str, str] = ("confidence", "accuracy")
) -> str:
    """Accuracy against confidence of one method, (n,) each, as an image's address.

    Args:
        confidence: Or any probability.
        correct: Whether it happened.
        names: What the two are called.
    """
    figure = new_figure(3.2, 3.2)
    panel = figure.subplots()
    draw_reliability(panel, confidence, correct.long())
    panel.set_xlabel(names[0])
    panel.set_ylabel(names[1])
    handles = panel.get_legend_handles_labels()[0]
    labels = [names[1], f"gap to {names[0]}"]
    panel.legend(handles, labels, loc="upper left", fontsize=8, frameon=False)
    return svg(figure)


def quantile_curves(levels: Tensor, shares: Mapping[str, Tensor]) -> str:
    """Shares of targets below predicted quantiles, as an image's address.

    Args:
        levels: Of the quantiles, shape (q,).
        shares: Of each method, shape (q,).
    """
    figure = new_figure(4.2, 3.8)
    panel = figure.subplots()
    panel.plot([0, 1], [0, 1], color="0.5", linewidth=1, linestyle=":")
    for i, (name, each) in enumerate(shares.items()):
        line, color = DASHES[i % len(DASHES)], COLORS[i % len(COLORS)]
        panel.plot(levels.numpy(), each.numpy(), line, color=color, label=name)
    panel.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    panel.set_xlabel("predicted probability of a lower target")
    panel.set_ylabel("share of targets that are lower")
    panel.legend(fontsize=8, frameon=False, loc="upper left")
    _plain(panel)
    return svg(figure)


def risk_coverage_curves(
    risks: Mapping[str, Tensor],
    risk: float | None,
    ylabel: str = "error rate among them",
    legend: Literal["upper left", "lower right"] = "upper left",
) -> str:
    """Error rates of the 1, 2, ..., n surest examples of each method, as an image's address.

    Args:
        risks: By method.
        risk: The one that is allowed, if one is chosen.
        ylabel: What the rates are.
        legend: Where the legend is.
    """
    figure = new_figure(4.8, 3.4)
    panel = figure.subplots()
    top = max(each[len(each) // 10 :].max().item() for each in risks.values())
    for i, (name, each) in enumerate(risks.items()):
        color = COLORS[i % len(COLORS)]
        coverage = torch.arange(1, len(each) + 1, dtype=torch.float64) / len(each)
        shown = torch.linspace(0, len(each) - 1, min(POINTS, len(each))).long()
        line = DASHES[i % len(DASHES)]
        panel.plot(coverage[shown].numpy(), each[shown].numpy(), line, color=color, label=name)
        if risk is not None and (kept := kept_at(each, risk)):
            panel.plot([kept], [risk], "o", color=color, markersize=5, clip_on=False)
    if risk is not None:
        panel.axhline(risk, color="0.5", linewidth=1, linestyle=":")
    panel.set(xlim=(0, 1), ylim=(0, 1.1 * max(top, risk or 0.0)))
    panel.set_xlabel("coverage: share of examples that are answered")
    panel.set_ylabel(ylabel)
    panel.legend(fontsize=8, frameon=False, loc=legend)
    _plain(panel)
    return svg(figure)


def score_histogram(scores: Mapping[str, Tensor], name: str, edges: Tensor | None = None) -> str:
    """Scores of one method on several data sets, as an image's address.

    Args:
        scores: By data set.
        name: Of the score.
        edges: Of the bins; the last one also holds what is higher. None takes the range.
    """
    size = (3.1, 2.6)
    if edges is None:
        return svg(uncertainty_histograms({"": scores}, xlabel=name, size=size))
    figure = new_figure(*size)
    panel = _plain(figure.subplots())
    held = {label: each.clamp_max(edges[-1]) for label, each in scores.items()}
    draw_histograms(panel, held, edges)
    panel.set_ylabel("share of examples")
    panel.legend(frameon=False, fontsize=8)
    figure.supxlabel(name, fontsize=10)
    return svg(figure)


def uncertainty_histograms(
    scores: Mapping[str, Mapping[str, Tensor]],
    *,
    xlabel: str = "predictive entropy (nats)",
    bins: int = 30,
    size: tuple[float, float] = (2.8, 2.6),
) -> "Figure":
    """Histograms of an uncertainty score in and out of distribution, one panel a method.

    Args:
        scores: By the title of the panel and the name of the data set, scores of shape (n,); the
            data in distribution first.
        xlabel: Name of the score.
        bins: Number of bins of equal width, the same in all panels.
        size: Of a panel, in inches.

    Returns:
        A figure that belongs to no window and no global state; save it with `figure.savefig`.

    Raises:
        ImportError: Without `ella-laplace[metrics]`.
        ValueError: If there are no scores.
    """
    sets = [each for by_name in scores.values() for each in by_name.values()]
    if not sets:
        raise ValueError("`scores` is empty: expected at least one method with one data set.")
    ends = shared_edges(sets, bins)
    figure = new_figure(size[0] * len(scores), size[1])
    panels = figure.subplots(1, len(scores), sharex=True, squeeze=False)[0]
    for panel, (method, by_name) in zip(panels, scores.items(), strict=True):
        draw_histograms(_plain(panel), by_name, ends)
        panel.set_title(method, fontsize=10)
    panels[0].set_ylabel("share of examples")
    panels[-1].legend(frameon=False, fontsize=8)
    figure.supxlabel(xlabel, fontsize=10)
    return figure


def draw_histograms(panel: "Axes", scores: Mapping[str, Tensor], edges: Tensor) -> None:
    """Shares of examples in each bin; of more than two data sets, the others as outlines."""
    filled, ends = len(scores) < 3, edges.tolist()
    for i, (label, each) in enumerate(scores.items()):
        values = each.detach().cpu().double().numpy()
        style = {"alpha": 0.6} if filled or i == 0 else {"histtype": "step", "linewidth": 1.5}
        panel.hist(
            values,
            ends,
            weights=[1 / len(values)] * len(values),
            color=COLORS[i % len(COLORS)],
            label=label,
            **style,
        )


def shared_edges(scores: Sequence[Tensor], bins: int) -> Tensor:
    """Ends of bins of equal width that hold all scores, (bins + 1,)."""
    low = min(each.min().item() for each in scores)
    high = max(each.max().item() for each in scores)
    return torch.linspace(low, max(high, low + 1e-6), bins + 1, dtype=torch.float64)


def picture(values: Tensor) -> str:
    """An image (1|3, h, w) or a signal (length,), as an image's address."""
    if values.ndim == 3:
        buffer, image = io.BytesIO(), scaled(values)
        pixels = image.expand(*image.shape[:2], 3).numpy()
        imported("matplotlib.image").imsave(buffer, pixels, format="png")
        return _address("image/png", buffer.getvalue())
    figure = new_figure(1.6, 1.0)
    panel = figure.subplots()
    panel.plot(values.numpy(), color=COLORS[0], linewidth=1.2)
    panel.set_axis_off()
    return svg(figure)


def new_figure(width: float, height: float) -> "Figure":
    """A figure that belongs to nobody's pyplot state: nothing global to set or to close."""
    figure: Figure = imported("matplotlib.figure").Figure(
        figsize=(width, height), layout="constrained"
    )
    return figure


def svg(figure: "Figure") -> str:
    """A figure as an image's address, whose ink is dark on light pages and light on dark ones."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue().decode()
    text = text[text.index("<svg") :].replace("#000000", "currentColor")
    ink = (
        "<style>svg{color:#1d2430;fill:currentColor}"
        "@media(prefers-color-scheme:dark){svg{color:#e4e8ee}}</style>"
    )
    text = re.sub(r"(<svg[^>]*>)", lambda match: match[1] + ink, text, count=1)
    return _address("image/svg+xml", text.encode())


def _plain(panel: "Axes") -> "Axes":
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(labelsize=8)
    return panel


def _address(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
