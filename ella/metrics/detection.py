"""How well a score tells out-of-distribution examples, by scikit-learn (extra `metrics`)."""

import numpy as np
import torch
from numpy.typing import NDArray

from ella.metrics._checked import Array, scores_of_examples
from ella.metrics._extras import imported


def auroc(scores_in: Array, scores_out: Array) -> float:
    """Area under the ROC curve: P(score out > score in), ties counting one half.

    Args:
        scores_in: Scores of in-distribution examples, shape (n,).
        scores_out: Scores of out-of-distribution examples, shape (m,); they should be higher.

    Raises:
        TypeError: If they are neither tensors nor NumPy arrays.
        ValueError: If they are empty, not of shape (n,), or not finite. The same for every
            out-of-distribution metric here.
    """
    return float(imported("sklearn.metrics").roc_auc_score(*_labeled(scores_in, scores_out)))


def aupr(scores_in: Array, scores_out: Array) -> float:
    """Average precision with the out-of-distribution examples as positives; depends on n : m.

    Args:
        scores_in: Scores of in-distribution examples, shape (n,).
        scores_out: Scores of out-of-distribution examples, shape (m,); they should be higher.
    """
    labeled = _labeled(scores_in, scores_out)
    return float(imported("sklearn.metrics").average_precision_score(*labeled))


def fpr_at_95_tpr(scores_in: Array, scores_out: Array) -> float:
    """Share of in-distribution examples flagged when at least 95 % of the others are.

    Args:
        scores_in: Scores of in-distribution examples, shape (n,).
        scores_out: Scores of out-of-distribution examples, shape (m,); they should be higher.
    """
    labeled = _labeled(scores_in, scores_out)
    curve = imported("sklearn.metrics").roc_curve(*labeled, drop_intermediate=False)
    false_rate, true_rate = curve[:2]
    return float(false_rate[true_rate >= 0.95].min())


def _labeled(
    scores_in: Array, scores_out: Array
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Whether examples are out of distribution, and their scores, both (n + m,)."""
    inside = scores_of_examples("scores_in", scores_in)
    outside = scores_of_examples("scores_out", scores_out)
    is_out = torch.cat([torch.zeros_like(inside), torch.ones_like(outside)])
    return is_out.numpy(), torch.cat([inside, outside]).numpy()
