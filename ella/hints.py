"""What is probably a mistake: one warning each, which says what to do."""

import warnings

from torch import Tensor

from ella.batches import Batches
from ella.checkpoint import batch_digest
from ella.inputs import Inputs, num_examples, take
from ella.likelihoods import Bernoulli, Categorical, Likelihood
from ella.network import Network

TOLERANCE = 1e-3
"""Probabilities sum to 1 up to this."""
STACKLEVEL = 4
"""Hints are given by a method of a predictor that the user called."""


def hint(text: str) -> None:
    """One warning, where the user called `fit` or `calibrate`."""
    warnings.warn(text, stacklevel=STACKLEVEL)


def hint_about_model(network: Network, x: Inputs, likelihood: Likelihood) -> None:
    """Outputs that are probabilities already, change from call to call, or mix examples.

    Args:
        network: The model.
        x: A batch of training data, which is run three times.
        likelihood: What the outputs are for.
    """
    outputs = network(x)
    if are_probabilities(outputs, likelihood):
        hint(
            "The model's outputs look like probabilities: they lie in [0, 1]"
            + (" and sum to 1" if isinstance(likelihood, Categorical) else "")
            + ". Pass the model without its last softmax or sigmoid, or turn them back into "
            "logits with `output=`, for example output=lambda p: p.clamp_min(1e-12).log()."
        )
    if not _same(network, network(x), outputs):
        hint(
            "The model's outputs change from call to call, though it is in eval mode: is there "
            "dropout without its `training` flag, or noise? Predictions will change, too; switch "
            "it off."
        )
    elif num_examples(x) > 1 and not _same(network, _alone(network, x), outputs[:1]):
        hint(
            "The model's outputs for an example depend on the rest of its batch: is there "
            "BatchNorm without running statistics (track_running_stats=False)? Predictions will "
            "depend on how data are batched; give it statistics, or use another normalisation."
        )


def hint_about_shards(batches: Batches) -> None:
    """Several processes that begin with one batch: each may have been given all of the data."""
    if batches.processes.size == 1:
        return
    first = batches.first()
    digests = batches.processes.each(None if first is None else batch_digest(*first))
    known = [digest for digest in digests if digest is not None]
    if len(set(known)) < len(known):
        hint(
            f"Some of {batches.processes.size} processes begin with the same batch: what several "
            f"of them yield counts several times. Give each its part of the data, for example "
            f"with a DistributedSampler, or, to work alone, a `process_group` of its own."
        )


def _alone(network: Network, x: Inputs) -> Tensor:
    """Outputs of the first example by itself.

    Raises:
        ValueError: If there are none.
    """
    try:
        return network(take(x, slice(1)))
    except (RuntimeError, ValueError) as error:
        network(x)  # what fails on the whole batch, too, has another reason and raises its own
        raise ValueError(
            f"The model takes a batch of {num_examples(x)}, but not one example alone ({error}). "
            f"Is there BatchNorm without running statistics (track_running_stats=False)? Give it "
            f"statistics, or use another normalisation."
        ) from error


def are_probabilities(outputs: Tensor, likelihood: Likelihood) -> bool:
    """Whether outputs would make sense as they are."""
    inside = bool(((outputs >= 0) & (outputs <= 1)).all())
    if isinstance(likelihood, Categorical) and outputs.shape[1] > 1:
        return inside and bool(((outputs.sum(1) - 1).abs() < TOLERANCE).all())
    return inside and isinstance(likelihood, Bernoulli) and outputs.numel() >= 8


def _same(network: Network, found: Tensor, expected: Tensor) -> bool:
    scale = expected.abs().max().clamp_min(1e-6)
    return bool((found - expected).abs().max() <= network.tolerance * scale)
