"""The inputs of which a method is least certain, where they can be looked at."""

from dataclasses import dataclass, field

from torch import Tensor

from ella.inputs import Inputs
from ella.report.examples import Examples


@dataclass(frozen=True, eq=False)
class Picture:
    """One input.

    Attributes:
        values: An image (1|3, h, w) or a signal (length,).
        score: How uncertain the method is.
        example: What is expected of it and what the method says: one example, one method.
    """

    values: Tensor
    score: float
    example: Examples


@dataclass
class Hardest:
    """Keeps the inputs of the highest scores while batches go by.

    Attributes:
        method: Whose scores, by its place.
        count: How many.
    """

    method: int
    count: int = 12
    pictures: list[Picture] = field(default_factory=list)

    def __call__(self, x: Inputs, examples: Examples) -> None:
        """See `Watch`; labels that do not count leave no picture."""
        shown = visible(x)
        if shown is None or len(shown) != len(examples):
            return
        scores = examples.scores[:, self.method]
        for row in scores.topk(min(self.count, len(scores))).indices.tolist():
            values = shown[row].detach().float().cpu().clone()
            example = examples.one(row, self.method)
            self.pictures.append(Picture(values, scores[row].item(), example))
        self.pictures.sort(key=lambda picture: -picture.score)
        del self.pictures[self.count :]


def visible(x: Inputs) -> Tensor | None:
    """Images (n, 1|3, h, w), or signals (n, length), of a batch that holds such; else None."""
    if isinstance(x, tuple) and len(x) == 1:
        x = x[0]
    if not isinstance(x, Tensor) or not x.is_floating_point() or x[0].numel() < 4:
        return None
    if x.ndim == 4 and x.shape[1] in (1, 3) and min(x.shape[2:]) > 1:
        return x
    return x.squeeze(1) if x.ndim == 3 and x.shape[1] == 1 else None


def scaled(image: Tensor) -> Tensor:
    """An image (h, w, 1|3) with values between 0 and 1, whatever it was standardised by."""
    low, high = image.amin(), image.amax()
    return ((image - low) / (high - low).clamp_min(1e-12)).movedim(0, -1)
