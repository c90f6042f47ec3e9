"""Pictures with exact masks for segmentation: drawn textures, and CamVid with frozen features.

Both give dense features on a grid of square patches, and the class of every pixel.

Reference: Semantic object classes in video: A high-definition ground truth database (Brostow et
al., 2009), for CamVid.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from _efficientnet import pretrained
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

VOID = -1
TEXTURES = ("stripes", "checks", "dots", "grain")
CAMVID_CLASSES = (
    "sky",
    "building",
    "pole",
    "road",
    "pavement",
    "tree",
    "sign",
    "fence",
    "car",
    "pedestrian",
    "bicyclist",
)


@dataclass(frozen=True)
class Scenes:
    """Pictures, the truth about them, and what all methods see of them.

    Attributes:
        images: Shape (n, 3, h, w), values in [0, 1].
        masks: The class of each pixel, shape (n, h, w); `VOID` where it is not judged.
        features: Of each patch, shape (n, rows, columns, d).
        classes: Names of the classes.
    """

    images: Tensor
    masks: Tensor
    features: Tensor
    classes: tuple[str, ...]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.features.shape[1], self.features.shape[2]

    def subset(self, rows: Tensor) -> "Scenes":
        """Some of the pictures."""
        return Scenes(self.images[rows], self.masks[rows], self.features[rows], self.classes)

    def to_pixels(self, labels: Tensor) -> Tensor:
        """Labels of patches (n, rows·columns) as labels of pixels (n, h, w)."""
        size = self.images.shape[-1] // self.grid[1]
        labels = labels.view(-1, *self.grid)
        return labels.repeat_interleave(size, 1).repeat_interleave(size, 2)


def textured_scenes(count: int, generator: torch.Generator, *, size: int = 64) -> Scenes:
    """Three overlapping shapes on a background, each of one of four textures.

    Colour tells little: a region's base colour varies from scene to scene, and a lamp shades each
    scene from one side to the other. Features: see `texture_statistics`.

    Args:
        count: n.
        generator: Draws everything.
        size: Pixels of a side.
    """
    drawn = [_scene(size, generator) for _ in range(count)]
    images, masks = (torch.stack(parts) for parts in zip(*drawn, strict=True))
    return Scenes(images, masks, texture_statistics(images), TEXTURES)


def texture_statistics(images: Tensor, *, patch: int = 4) -> Tensor:
    """The mean colour of each patch, and the texture of the patches on and around it.

    Texture is the contrast of the gray picture and, in units of it, the mean size of its gradients
    along four directions at two scales.

    Args:
        images: Shape (n, 3, h, w).
        patch: Pixels of a patch's side.

    Returns:
        Shape (n, h/patch, w/patch, 12).
    """

    def around(maps: Tensor) -> Tensor:
        padded = F.pad(maps, (patch,) * 4, mode="replicate")
        return F.avg_pool2d(padded, 3 * patch, patch)

    gray = images.mean(1, keepdim=True)
    contrast = (around(gray.square()) - around(gray).square()).clamp_min(0).sqrt()
    gradients = [
        (gray - gray.roll((reach * down, reach * right), (2, 3))).abs()
        for reach in (1, 2)
        for down, right in ((0, 1), (1, 0), (1, 1), (1, -1))
    ]
    relative = around(torch.cat(gradients, 1)) / (contrast + 0.02)
    parts = [F.avg_pool2d(images, patch), contrast, relative]
    return torch.cat(parts, 1).permute(0, 2, 3, 1).contiguous()


def camvid(root: Path, split: str, count: int) -> Scenes:
    """Evenly spaced frames of one split, 240x176 pixels, with EfficientNet-Lite0 features.

    Features are the stages 3 to 7 of the network on the picture at twice its size, brought to
    patches of 8 pixels. The network has seen ImageNet's labels, and none of CamVid's.

    Args:
        root: The data folder.
        split: "train", "val" or "test".
        count: n.

    Raises:
        FileNotFoundError: If the folder holds no pictures.
    """
    folder = root / "camvid_240x180"
    names = sorted(path.stem for path in (folder / split).glob("*.jpg"))
    if not names:
        raise FileNotFoundError(f"No pictures in {folder / split}.")
    chosen = [names[round(i)] for i in np.linspace(0, len(names) - 1, count)]
    # 176 = 22 patches: the last four rows, the camera car's bonnet, are cut off.
    pixels = torch.stack([_pixels(folder / split / f"{name}.jpg") for name in chosen])[:, :176]
    masks = torch.stack([_pixels(folder / f"{split}annot" / f"{name}.png") for name in chosen])
    masks = masks[:, :176].long()
    masks[masks >= len(CAMVID_CLASSES)] = VOID
    images = pixels.permute(0, 3, 1, 2).float() / 255
    return Scenes(images, masks, deep_features(images), CAMVID_CLASSES)


@torch.inference_mode()
def deep_features(images: Tensor, *, patch: int = 8) -> Tensor:
    """EfficientNet-Lite0's stages 3 to 7 at each patch: shape (n, h/patch, w/patch, 744)."""
    network, parts = pretrained(), []
    grid = (images.shape[2] // patch, images.shape[3] // patch)
    for batch in images.split(8):
        doubled = F.interpolate(255 * batch, scale_factor=2, mode="bilinear")
        fine, *coarse = network.stages(doubled)[2:]
        maps = [F.adaptive_avg_pool2d(fine, grid)]
        maps += [F.interpolate(each, size=grid, mode="bilinear") for each in coarse]
        parts.append(torch.cat(maps, 1).permute(0, 2, 3, 1))
    return torch.cat(parts).clone()


def _pixels(path: Path) -> Tensor:
    with Image.open(path) as picture:
        return torch.from_numpy(np.array(picture))


def _scene(size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One picture (3, size, size) and its mask."""
    axis = torch.arange(size) + 0.5
    y, x = torch.meshgrid(axis, axis, indexing="ij")

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=generator).item()

    mask = torch.full((size, size), int(uniform(0, len(TEXTURES))))
    for _ in range(3):
        mask[_shape(x, y, uniform)] = int(uniform(0, len(TEXTURES)))
    image = torch.empty(3, size, size)
    for label, draw in enumerate(_PATTERNS):
        pattern = 0.5 + uniform(0.5, 1) * (draw(x, y, uniform, generator) - 0.5)
        color = 0.35 + 0.5 * torch.rand(3, 1, 1, generator=generator)
        image = torch.where(mask == label, color * pattern, image)
    angle = uniform(0, 2 * math.pi)
    lamp = 1 + 0.4 * (x / size - 0.5) * math.cos(angle) + 0.4 * (y / size - 0.5) * math.sin(angle)
    noise = 0.02 * torch.randn(image.shape, generator=generator)
    return (image * lamp * uniform(0.7, 1.3) + noise).clamp(0, 1), mask


def _shape(x: Tensor, y: Tensor, uniform: Callable[[float, float], float]) -> Tensor:
    """An ellipse or a turned rectangle, as a mask."""
    size = len(x)
    dx, dy = x - uniform(0.2, 0.8) * size, y - uniform(0.2, 0.8) * size
    angle, width, height = uniform(0, math.pi), uniform(0.15, 0.35), uniform(0.15, 0.35)
    along = (dx * math.cos(angle) + dy * math.sin(angle)) / (width * size)
    across = (dy * math.cos(angle) - dx * math.sin(angle)) / (height * size)
    if uniform(0, 1) < 0.5:
        return along.square() + across.square() < 1
    return torch.maximum(along.abs(), across.abs()) < 0.85


def _stripes(x: Tensor, y: Tensor, uniform: Callable[[float, float], float], _: object) -> Tensor:
    return 0.5 + 0.5 * torch.sin(2 * math.pi * (x + 0.3 * y) / 5 + uniform(0, 6.3))


def _checks(x: Tensor, y: Tensor, uniform: Callable[[float, float], float], _: object) -> Tensor:
    right, down = (x + uniform(0, 6)) // 3, (y + uniform(0, 6)) // 3
    return (right + down) % 2


def _dots(x: Tensor, y: Tensor, uniform: Callable[[float, float], float], _: object) -> Tensor:
    right, down = (x + uniform(0, 6)) % 6 - 3, (y + uniform(0, 6)) % 6 - 3
    return (right.square() + down.square() < 4).float()


def _grain(x: Tensor, y: Tensor, uniform: object, generator: torch.Generator) -> Tensor:
    return torch.rand(x.shape, generator=generator)


_PATTERNS = (_stripes, _checks, _dots, _grain)
