"""Data sets of the experiments: splits drawn by a seed, out-of-distribution inputs, corruptions.

`load_task("digits", None, seed=0)` needs no download. The others are read from the folder `root`
(default: the environment variable ELLA_DATA):

    <root>/cifar10/data_batch_{1..5}.webp, test_batch.webp, labels.npz   mosaics of 32x32 tiles;
                        without them torchvision's CIFAR10(root, download=True) is used
    <root>/ood/cifar100_5000.webp, tinyimagenet_val_5000_32x32.webp      mosaics
                        with their labels in ood/labels.npz
    <root>/{FashionMNIST,MNIST}/raw/*.gz                                 as torchvision leaves them
"""

import gzip
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from _corruptions import corrupt, to_unit
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import TensorDataset
from torchvision import datasets as tv

DATASETS = ("digits", "fashionmnist", "mnist", "cifar10")
CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR_STD = (0.2023, 0.1994, 0.2010)
# fmt: off
TINY_IMAGENET = (
    285, 758, 890, 765, 951, 30, 430, 972, 967, 731, 704, 235, 532, 323, 294, 779, 963, 338, 879,
    687, 683, 645, 1, 964, 604, 978, 508, 354, 928, 677, 811, 474, 372, 113, 973, 146, 815, 329,
    414, 208, 932, 145, 325, 76, 387, 737, 954, 806, 314, 744, 440, 315, 565, 924, 761, 25, 975,
    367, 707, 568, 970, 619, 862, 398, 675, 427, 281, 99, 105, 466, 485, 849, 448, 353, 400, 866,
    301, 655, 207, 873, 471, 678, 808, 570, 470, 526, 567, 309, 525, 123, 734, 605, 747, 437, 107,
    909, 739, 774, 720, 467, 114, 341, 286, 517, 887, 319, 480, 947, 612, 900, 492, 801, 837, 308,
    627, 128, 149, 817, 899, 839, 345, 929, 877, 496, 462, 71, 910, 716, 768, 786, 821, 283, 760,
    425, 411, 187, 842, 826, 621, 853, 562, 75, 445, 923, 850, 424, 509, 436, 781, 950, 557, 122,
    874, 542, 543, 458, 457, 511, 349, 365, 50, 79, 845, 573, 109, 115, 500, 935, 888, 652, 957,
    488, 614, 917, 69, 347, 733, 61, 735, 435, 311, 313, 151, 32, 291, 406, 682, 438, 945, 421,
    463, 635, 962, 576, 267, 988, 625, 447, 938, 386,
)
# fmt: on
"""Of each label of TinyImageNet (the order of its wnids.txt), the class of ImageNet's 1,000."""
TILE = 32
TILES_PER_ROW = 100


@dataclass(frozen=True)
class Task:
    """A classification problem, with inputs normalized and on the CPU.

    Attributes:
        name: One of `DATASETS`.
        train: Training images and labels.
        val: Held-out images and labels, for calibration.
        test: Images and labels that only the final numbers see.
        ood: Out-of-distribution images, shape (n, *input_shape), by the name of their source.
        num_classes: c.
        input_shape: (channels, height, width).
        mean: Mean of each channel that was subtracted, in units of [0, 1] images.
        std: Standard deviation of each channel that was divided by.
    """

    name: str
    train: TensorDataset
    val: TensorDataset
    test: TensorDataset
    ood: dict[str, Tensor]
    num_classes: int
    input_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def corrupted_test(self, kind: str, severity: int, seed: int = 0) -> TensorDataset:
        """The test set after `corrupt`, normalized again.

        Args:
            kind: A key of `_corruptions.CORRUPTIONS`.
            severity: 1 (mild) to 5 (strong).
            seed: Seed of the noise.

        Returns:
            The corrupted images and the unchanged labels, in the order of `test`.
        """
        images, labels = self.test.tensors
        clean = _denormalize(images, self.mean, self.std).clamp(0, 1)
        noisy = corrupt(clean, kind, severity, seed)
        return TensorDataset(normalize(noisy, self.mean, self.std), labels)


