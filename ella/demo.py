"""The demonstration: MNIST-1D, which is made by a procedure, and a convolutional net for it.

Needs the package `mnist1d` (`ella-laplace[demo]`) and no download: signals of forty numbers, made
from ten templates by padding, scaling, shifting, shearing and noise, as many as one asks for.

Reference: Scaling Down Deep Learning with MNIST-1D (Greydanus & Kobak, 2020),
https://arxiv.org/abs/2011.14439
"""

import importlib
import random
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ella.eigenfunctions import NeuralEF
from ella.spectral import Training

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["SHIFTS", "Demonstration", "SignalNet", "Signals", "trained"]

SHIFTS: Mapping[str, Mapping[str, float]] = {
    "more noise": {"iid_noise_scale": 0.05},
    "more correlated noise": {"corr_noise_scale": 0.5},
    "more shear": {"shear_scale": 1.5},
}
"""Knobs of the generator by the name of the shift; its own values are .02, .25 and .75."""


@dataclass(frozen=True)
class Signals:
    """MNIST-1D examples from one seed, in units of the generator's default signals.

    Attributes:
        x: Shape (n, 1, 40), float32.
        y: Classes 0 to 9, shape (n,).
    """

    x: Tensor
    y: Tensor

    # Mean and standard deviation of 50,000 signals with the generator's own settings.
    MEAN: ClassVar[float] = -0.0064
    STD: ClassVar[float] = 0.155

    @classmethod
    def made(cls, n: int, seed: int, **knobs: float) -> "Signals":
        """N signals.

        Args:
            n: How many; classes are drawn with equal probability.
            seed: Of everything random; the global generators are left as they were.
            knobs: Settings of the generator that are not its own (`mnist1d.get_dataset_args`).

        Raises:
            ImportError: Without the package.
        """
        mnist1d = _generator()
        templates, settings = mnist1d.get_templates(), mnist1d.get_dataset_args()
        vars(settings).update(knobs)
        generator = torch.Generator().manual_seed(seed)
        y = torch.randint(len(templates["y"]), (n,), generator=generator)
        with _seeded(seed):
            made = [
                mnist1d.transform(templates["x"][label], templates["t"], settings)[0]
                for label in y.tolist()
            ]
        x = torch.from_numpy(np.stack(made)).float().unsqueeze(1)
        return cls((x - cls.MEAN) / cls.STD, y)


@contextmanager
def _seeded(seed: int) -> "Iterator[None]":
    """NumPy's global generator, which the package draws from, seeded and restored."""
    before, plain = np.random.get_state(), random.getstate()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(before)
        random.setstate(plain)


def _generator() -> ModuleType:
    try:
        return importlib.import_module("mnist1d")
    except ImportError as error:
        raise ImportError(
            'The demonstration needs mnist1d: pip install "ella-laplace[demo]".'
        ) from error


class SignalNet(nn.Module):
    """Three circular convolutions, the maximum over positions and a linear layer: 12,234 weights.

    Signals (n, 1, 40) give logits (n, 10), which are nearly the same wherever the signal starts.

    Args:
        seed: Of its first weights.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.body = nn.Sequential(
                *(_circular(1, 24), nn.ReLU()),
                *(_circular(24, 32, stride=2), nn.ReLU()),
                *(_circular(32, 48), nn.ReLU()),
            )
            self.head = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.head(self.body(x).amax(-1))


def _circular(channels: int, filters: int, stride: int = 1) -> nn.Conv1d:
    return nn.Conv1d(channels, filters, 5, stride=stride, padding=2, padding_mode="circular")


def trained(signals: Signals, seed: int, epochs: int = 40) -> SignalNet:
    """A net trained as anybody would: AdamW, a rate that falls to 0, batches of 100.

    Args:
        signals: To train on.
        seed: Of the weights and the order of the batches.
        epochs: Passes over the data.
    """
    net = SignalNet(seed)
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * -(-len(signals.y) // 100)
    optimizer = torch.optim.AdamW(net.parameters(), 5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(signals.y), generator=generator).split(100):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(signals.x[rows]), signals.y[rows])
            loss.backward()
            optimizer.step()
            schedule.step()
    return net.eval()


@dataclass(frozen=True)
class Demonstration:
    """A trained net and data to judge it by, with all that `ella.report` needs.

    Attributes:
        model: The net.
        train: Loader of the 4,000 signals that it was trained on.
        val: Loader of 1,000 others.
        test: Loader of 10,000 others.
        ood: By name, loaders of inputs of no class: test signals whose numbers are in random
            order, and white noise of the same variance; 5,000 each.
        shift: By name, loaders of 1,000 signals made with other knobs; see `SHIFTS`.
    """

    model: SignalNet
    train: DataLoader[tuple[Tensor, ...]]
    val: DataLoader[tuple[Tensor, ...]]
    test: DataLoader[tuple[Tensor, ...]]
    ood: dict[str, DataLoader[tuple[Tensor, ...]]]
    shift: dict[str, DataLoader[tuple[Tensor, ...]]]

    @classmethod
    def made(cls, seed: int = 0, scale: float = 1.0) -> "Demonstration":
        """Make the signals and train the net, in about a minute on one core.

        Args:
            seed: Of everything random.
            scale: Of the numbers of signals and epochs; less than 1 only to try whether it runs.

        Raises:
            ImportError: Without `mnist1d`.
        """

        def size(n: int) -> int:
            return max(20, int(scale * n))

        parts = [Signals.made(size(n), 100 * seed + i) for i, n in enumerate((4000, 1000, 10_000))]
        train, _, test = parts
        generator = torch.Generator().manual_seed(seed)
        some = test.x[: size(5000)]
        order = torch.rand(some.shape, generator=generator).argsort(-1)
        ood = {
            "shuffled signals": some.gather(-1, order),
            "white noise": torch.randn(some.shape, generator=generator),
        }
        shift = {
            name: Signals.made(size(1000), 100 * seed + 3 + i, **knobs)
            for i, (name, knobs) in enumerate(SHIFTS.items())
        }
        loaders = [_loader(part.x, part.y) for part in parts]
        return cls(
            trained(train, seed, max(1, int(40 * scale))),
            loaders[0],
            loaders[1],
            loaders[2],
            {name: _loader(x) for name, x in ood.items()},
            {name: _loader(part.x, part.y) for name, part in shift.items()},
        )

    @staticmethod
    def eigenfunctions(scale: float = 1.0) -> NeuralEF:
        """NeuralEF of a size that a small net needs, in about half a minute on one core."""
        steps, inputs = max(20, int(800 * scale)), max(100, int(2000 * scale))
        teacher = Training(steps=steps, weight_decay=0.3)
        return NeuralEF(32, num_inputs=inputs, num_directions=128, teacher=teacher)


def _loader(*tensors: Tensor) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(*tensors), batch_size=250)
