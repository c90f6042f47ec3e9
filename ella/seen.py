"""Which examples were seen: to know them among validation data, and to take them out again."""

import torch
from torch import Tensor

from ella.inputs import Inputs, Rows, example_shape, input_tensors, num_examples

REMEMBERED = 4096
"""Examples that are remembered."""
ROUNDING = 1e-12
"""Relative differences of the numbers of one example: sums are not always in the same order."""
MANY = object()


class Seen:
    """Remembers examples by one number each, in memory only.

    Attributes:
        one_label: The label that all had so far, `MANY` if they differ.
        complete: Whether every example is remembered.
    """

    def __init__(self) -> None:
        self.one_label: object = None
        self.complete = True
        self._numbers: dict[tuple[object, ...], Tensor] = {}

    @classmethod
    def of_unknown(cls) -> "Seen":
        """When others came before."""
        found = cls()
        found.complete = False
        return found

    def copy(self) -> "Seen":
        """The same, to be changed."""
        found = Seen()
        found.one_label, found.complete = self.one_label, self.complete
        found._numbers = dict(self._numbers)
        return found

    def note(self, x: Inputs, y: Tensor) -> None:
        """Remember a batch, as long as there are few, and whether labels differ."""
        if self.one_label is not MANY:
            first = y.flatten()[0]
            alike = bool((y == first).all()) and self.one_label in (None, first.item())
            self.one_label = first.item() if alike else MANY
        if isinstance(x, Rows) or self._count >= REMEMBERED:
            self.complete = False
            return
        key, numbers = example_shape(x), _numbers(x)
        self.complete = self.complete and len(numbers) == num_examples(x)
        known = self._numbers.get(key, numbers[:0])
        self._numbers[key] = torch.cat([known, numbers]).sort().values

    def share(self, x: Inputs) -> float:
        """Which share of a batch was noted."""
        known = self._numbers.get(example_shape(x))
        if known is None or isinstance(x, Rows):
            return 0.0
        numbers = _numbers(x)
        return float(_places(known, numbers).ge(0).double().mean()) if len(numbers) else 0.0

    def remove(self, gone: "Seen") -> None:
        """Take out what another noted, each example once.

        Raises:
            ValueError: If all were remembered, and one was not seen, or not so often.
        """
        if not (self.complete and gone.complete):
            self.complete = False
            return
        for key, numbers in gone._numbers.items():
            known = self._numbers.get(key, numbers[:0])
            missing = 0
            for number in numbers:
                place = int(_places(known, number.unsqueeze(0)))
                missing += place < 0
                known = known if place < 0 else torch.cat([known[:place], known[place + 1 :]])
            if missing:
                raise ValueError(
                    f"{missing} of the examples to forget never came in by `fit` or "
                    f"`partial_fit`, or were forgotten before. Pass them as they were then, "
                    f"without augmentation."
                )
            self._numbers[key] = known

    @property
    def _count(self) -> int:
        return sum(map(len, self._numbers.values()))


def _places(known: Tensor, numbers: Tensor) -> Tensor:
    """Where in a sorted list each number is, but for rounding; -1 where it is not."""
    if not len(known):
        return torch.full((len(numbers),), -1)
    after = torch.searchsorted(known, numbers).clamp_max(len(known) - 1)
    candidates = torch.stack([after, (after - 1).clamp_min(0)])
    apart = (known[candidates] - numbers).abs()
    nearest = apart.argmin(0, keepdim=True)
    within = apart.gather(0, nearest) <= ROUNDING * (1 + numbers.abs())
    return torch.where(within, candidates.gather(0, nearest), -1).squeeze(0)


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