def load_task(
    dataset: str = "digits",
    root: str | Path | None = None,
    seed: int = 0,
    *,
    num_train: int | None = None,
    num_val: int | None = None,
    num_test: int | None = None,
) -> Task:
    """A data set split by `seed`, with the out-of-distribution inputs that belong to it.

    | dataset | train | val | test | out of distribution |
    | --- | --- | --- | --- | --- |
    | digits | 80 | 400 | rest (963) | digits 8-9 (the task is 0-7) |
    | fashionmnist | 5,000 | 2,000 | 8,000 | MNIST |
    | mnist | 5,000 | 2,000 | 8,000 | FashionMNIST |
    | cifar10 | 50,000 | 2,000 | 8,000 | CIFAR-100, TinyImageNet |

    Digits are split by class; their training set is small on purpose, so that a network fitted to
    it is over-confident. Elsewhere val and test divide the official test set.

    Args:
        dataset: One of `DATASETS`.
        root: Folder of the data; default the environment variable ELLA_DATA. Unused for digits.
        seed: Decides which examples go where.
        num_train: Training examples, if not as in the table.
        num_val: Validation examples, if not as in the table.
        num_test: Test examples, if not all that remain.

    Returns:
        The task.

    Raises:
        ValueError: For an unknown data set or sizes beyond what it holds.
        FileNotFoundError: If files are missing.
    """
    for name, size in (("num_train", num_train), ("num_val", num_val), ("num_test", num_test)):
        if size is not None and size < 1:
            raise ValueError(f"`{name}` must be at least 1, or None for the default; got {size}.")
    generator = torch.Generator().manual_seed(seed)
    if dataset == "digits":
        return _digits_task(generator, num_train or 80, num_val or 400, num_test)
    if dataset in ("fashionmnist", "mnist"):
        sizes = (num_train or 5000, num_val or 2000, num_test)
        return _idx_task(dataset, data_root(root), generator, sizes)
    if dataset == "cifar10":
        return _cifar_task(data_root(root), generator, (num_train, num_val or 2000, num_test))
    raise ValueError(f"`dataset` must be one of {DATASETS}; got {dataset!r}.")


def tiny_imagenet(root: str | Path | None) -> tuple[Tensor, Tensor]:
    """5,000 validation images of TinyImageNet, uint8, and their classes among ImageNet's 1,000.

    Raises:
        FileNotFoundError: If files are missing.
    """
    folder = data_root(root) / "ood"
    images = load_mosaic(folder / "tinyimagenet_val_5000_32x32.webp")
    if not (folder / "labels.npz").is_file():
        raise _missing(str(folder / "labels.npz"), "it does not exist")
    with np.load(folder / "labels.npz") as stored:
        labels = torch.from_numpy(stored["tinyimagenet"].astype(np.int64))
    return images, torch.tensor(TINY_IMAGENET)[labels]


