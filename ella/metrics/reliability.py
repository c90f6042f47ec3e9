"""The reliability diagram, drawn by matplotlib (extra `metrics`)."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ella.metrics._checked import Array
from ella.metrics._extras import imported
from ella.metrics.calibration import expected_calibration_error, top_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BAR_COLOR, GAP_COLOR = (0.20, 0.48, 0.75), (0.84, 0.24, 0.16)


def reliability_diagram(
    probs_by_method: Mapping[str, Array], labels: Array, num_bins: int = 15
) -> "Figure":
    """Accuracy against confidence, one panel per method, side by side.

    A bar is the accuracy in its bin, drawn darker the more examples it holds; the hatched part is
    the gap to the mean confidence of the bin, which a calibrated method does not have.

    Args:
        probs_by_method: Class probabilities of shape (n, c) by the title of their panel.
        labels: Class indices, shape (n,).
        num_bins: Number of bins of equal width.

    Returns:
        A figure that belongs to no window and no global state; save it with `figure.savefig`.
    """
    if not probs_by_method:
        raise ValueError("`probs_by_method` is empty: expected at least one method.")
    count = len(probs_by_method)
    size = (3.1 * count + 0.5, 4.0)
    figure = imported("matplotlib.figure").Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, count, sharex=True, sharey=True, squeeze=False)[0]
    for panel, (name, probs) in zip(panels, probs_by_method.items(), strict=True):
        ece = expected_calibration_error(probs, labels, num_bins)
        draw_reliability(panel, *top_label(probs, labels), num_bins)
        panel.set_title(f"{name}\nECE {ece:.3f}", fontsize=10)
        panel.set_xlabel("confidence")
    panels[0].set_ylabel("accuracy")
    panels[0].legend(loc="upper left", fontsize=8, frameon=False)
    return figure


def draw_reliability(
    panel: "Axes", confidence: Tensor, correct: Tensor, num_bins: int = 15
) -> None:
    """The bars of one panel."""
    counts, bin_accuracy, bin_confidence = _binned(confidence, correct, num_bins)
    filled = counts > 0
    centers = ((torch.arange(num_bins) + 0.5) / num_bins)[filled].numpy()
    accuracy, gap = bin_accuracy[filled].numpy(), (bin_confidence - bin_accuracy)[filled].numpy()
    shades = 0.45 + 0.55 * (counts[filled] / counts.max()).sqrt()
    colors = [(*BAR_COLOR, shade) for shade in shades.tolist()]
    width = 0.94 / num_bins
    panel.plot([0, 1], [0, 1], color="0.5", linestyle="--", linewidth=1, zorder=3)
    panel.bar(centers, accuracy, width, color=colors, label="accuracy")
    panel.bar(
        centers,
        gap,
        width,
        bottom=accuracy,
        facecolor=(*GAP_COLOR, 0.18),
        edgecolor=(*GAP_COLOR, 0.8),
        hatch="////",
        linewidth=0.6,
        label="gap to confidence",
    )
    panel.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    panel.spines[["top", "right"]].set_visible(False)


def _binned(confidence: Tensor, correct: Tensor, num_bins: int) -> tuple[Tensor, Tensor, Tensor]:
    """Examples, accuracy and mean confidence of each bin, all (num_bins,); NaN where empty."""
    # The top bin is closed: confidence exactly 1, which float32 softmax reaches, belongs to it.
    index = (confidence * num_bins).long().clamp_max(num_bins - 1)
    counts = torch.bincount(index, minlength=num_bins)
    sums = [
        torch.bincount(index, weights=values.double(), minlength=num_bins)
        for values in (correct, confidence)
    ]
    return counts, sums[0] / counts, sums[1] / counts
