"""Images as they may come in use: no change is one of the corruptions that are tested."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as V


def _turned(x: Tensor, g: torch.Generator) -> Tensor:
    angle, shear, scale = torch.rand(3, generator=g).tolist()
    shears = [40 * shear - 20, 0.0]
    return V.affine(x, 60 * angle - 30, [0, 0], 0.8 + 0.4 * scale, shears)


def _posterized(x: Tensor, g: torch.Generator) -> Tensor:
    levels = int(torch.randint(2, 6, (), generator=g))
    return (x * levels).round() / levels


def _solarized(x: Tensor, g: torch.Generator) -> Tensor:
    return torch.where(x > torch.rand((), generator=g), 1 - x, x)


def _convolved(x: Tensor, g: torch.Generator) -> Tensor:
    kernel = torch.randn(3, 3, 3, 3, generator=g) / 27**0.5
    found = F.conv2d(F.pad(x[None], (1, 1, 1, 1), mode="reflect"), kernel)[0]
    return (found - found.mean() + x.mean()).clamp(0, 1)


def _waved(x: Tensor, g: torch.Generator) -> Tensor:
    frequency = torch.rand(2, generator=g) * math.pi
    along = torch.arange(x.shape[-1]).float()
    phase = frequency[0] * along[:, None] + frequency[1] * along
    return (x + 0.3 * torch.rand((), generator=g) * torch.sin(phase)).clamp(0, 1)


def _cut(x: Tensor, g: torch.Generator) -> Tensor:
    top, left = torch.randint(0, x.shape[-1] // 2, (2,), generator=g).tolist()
    found = x.clone()
    found[:, top : top + x.shape[-1] // 2, left : left + x.shape[-1] // 2] = x.mean()
    return found


CHANGES: tuple[Callable[[Tensor, torch.Generator], Tensor], ...] = (
    *(_turned, _posterized, _solarized, _convolved, _waved, _cut),
)


def perturbed(images: Tensor, seed: int = 0) -> Tensor:
    """Each image with one change, or mixed with another image.

    Args:
        images: Shape (n, 3, size, size), values in [0, 1].
        seed: Of what is drawn.
    """
    generator = torch.Generator().manual_seed(seed)
    which = torch.randint(len(CHANGES) + 1, (len(images),), generator=generator).tolist()
    others = torch.randperm(len(images), generator=generator).tolist()
    return torch.stack(
        [
            0.65 * x + 0.35 * images[other] if i == len(CHANGES) else CHANGES[i](x, generator)
            for x, i, other in zip(images, which, others, strict=True)
        ]
    )
