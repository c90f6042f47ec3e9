"""Common corruptions of images, at the strengths of the 32-pixel benchmark.

Call the result "regenerated corruptions", not CIFAR-10-C: the strengths are those of the
benchmark, the draws are not.

Reference: Benchmarking Neural Network Robustness to Common Corruptions and Perturbations
(Hendrycks & Dietterich, 2019), https://arxiv.org/abs/1903.12261
"""

import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

# Strengths of severities 1 to 5.
CORRUPTIONS: dict[str, tuple[Any, ...]] = {
    "gaussian_noise": (0.04, 0.06, 0.08, 0.09, 0.10),
    "shot_noise": (500, 250, 100, 75, 50),
    "impulse_noise": (0.01, 0.02, 0.03, 0.05, 0.07),
    "speckle_noise": (0.06, 0.10, 0.12, 0.16, 0.20),
    "gaussian_blur": (0.4, 0.6, 0.7, 0.8, 1.0),
    "defocus_blur": ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
    "brightness": (0.05, 0.10, 0.15, 0.20, 0.30),
    "contrast": (0.75, 0.50, 0.40, 0.30, 0.15),
    "fog": ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
    "pixelate": (0.95, 0.90, 0.85, 0.75, 0.65),
    "jpeg": (80, 65, 58, 50, 40),
}


def to_unit(images: Tensor) -> Tensor:
    """Images as float32 in [0, 1], from uint8 or from floats already there.

    Raises:
        ValueError: If float images leave [0, 1], as normalized ones do.
    """
    if images.dtype == torch.uint8:
        return images.float() / 255
    low, high = images.min().item(), images.max().item()
    if low < 0 or high > 1:
        raise ValueError(
            f"`images` must be uint8 or floats in [0, 1]; got floats in [{low:.3g}, {high:.3g}]. "
            "Corrupt before normalizing."
        )
    return images.float()


def corrupt(images: Tensor, kind: str, severity: int, seed: int = 0) -> Tensor:
    """Corrupt images as in the common-corruptions benchmark, at its strengths for 32 pixels.

    Args:
        images: Images of shape (n, channels, h, w), uint8 or floats in [0, 1]; for fog h = w, a
            power of two.
        kind: A key of `CORRUPTIONS`.
        severity: 1 (mild) to 5 (strong).
        seed: Seed of noise and fog; one seed gives the same draws at every severity.

    Returns:
        Float32 images in [0, 1], not rounded to 8 bits (but for "jpeg" and "pixelate", which are
        made of 8-bit pictures).

    Raises:
        ValueError: For an unknown kind or severity.
    """
    if kind not in CORRUPTIONS:
        raise ValueError(f"`kind` must be one of {tuple(CORRUPTIONS)}; got {kind!r}.")
    if severity not in range(1, 6):
        raise ValueError(f"`severity` must be 1, 2, 3, 4 or 5; got {severity!r}.")
    generator = torch.Generator().manual_seed(seed)
    strength = CORRUPTIONS[kind][severity - 1]
    return _CORRUPT[kind](to_unit(images), strength, generator).clamp(0, 1)