def data_root(root: str | Path | None) -> Path:
    """The folder of the data: `root`, else the environment variable ELLA_DATA.

    Raises:
        FileNotFoundError: If neither is given or the folder does not exist.
    """
    chosen = root or os.environ.get("ELLA_DATA")
    if not chosen:
        raise _missing("a data folder", "no folder was given")
    if not Path(chosen).is_dir():
        raise _missing(f"the data folder {chosen}", "it does not exist")
    return Path(chosen)


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(images − mean) / std per channel, of uint8 or [0, 1] images of shape (n, channels, h, w).

    Args:
        images: As `to_unit` takes.
        mean: One number a channel, in units of [0, 1] images.
        std: One number a channel.

    Returns:
        Float32 images of the same shape.
    """
    shape = (len(mean), 1, 1)
    return (to_unit(images) - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)


def load_idx(path: Path) -> Tensor:
    """A gzipped idx file of bytes as a uint8 tensor (cached; do not write to it).

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not an idx file of bytes.
    """
    if not path.is_file():
        raise _missing(str(path), "it does not exist")
    return _decode_idx(path)


def load_mosaic(path: Path) -> Tensor:
    """The 32x32 tiles of a mosaic, 100 a row, shape (n, 3, 32, 32), uint8 (cached).

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the picture does not divide into tiles.
    """
    if not path.is_file():
        raise _missing(str(path), "it does not exist")
    return _decode_mosaic(path)


def _missing(what: str, why: str) -> FileNotFoundError:
    return FileNotFoundError(
        f"Cannot read {what}: {why}. Point --root (or the environment variable ELLA_DATA) at the "
        "folder that holds cifar10/, ood/, FashionMNIST/raw/ and MNIST/raw/; torchvision's "
        "FashionMNIST(root, download=True) and MNIST(root, download=True) fill the last two. "
        'The data set "digits" needs no files.'
    )


@lru_cache(maxsize=8)
def _decode_idx(path: Path) -> Tensor:
    with gzip.open(path) as file:
        data = file.read()
    # Header: two zero bytes, the type (8: unsigned byte), the number of axes, then each length.
    if data[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path} is not an idx file of unsigned bytes.")
    shape = np.frombuffer(data, ">u4", count=data[3], offset=4).tolist()
    values = np.frombuffer(data, np.uint8, offset=4 + 4 * data[3])
    return torch.from_numpy(values.reshape(shape).copy())


@lru_cache(maxsize=8)
def _decode_mosaic(path: Path) -> Tensor:
    with Image.open(path) as picture:
        pixels = np.array(picture.convert("RGB"))
    height, width, _ = pixels.shape
    if height % TILE or width != TILE * TILES_PER_ROW:
        raise ValueError(
            f"{path} must be {TILE * TILES_PER_ROW} pixels wide and a multiple of {TILE} high; "
            f"got {width}x{height}."
        )
    tiles = pixels.reshape(height // TILE, TILE, TILES_PER_ROW, TILE, 3)
    return torch.from_numpy(tiles.transpose(0, 2, 4, 1, 3).reshape(-1, 3, TILE, TILE))


def _digits_task(
    generator: torch.Generator, num_train: int, num_val: int, num_test: int | None
) -> Task:
    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).float().view(-1, 1, 8, 8) / 16
    targets = torch.from_numpy(labels).long()
    held_out = targets >= 8
    ood = {"digits 8-9": images[held_out]}
    images, targets = images[~held_out], targets[~held_out]
    order = _stratified_order(targets, generator)
    train, val, test = _cut(order, num_train, num_val, num_test)
    splits = [(images[rows], targets[rows]) for rows in (train, val, test)]
    return _task("digits", splits, ood, _channel_statistics(images[train]), 8)


def _idx_task(
    name: str, root: Path, generator: torch.Generator, sizes: tuple[int, int, int | None]
) -> Task:
    folder, other = (
        ("FashionMNIST", "MNIST") if name == "fashionmnist" else ("MNIST", "FashionMNIST")
    )
    num_train, num_val, num_test = sizes
    images, targets = _idx_pair(root / folder, "train")
    (train,) = _cut(torch.randperm(len(images), generator=generator), num_train)
    held_images, held_targets = _idx_pair(root / folder, "t10k")
    order = torch.randperm(len(held_images), generator=generator)
    val, test = _cut(order, num_val, num_test)
    splits = [
        (images[train], targets[train]),
        *((held_images[rows], held_targets[rows]) for rows in (val, test)),
    ]
    ood = {other: _idx_pair(root / other, "t10k")[0]}
    return _task(name, splits, ood, _channel_statistics(images[train]), 10)


def _idx_pair(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    images = load_idx(folder / "raw" / f"{part}-images-idx3-ubyte.gz")
    labels = load_idx(folder / "raw" / f"{part}-labels-idx1-ubyte.gz")
    return images.unsqueeze(1), labels.long()


def _cifar_task(
    root: Path, generator: torch.Generator, sizes: tuple[int | None, int, int | None]
) -> Task:
    num_train, num_val, num_test = sizes
    held_images, held_targets = _cifar_arrays(root, train=False)
    # The held-out split is drawn first, so that it does not depend on `num_train`.
    val, test = _cut(torch.randperm(len(held_images), generator=generator), num_val, num_test)
    images, targets = _cifar_arrays(root, train=True)
    if num_train is not None:
        (train,) = _cut(torch.randperm(len(images), generator=generator), num_train)
        images, targets = images[train], targets[train]
    splits = [(images, targets), *((held_images[r], held_targets[r]) for r in (val, test))]
    return _task("cifar10", splits, _cifar_ood(root), (CIFAR_MEAN, CIFAR_STD), 10)


def _cifar_arrays(root: Path, *, train: bool) -> tuple[Tensor, Tensor]:
    folder = root / "cifar10"
    if not folder.is_dir():
        return _torchvision_arrays(tv.CIFAR10, root, train=train)
    names = [f"data_batch_{i}" for i in range(1, 6)] if train else ["test_batch"]
    if not (folder / "labels.npz").is_file():
        raise _missing(str(folder / "labels.npz"), "it does not exist")
    with np.load(folder / "labels.npz") as stored:
        labels = np.concatenate([stored[f"{name}_labels"] for name in names])
    images = torch.cat([load_mosaic(folder / f"{name}.webp") for name in names])
    if len(images) != len(labels):
        raise ValueError(f"{folder} holds {len(images)} images but {len(labels)} labels.")
    return images, torch.from_numpy(labels).long()


def _cifar_ood(root: Path) -> dict[str, Tensor]:
    folder = root / "ood"
    if not folder.is_dir():
        # torchvision has no TinyImageNet.
        return {"CIFAR-100": _torchvision_arrays(tv.CIFAR100, root, train=False)[0]}
    return {
        "CIFAR-100": load_mosaic(folder / "cifar100_5000.webp"),
        "TinyImageNet": load_mosaic(folder / "tinyimagenet_val_5000_32x32.webp"),
    }


def _torchvision_arrays(
    source: type[tv.CIFAR10], root: Path, *, train: bool
) -> tuple[Tensor, Tensor]:
    try:
        stored = source(str(root), train=train, download=True)
    except (OSError, RuntimeError) as error:
        raise _missing(
            f"{source.__name__} in {root}", f"and the download failed ({error})"
        ) from error
    images = torch.from_numpy(stored.data).permute(0, 3, 1, 2).contiguous()
    return images, torch.tensor(stored.targets)


def _task(
    name: str,
    splits: Sequence[tuple[Tensor, Tensor]],
    ood: dict[str, Tensor],
    statistics: tuple[tuple[float, ...], tuple[float, ...]],
    num_classes: int,
) -> Task:
    mean, std = statistics
    train, val, test = (TensorDataset(normalize(x, mean, std), y) for x, y in splits)
    channels, height, width = train.tensors[0].shape[1:]
    return Task(
        name=name,
        train=train,
        val=val,
        test=test,
        ood={source: normalize(x, mean, std) for source, x in ood.items()},
        num_classes=num_classes,
        input_shape=(channels, height, width),
        mean=mean,
        std=std,
    )


def _channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    by_channel = to_unit(images).double().transpose(0, 1).flatten(1)
    return tuple(by_channel.mean(1).tolist()), tuple(by_channel.std(1, correction=0).tolist())


def _denormalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    shape = (len(mean), 1, 1)
    return images * torch.tensor(std).view(shape) + torch.tensor(mean).view(shape)


def _stratified_order(targets: Tensor, generator: torch.Generator) -> Tensor:
    """An order of the examples any stretch of which holds every class in its proportion."""
    order = torch.randperm(len(targets), generator=generator)
    quantile = torch.empty(len(targets), dtype=torch.float64)
    for label in targets.unique():
        rows = (targets[order] == label).nonzero().squeeze(1)
        quantile[rows] = (torch.arange(len(rows), dtype=torch.float64) + 0.5) / len(rows)
    return order[quantile.argsort(stable=True)]


def _cut(order: Tensor, *sizes: int | None) -> list[Tensor]:
    """Consecutive stretches of `order`; a size of None (the last only) takes all that remains."""
    wanted = sum(size or 1 for size in sizes)
    if wanted > len(order):
        raise ValueError(f"Asked for at least {wanted} examples; there are {len(order)}.")
    parts = []
    for size in sizes:
        parts.append(order[:size])
        order = order[len(parts[-1]) :]
    return parts
