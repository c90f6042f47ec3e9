"""How well a score tells out-of-distribution examples, by scikit-learn (`ella[metrics]`)."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ella.metrics._extras import imported

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Numbers = NDArray[np.float64]


def auroc(scores_in: Tensor, scores_out: Tensor) -> float:
    """Area under the ROC curve: P(score out > score in), ties counting one half.

    Args:
        scores_in: Scores of in-distribution examples, shape (n,).
        scores_out: Scores of out-of-distribution examples, shape (m,); they should be higher.

    Raises:
        ValueError: If the scores are empty, not of shape (n,), or not finite. The same for every
            out-of-distribution metric here.
    """
    return float(imported("sklearn.metrics").roc_auc_score(*_labeled(scores_in, scores_out)))


def aupr(scores_in: Tensor, scores_out: Tensor) -> float:
    """Average precision with the out-of-distribution examples as positives; depends on n : m.

    Args:
        scores_in: Scores of in-distribution examples, shape (n,).
        scores_out: Scores of out-of-distribution examples, shape (m,); they should be higher.
    """
    labeled = _labeled(scores_in, scores_out)
    return float(imported("sklearn.metrics").average_precision_score(*labeled))


def fpr_at_95_tpr(scores_in: Tensor, scores_out: Tensor) -> float:
    """Share of in-distribution examples flagged when at least 95 % of the others are.

    Args:
        scores_in: Scores of in-distribution examples, shape (n,).
        scores_out: Scores of out-of-distribution examples, shape (m,); they should be higher.
    """
    labeled = _labeled(scores_in, scores_out)
    curve = imported("sklearn.metrics").roc_curve(*labeled, drop_intermediate=False)
    false_rate, true_rate = curve[:2]
    return float(false_rate[true_rate >= 0.95].min())


def _labeled(scores_in: Tensor, scores_out: Tensor) -> "tuple[Numbers, Numbers]":
    """Whether examples are out of distribution, and their scores, both (n + m,)."""
    inside, outside = _checked("scores_in", scores_in), _checked("scores_out", scores_out)
    is_out = torch.cat([torch.zeros_like(inside), torch.ones_like(outside)])
    return is_out.numpy(), torch.cat([inside, outside]).numpy()


def _checked(name: str, scores: Tensor) -> Tensor:
    scores = torch.as_tensor(scores).detach().cpu().double()
    if scores.ndim != 1 or len(scores) == 0:
        raise ValueError(f"`{name}` must have shape (n,) with n >= 1; got {tuple(scores.shape)}.")
    if not torch.isfinite(scores).all():
        raise ValueError(f"`{name}` holds NaN or infinite values.")
    return scores
