"""Inputs that look unseen, for learning eigenfunctions where the classifier will be used."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from ella.inputs import Inputs, map_inputs

BLURRED = 0.2
"""Share of the images that are blurred."""


class Augmentation(Protocol):
    """Makes new inputs from training inputs; no labels are involved, so anything goes."""

    def __call__(self, x: Inputs, generator: torch.Generator) -> Inputs:
        """Inputs of the same structure and shapes."""


@dataclass(frozen=True)
class Perturb:
    """Random crops, blur, mixtures and noise of real-valued inputs; others are left as they are.

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
    """

    crop: float = 0.7
    mix: float = 0.3
    blur: float = 1.4
    noise: float = 0.4

    def __call__(self, x: Inputs, generator: torch.Generator) -> Inputs:
        """See `Augmentation`."""
        return map_inputs(x, lambda tensor: self._perturb(tensor, generator))

    def _perturb(self, x: Tensor, generator: torch.Generator) -> Tensor:
        if not x.is_floating_point():
            return x

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
