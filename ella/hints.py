"""What is probably a mistake: one warning each, which says what to do."""

import warnings

import torch
from torch import Tensor

from ella.inputs import Inputs, Rows, example_shape, input_tensors, num_examples, take
from ella.likelihoods import Bernoulli, Categorical, Likelihood
from ella.network import Network

TOLERANCE = 1e-3
"""Probabilities sum to 1 up to this."""
REMEMBERED = 4096
"""Training examples that are recognised among validation data."""
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


MANY = object()


class Seen:
    """Remembers examples, to recognise them: by one number each, in memory only.

    Attributes:
        one_label: The label that all had so far, `MANY` if they differ.
    """

    def __init__(self) -> None:
        self.one_label: object = None
        self._numbers: dict[tuple[object, ...], list[Tensor]] = {}
        self._count = 0

    def note(self, x: Inputs, y: Tensor) -> None:
        """Remember a batch, as long as there are few, and whether labels differ."""
        if self.one_label is not MANY:
            first = y.flatten()[0]
            alike = bool((y == first).all()) and self.one_label in (None, first.item())
            self.one_label = first.item() if alike else MANY
        if self._count < REMEMBERED and not isinstance(x, Rows):
            self._numbers.setdefault(example_shape(x), []).append(_numbers(x))
            self._count += num_examples(x)

    def share(self, x: Inputs) -> float:
        """Which share of a batch was noted."""
        known = self._numbers.get(example_shape(x))
        if known is None or isinstance(x, Rows):
            return 0.0
        return torch.isin(_numbers(x), torch.cat(known)).double().mean().item()


def _numbers(x: Inputs) -> Tensor:
    """A number of each example that changes with any of its values, (n,), float64."""
    total = torch.zeros(num_examples(x), dtype=torch.float64)
    for tensor in input_tensors(x):
        if len(tensor) != len(total):
            return total[:0]
        flat = tensor.detach().reshape(len(tensor), -1).double().cpu()
        generator = torch.Generator().manual_seed(flat.shape[1])
        total += flat @ torch.randn(flat.shape[1], generator=generator, dtype=torch.float64)
    return total
