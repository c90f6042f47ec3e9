"""Inputs that look unseen, for learning eigenfunctions where the classifier will be used."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from ella._checks import Inputs, map_inputs


class Augmentation(Protocol):
    """Makes new inputs from training inputs; no labels are involved, so anything goes."""

    def __call__(self, x: Inputs, generator: torch.Generator) -> Inputs:
        """Inputs of the same structure and shapes."""


@dataclass(frozen=True)
class Perturb:
    """Random crops, mixtures and noise of real-valued inputs; others are left as they are.

    A network that memorised its training inputs has other Jacobians there than elsewhere, and
    inputs off the data are where the variance has to grow; both are learned from such inputs.

    Attributes:
        crop: Smallest side of a random crop, as a share of the image, resized back ((n, channels,
            height, width) inputs only).
        mix: Share of inputs that are blended with another one.
        noise: Largest standard deviation of added Gaussian noise, as a share of the input's; half
            of the inputs get some.
    """

    crop: float = 0.7
    mix: float = 0.3
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

        out = self._crop(x, generator) if x.ndim == 4 else x
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