def _gaussian_noise(x: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    return x + strength * torch.randn(x.shape, generator=generator)


def _shot_noise(x: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    return torch.poisson(x * strength, generator=generator) / strength


def _impulse_noise(x: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    hit = torch.rand(x.shape, generator=generator) < strength
    salt = torch.rand(x.shape, generator=generator) < 0.5
    return torch.where(hit, salt.to(x), x)


def _speckle_noise(x: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    return x + x * strength * torch.randn(x.shape, generator=generator)


def _gaussian_blur(x: Tensor, strength: float, _: torch.Generator) -> Tensor:
    kernel = _bell(strength, int(4 * strength + 0.5))
    return _filtered(_filtered(x, kernel.view(1, -1)), kernel.view(-1, 1))


def _defocus_blur(x: Tensor, strength: tuple[float, float], _: torch.Generator) -> Tensor:
    """A disk of the first number as radius, its edge softened by a bell of the second."""
    radius, softness = strength
    reach = math.ceil(radius) + 1
    side = torch.arange(-reach, reach + 1)
    disk = (side[:, None] ** 2 + side**2 <= radius**2).float()
    bell = _bell(softness, 1)
    soft = F.conv2d(disk[None, None] / disk.sum(), torch.outer(bell, bell)[None, None], padding=1)
    return _filtered(x, soft[0, 0])


def _bell(sigma: float, radius: int) -> Tensor:
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (offsets / sigma).square())
    return kernel / kernel.sum()


def _filtered(x: Tensor, kernel: Tensor) -> Tensor:
    """Each channel convolved with one kernel (odd sides); borders are extended."""
    high, wide = (side // 2 for side in kernel.shape)
    planes = F.pad(x.flatten(0, 1).unsqueeze(1), (wide, wide, high, high), mode="replicate")
    return F.conv2d(planes, kernel[None, None]).view_as(x)


def _brightness(x: Tensor, strength: float, _: torch.Generator) -> Tensor:
    # Raises V of hue, saturation, value: scaling all channels alike keeps hue and saturation.
    value = x.amax(1, keepdim=True)
    raised = (value + strength).clamp_max(1)
    return torch.where(value > 0, x * raised / value.clamp_min(1e-6), raised)


def _contrast(x: Tensor, strength: float, _: torch.Generator) -> Tensor:
    mean = x.mean((2, 3), keepdim=True)
    return mean + strength * (x - mean)


def _fog(x: Tensor, strength: tuple[float, float], generator: torch.Generator) -> Tensor:
    amount, decay = strength
    brightest = x.amax((1, 2, 3), keepdim=True)
    mist = amount * _plasma(len(x), x.shape[-1], decay, generator).unsqueeze(1)
    return (x + mist) * brightest / (brightest + amount)


def _plasma(count: int, size: int, decay: float, generator: torch.Generator) -> Tensor:
    """Fractal clouds in [0, 1] by the diamond-square algorithm on a torus: (count, size, size)."""
    clouds = torch.zeros(count, size, size)
    step, wobble = size, 1.0

    def jitter(shape: torch.Size) -> Tensor:
        return wobble * (2 * torch.rand(shape, generator=generator) - 1)

    while step > 1:
        half = step // 2
        corners = clouds[:, ::step, ::step]
        right = corners.roll(-1, 2)
        centres = (corners + right + corners.roll(-1, 1) + right.roll(-1, 1)) / 4
        centres = centres + jitter(centres.shape)
        clouds[:, half::step, half::step] = centres
        # Points in the middle of edges: two corners and the two centres beside them.
        across = (corners + right + centres + centres.roll(1, 1)) / 4
        down = (corners + corners.roll(-1, 1) + centres + centres.roll(1, 2)) / 4
        clouds[:, ::step, half::step] = across + jitter(across.shape)
        clouds[:, half::step, ::step] = down + jitter(down.shape)
        step, wobble = half, wobble / decay
    low, high = (getattr(clouds, end)((1, 2), keepdim=True) for end in ("amin", "amax"))
    return (clouds - low) / (high - low)


def _pixelate(x: Tensor, strength: float, _: torch.Generator) -> Tensor:
    def coarse(picture: Image.Image) -> Image.Image:
        size = tuple(int(side * strength) for side in picture.size)
        small = picture.resize(size, Image.Resampling.BOX)
        return small.resize(picture.size, Image.Resampling.BOX)

    return _as_pictures(x, coarse)


def _jpeg(x: Tensor, strength: float, _: torch.Generator) -> Tensor:
    def compressed(picture: Image.Image) -> Image.Image:
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=int(strength))
        return Image.open(buffer)

    return _as_pictures(x, compressed)


def _as_pictures(x: Tensor, change: Callable[[Image.Image], Image.Image]) -> Tensor:
    """Images changed one by one as 8-bit pictures, grey or RGB."""
    pixels = (x * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    changed = [
        np.asarray(change(Image.fromarray(each.squeeze(-1) if each.shape[-1] == 1 else each)))
        for each in pixels
    ]
    stacked = torch.from_numpy(np.stack(changed)).view(pixels.shape)
    return stacked.permute(0, 3, 1, 2).float() / 255


_CORRUPT: dict[str, Callable[[Tensor, Any, torch.Generator], Tensor]] = {
    "gaussian_noise": _gaussian_noise,
    "shot_noise": _shot_noise,
    "impulse_noise": _impulse_noise,
    "speckle_noise": _speckle_noise,
    "gaussian_blur": _gaussian_blur,
    "defocus_blur": _defocus_blur,
    "brightness": _brightness,
    "contrast": _contrast,
    "fog": _fog,
    "pixelate": _pixelate,
    "jpeg": _jpeg,
}
