"""Inputs that look unseen, for learning eigenfunctions where the classifier will be used."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from ella.arguments import FUNCTION, NOT_NEGATIVE, SHARE, optional, real, settle
from ella.eigenfunctions.tokens import PerturbTokens, is_ids
from ella.inputs import Inputs, Rows

BLURRED = 0.2
"""Share of the images that are blurred."""


class Augmentation(Protocol):
    """Makes new inputs from training inputs; no labels are involved, so anything goes."""

    def __call__(self, x: Inputs, generator: torch.Generator) -> Inputs:
        """Inputs of the same structure and shapes."""


@dataclass(frozen=True)
class Perturb:
    """Random crops, blur, mixtures and noise of real-valued inputs, and other tokens in texts.

    Masks stay as they are, and so does what they call padding: tensors of booleans or integers,
    and real ones that hold 0 and 1 alone beside other inputs.

    A network that memorised its training inputs has other Jacobians there than elsewhere, and
    inputs off the data are where the variance has to grow; both are learned from such inputs.

    Attributes:
        crop: Smallest side of a random crop, as a share of the image, resized back ((n, channels,
            height, width) inputs only).
        mix: Share of inputs that are blended with another one.
        blur: Largest standard deviation, in pixels, of a Gaussian blur that a fifth of the images
            get ((n, channels, height, width) inputs only).
        noise: Largest standard deviation of added Gaussian noise, as a share of the input's; half
            of the inputs get some.
        tokens: What happens to token ids; None leaves them as they are.

    Raises:
        ValueError: If a number is out of range.
    """

    crop: float = 0.7
    mix: float = 0.3
    blur: float = 1.4
    noise: float = 0.4
    tokens: PerturbTokens | None = field(default_factory=PerturbTokens)

    def __post_init__(self) -> None:
        settle(self, crop=real(0, 1, without_least=True), mix=SHARE)
        settle(self, blur=NOT_NEGATIVE, noise=NOT_NEGATIVE, tokens=optional(FUNCTION))

    def __call__(self, x: Inputs, generator: torch.Generator) -> Inputs:
        """See `Augmentation`."""
        if isinstance(x, Rows):
            return Rows(self(x.inputs, generator), x.example, x.position)
        if isinstance(x, Tensor):
            named = {"0": x}
        elif isinstance(x, Mapping):
            named = {key: value for key, value in x.items() if isinstance(value, Tensor)}
        elif isinstance(x, tuple):
            named = {str(i): value for i, value in enumerate(x) if isinstance(value, Tensor)}
        else:  # one object, whose parts nobody knows
            return x
        found = self._each(named, generator)
        if isinstance(x, Tensor):
            return found["0"]
        if isinstance(x, Mapping):
            return {**x, **found}
        return tuple(found.get(str(i), value) for i, value in enumerate(x))

    def _each(self, named: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """Tensors by name, each by its own kind."""
        alone = len(named) == 1
        found = {}
        for name, x in named.items():
            if not x.is_floating_point() or (not alone and is_mask(x)):
                found[name] = x
                continue
            changed = self._perturb(x, generator)
            for counts in masks_of(x, named):
                changed = torch.where(counts, changed, x)
            found[name] = changed
        ids = [name for name, x in named.items() if is_ids(name, x)]
        if self.tokens is not None and ids:
            found = self.tokens(found, ids[0], generator)
        return found

    def _perturb(self, x: Tensor, generator: torch.Generator) -> Tensor:

        def uniform() -> Tensor:
            draws = torch.rand(len(x), generator=generator).to(x)
            return draws.view(-1, *[1] * (x.ndim - 1))

        out = x
        if x.ndim == 4:
            out = self._blur(self._crop(out, generator), generator)
        order = torch.randperm(len(x), generator=generator).to(x.device)
        weight = torch.where(uniform() < self.mix, uniform(), 0)
        out = out + weight * (out[order] - out)
        level = torch.where(uniform() < 0.5, uniform() * self.noise, 0) * x.std()
        return out + level * torch.randn(x.shape, generator=generator).to(x)

    def _crop(self, x: Tensor, generator: torch.Generator) -> Tensor:
        n = len(x)
        side = self.crop + (1 - self.crop) * torch.rand(n, 2, generator=generator)
        centre = (1 - side + 0.1) * (2 * torch.rand(n, 2, generator=generator) - 1)
        affine = torch.cat([torch.diag_embed(side), centre.unsqueeze(-1)], dim=-1).to(x)
        grid = nn.functional.affine_grid(affine, list(x.shape), align_corners=False)
        return nn.functional.grid_sample(x, grid, padding_mode="border", align_corners=False)

    def _blur(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """A Gaussian kernel of its own for each image that is blurred."""
        n, channels, height, width = x.shape
        radius = min(4, height - 1, width - 1)
        if self.blur <= 0 or radius < 1:
            return x
        hit = torch.rand(n, generator=generator) < BLURRED
        sigma = (self.blur * torch.rand(n, 1, generator=generator)).clamp_min(0.1).to(x)
        offsets = torch.arange(-radius, radius + 1).to(x)
        kernel = torch.softmax(-0.5 * (offsets / sigma).square(), dim=1)
        kernel = torch.where(hit.to(x.device).unsqueeze(1), kernel, (offsets == 0).to(x))
        kernel = kernel.repeat_interleave(channels, dim=0)[:, None, None, :]
        planes = nn.functional.pad(x, (radius,) * 4, mode="replicate").flatten(0, 1).unsqueeze(0)
        for each in (kernel, kernel.mT):
            planes = nn.functional.conv2d(planes, each, groups=n * channels)
        return planes.view_as(x)


def is_mask(x: Tensor) -> bool:
    """Whether a tensor says yes or no."""
    return x.dtype == torch.bool or bool(((x == 0) | (x == 1)).all())


def masks_of(x: Tensor, named: Mapping[str, Tensor]) -> list[Tensor]:
    """Where values of a tensor are no padding, by each mask beside it; of its number of axes.

    A mask has an entry for each position. One whose name says "padding" is true where it is, as
    `torch.nn.Transformer` wants it.
    """
    found = []
    for name, mask in named.items():
        ndim = mask.ndim
        if mask is x or ndim < 2 or mask.shape != x.shape[:ndim] or not is_mask(mask):
            continue
        real = mask == 0 if "padding" in name else mask != 0
        found.append(real.reshape(*real.shape, *[1] * (x.ndim - ndim)))
    return found
