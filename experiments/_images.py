"""The images of the CIFAR-10 study, in one order for all methods."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from _data import Task, data_root, load_idx, load_mosaic, load_task, normalize
from _perturb import perturbed
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms.v2 import RandomResizedCrop


@dataclass(frozen=True)
class Images:
    """Labelled images.

    Attributes:
        x: Normalized, shape (n, 3, 32, 32).
        y: Class indices, shape (n,); zeros where there are none.
    """

    x: Tensor
    y: Tensor

    def loader(self, batch_size: int = 250) -> DataLoader:
        """In order."""
        return DataLoader(TensorDataset(self.x, self.y), batch_size=batch_size)

    def first(self, count: int) -> "Images":
        """The first `count` of them."""
        return Images(self.x[:count], self.y[:count])


class Sizes(Protocol):
    """What the study is asked for; see `StudySettings`."""

    root: str | None
    num_test: int
    num_cropped: int
    num_ood: int
    num_shift: int


class Data:
    """All images of the study. What comes first in each set is the same for every method.

    Args:
        sizes: How many of each, and the root.
    """

    def __init__(self, sizes: Sizes) -> None:
        self.sizes, self.root = sizes, data_root(sizes.root)
        self.task: Task = load_task("cifar10", sizes.root, num_val=1)
        # The task shuffles the test set; the human labels come in its first order.
        images = load_mosaic(self.root / "cifar10" / "test_batch.webp")
        stored = np.load(self.root / "cifar10" / "labels.npz")
        labels = torch.from_numpy(stored["test_batch_labels"].astype(np.int64))
        count = sizes.num_test
        self.test = Images(self._normalized(images[:count]), labels[:count])
        self._corrupted: dict[tuple[str, int], Images] = {}

    def fitting(self, count: int) -> Images:
        """Training images in one random order."""
        return self._training(count)

    @cached_property
    def human(self) -> Tensor:
        """Shares of people who chose each class (CIFAR-10H), shape (n, 10)."""
        stored = np.load(self.root / "cifar10h" / "cifar10h_counts.npz")
        counts = torch.from_numpy(stored["counts"]).double()[: len(self.test.y)]
        return counts / counts.sum(1, keepdim=True)

    @cached_property
    def cropped(self) -> Images:
        """Training images as RandomResizedCrop(32, scale=(0.5, 1)) shows them, once each."""
        chosen = self._training(self.sizes.num_cropped, seed=1)
        crop = RandomResizedCrop(32, scale=(0.5, 1), antialias=True)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return Images(torch.stack([crop(image) for image in chosen.x]), chosen.y)

    @cached_property
    def ood(self) -> dict[str, Images]:
        """Images of no class of CIFAR-10, grey ones padded to 32 pixels."""
        count = self.sizes.num_ood
        sources = dict(self.task.ood)
        for name in ("FashionMNIST", "MNIST"):
            grey = load_idx(self.root / name / "raw" / "t10k-images-idx3-ubyte.gz")[:count]
            padded = nn.functional.pad(grey.unsqueeze(1).expand(-1, 3, -1, -1), (2, 2, 2, 2))
            sources[name] = self._normalized(padded)
        return {
            name: Images(x[:count], torch.zeros(len(x[:count]), dtype=torch.long))
            for name, x in sources.items()
        }

    @cached_property
    def perturbed(self) -> Images:
        """Test images, each changed in a way that is none of the tested corruptions."""
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (self.task.mean, self.task.std))
        pixels = (self.test.x * std + mean).clamp(0, 1)
        return Images((perturbed(pixels) - mean) / std, self.test.y)

    def corrupted(self, kind: str, severity: int) -> Images:
        """The first test images, corrupted; made once."""
        if (kind, severity) not in self._corrupted:
            some = self.test.first(self.sizes.num_shift)
            clean = replace(self.task, test=TensorDataset(some.x, some.y))
            made = Images(*clean.corrupted_test(kind, severity).tensors)
            self._corrupted[kind, severity] = made
        return self._corrupted[kind, severity]

    def _normalized(self, images: Tensor) -> Tensor:
        return normalize(images, self.task.mean, self.task.std)

    def _training(self, count: int, seed: int = 0) -> Images:
        x, y = self.task.train.tensors
        rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:count]
        return Images(x[rows], y[rows])
