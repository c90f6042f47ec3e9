"""Labelled rows of a model with an output for every position: some of each example."""

import torch
from torch import Tensor

from ella.inputs import Inputs, Rows, num_examples
from ella.likelihoods import Likelihood
from ella.network import Network


class SampledRows:
    """Draws rows (example, position) that count; examples of other models are left as they are.

    Positions of one example tell nearly the same, so a sample of them stands for all.

    Args:
        network: The model.
        likelihood: Says which labels count.
        per_example: Most rows of one example.
        seed: Of the draw, which depends on it and the number of the batch.
    """

    def __init__(
        self, network: Network, likelihood: Likelihood, per_example: int, seed: int
    ) -> None:
        self.network, self.likelihood = network, likelihood
        self.per_example, self.seed = per_example, seed
        self._drawn = self._counted = 0

    @property
    def share(self) -> float:
        """Rows that were drawn, as a share of those that count."""
        return self._drawn / self._counted if self._counted else 1.0

    def __call__(self, x: Inputs, y: Tensor, number: int) -> tuple[Inputs, Tensor]:
        """Rows and their labels.

        Args:
            x: n examples.
            y: Their labels, (n, *positions) or with the axes of the outputs.
            number: Of the batch.
        """
        layout = self.network.layout(x)
        if not layout.positions:
            return x, y
        y = self.likelihood.check(layout.flat_targets(y), layout.num_classes)
        counted = self._counting(y).view(num_examples(x), -1)
        generator = torch.Generator().manual_seed(self.seed + number)
        order = torch.rand(counted.shape, generator=generator).to(y.device) * counted
        most = min(self.per_example, counted.shape[1])
        drawn = torch.zeros_like(counted).scatter_(1, order.topk(most).indices, True) & counted
        self._drawn += int(drawn.sum())
        self._counted += int(counted.sum())
        example, position = drawn.nonzero(as_tuple=True)
        return Rows(x, example, position), y[drawn.flatten()]

    def _counting(self, y: Tensor) -> Tensor:
        weights = self.likelihood.weights(y)
        return (
            torch.ones(len(y), dtype=torch.bool, device=y.device)
            if weights is None
            else (weights > 0)
        )
