"""Classifiers of the experiments: small convolution nets trained here, published CIFAR ResNets."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

RESNET_DEPTHS = (20, 32, 44, 56)
CHECKPOINT_FOLDER = "weights/chenyaofo_pytorch_cifar_models"


class DigitsNet(nn.Sequential):
    """Two conv-BatchNorm-ReLU blocks, average pooling, a linear layer, for (1, 8, 8) images.

    Args:
        num_classes: c.
    """

    def __init__(self, num_classes: int = 8) -> None:
        super().__init__(
            *_conv_block(1, 16),
            *_conv_block(16, 32),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(32, num_classes),
        )


class FashionNet(nn.Sequential):
    """Three conv-BatchNorm-ReLU blocks and a linear layer, for (1, 28, 28) images.

    Args:
        num_classes: c.
    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__(
            *_conv_block(1, 16),
            *_conv_block(16, 32),
            *_conv_block(32, 32),
            nn.Flatten(),
            nn.Linear(32 * 3 * 3, num_classes),
        )


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut.

    Args:
        in_channels: Channels that come in.
        channels: Channels that go out.
        stride: Of the first convolution.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv3x3(in_channels, channels, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = _conv3x3(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            projection = nn.Conv2d(in_channels, channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(projection, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, in_channels, h, w) to (n, channels, h / stride, w / stride)."""
        out = torch.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return torch.relu(out + self.downsample(x))


class CifarResNet(nn.Module):
    """The CIFAR ResNet of 6·m + 2 layers, with 1x1 convolutions in the shortcuts.

    Its parameter names are those of the published checkpoints.

    Reference: Deep Residual Learning for Image Recognition (He et al., 2015),
    https://arxiv.org/abs/1512.03385

    Args:
        blocks_per_stage: m.
        num_classes: c.
    """

    def __init__(self, blocks_per_stage: int, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = _conv3x3(3, 16)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks_per_stage, stride=1)
        self.layer2 = _stage(16, 32, blocks_per_stage, stride=2)
        self.layer3 = _stage(32, 64, blocks_per_stage, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, num_classes) of normalized images (n, 3, 32, 32)."""
        out = torch.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        return self.fc(self.avgpool(out).flatten(1))


class Ensemble(nn.Module):
    """The mean of several classifiers' probabilities, as one classifier.

    Reference: Simple and Scalable Predictive Uncertainty Estimation using Deep Ensembles
    (Lakshminarayanan et al., 2016), https://arxiv.org/abs/1612.01474

    Args:
        members: Classifiers with logits (n, c).
    """

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, x: Tensor) -> Tensor:
        """Log probabilities (n, c), which are their own logits."""
        logs = torch.stack([member(x).log_softmax(1) for member in self.members])
        return logs.logsumexp(0) - math.log(len(self.members))


def resnet(depth: int, num_classes: int = 10) -> CifarResNet:
    """A CIFAR ResNet with fresh weights.

    Args:
        depth: Number of layers: 20, 32, 44 or 56.
        num_classes: c.

    Returns:
        The network.

    Raises:
        ValueError: For another depth.
    """
    if depth not in RESNET_DEPTHS:
        raise ValueError(f"`depth` must be one of {RESNET_DEPTHS}; got {depth!r}.")
    return CifarResNet((depth - 2) // 6, num_classes)


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "digits": DigitsNet,
    "fashion": FashionNet,
    **{f"resnet{depth}": partial(resnet, depth) for depth in RESNET_DEPTHS},
}

# Keyword arguments of `train_classifier` by data set: enough epochs for a training accuracy of 1.
TRAINING: dict[str, dict[str, Any]] = {
    "digits": {"epochs": 300, "learning_rate": 0.3, "batch_size": 32},
    "fashionmnist": {"epochs": 20, "learning_rate": 0.01, "batch_size": 64},
    "mnist": {"epochs": 20, "learning_rate": 0.01, "batch_size": 64},
}


def checkpoint_path(arch: str, root: str | Path) -> Path:
    """The published CIFAR-10 checkpoint of `arch` in the data folder `root`.

    Raises:
        FileNotFoundError: If it is not there.
    """
    folder = Path(root) / CHECKPOINT_FOLDER
    found = sorted(folder.glob(f"cifar10_{arch}-*.pt"))
    if not found:
        raise FileNotFoundError(
            f"No cifar10_{arch}-*.pt in {folder}. Point --root (or ELLA_DATA) at the data folder; "
            "the checkpoints are released at https://github.com/chenyaofo/pytorch-cifar-models."
        )
    return found[0]


def load_model(arch: str, weights_path: str | Path) -> nn.Module:
    """A trained classifier in eval mode.

    Args:
        arch: A key of `ARCHITECTURES`.
        weights_path: A state dict written by `torch.save`; every name must match.

    Returns:
        The classifier, on the CPU.

    Raises:
        ValueError: For an unknown architecture.
        FileNotFoundError: If there is no such file.
    """
    if arch not in ARCHITECTURES:
        raise ValueError(f"`arch` must be one of {tuple(ARCHITECTURES)}; got {arch!r}.")
    if not Path(weights_path).is_file():
        raise FileNotFoundError(
            f"No weights at {weights_path}. Check --root (or ELLA_DATA); "
            "checkpoint_path(arch, root) finds the published ones."
        )
    model = ARCHITECTURES[arch]()
    state = torch.load(weights_path, map_location="cpu", weights_only=True)
    model.load_state_dict(state, strict=True)
    return model.eval()


def train_classifier(
    model: nn.Module,
    dataset: TensorDataset,
    seed: int = 0,
    epochs: int = 300,
    **options: Any,  # noqa: ANN401
) -> nn.Module:
    """Fit `model` by plain cross-entropy; see `train_network`.

    No augmentation, smoothing or early stopping: the over-confidence of such a fit is what the
    experiments are about. The defaults suit `DigitsNet`; `TRAINING` holds settings by data set.
    """
    return train_network(model, dataset, F.cross_entropy, seed, epochs, **options)


def train_network(
    model: nn.Module,
    dataset: TensorDataset,
    loss: Callable[[Tensor, Tensor], Tensor],
    seed: int = 0,
    epochs: int = 300,
    **options: Any,  # noqa: ANN401
) -> nn.Module:
    """Fit `model` from new weights; see `fine_tune`.

    Args:
        model: Trained in place. Its weights are drawn anew first, so that `seed` decides the
            result alone.
        dataset: Inputs and labels or targets.
        loss: From outputs and labels of a batch to their mean loss.
        seed: Seed of the weights and of the order of the examples.
        epochs: Passes over the data.
        options: As for `fine_tune`.

    Returns:
        `model`, in eval mode.
    """
    generator = torch.Generator().manual_seed(seed)
    initialize(model, generator)
    return fine_tune(model, dataset, loss, generator, epochs, **options)


def fine_tune(
    model: nn.Module,
    dataset: TensorDataset,
    loss: Callable[[Tensor, Tensor], Tensor],
    generator: torch.Generator,
    epochs: int,
    *,
    learning_rate: float = 0.3,
    batch_size: int = 32,
    weight_decay: float = 0.0,
    device: torch.device | str = "cpu",
    num_threads: int = 1,
) -> nn.Module:
    """Fit `model` from the weights it has, with Adam and a one-cycle learning rate.

    Args:
        model: Trained in place.
        dataset: Inputs and labels or targets.
        loss: From outputs and labels of a batch to their mean loss.
        generator: Source of the order of the examples.
        epochs: Passes over the data.
        learning_rate: Peak of the cycle.
        batch_size: Examples a step.
        weight_decay: As in AdamW.
        device: Where to train; the model stays there.
        num_threads: CPU threads while training. One is the default because steps this small spend
            a second thread on waiting: on a busy machine two took a hundred times as long.

    Returns:
        `model`, in eval mode.
    """
    model.to(device)
    inputs, labels = (tensor.to(device) for tensor in dataset.tensors)
    count = -(-len(inputs) // batch_size)

    def shuffled() -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(inputs), generator=generator)
        # Parts of equal size: a short last batch would disturb the BatchNorm statistics.
        return ((inputs[rows], labels[rows]) for rows in order.tensor_split(count))

    def batch_loss(x: Tensor, y: Tensor) -> Tensor:
        return loss(model(x), y)

    pace = {"learning_rate": learning_rate, "weight_decay": weight_decay}
    with _cpu_threads(num_threads):
        return descend(model, shuffled, batch_loss, epochs * count, **pace)


def descend(
    model: nn.Module,
    batches: Callable[[], Iterable[tuple[Any, Tensor]]],
    loss: Callable[[Any, Tensor], Tensor],
    steps: int,
    *,
    learning_rate: float,
    weight_decay: float,
) -> nn.Module:
    """AdamW with a one-cycle learning rate.

    Args:
        model: Trained in place, from the weights it has.
        batches: Gives those of one epoch, (x, y).
        loss: From a batch to its mean loss.
        steps: In all; epochs follow one another until then.
        learning_rate: Peak of the cycle.
        weight_decay: As in AdamW.

    Returns:
        `model`, in eval mode.
    """
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    epochs = chain.from_iterable(batches() for _ in repeat(None))
    for x, y in islice(epochs, steps):
        value = loss(x, y)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
    model.zero_grad()
    return model.eval()


@contextmanager
def _cpu_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def initialize(model: nn.Module, generator: torch.Generator) -> None:
    """Draw the weights of convolutions and linear layers (He et al., 2015); reset BatchNorm.

    Args:
        model: Changed in place; on the CPU.
        generator: Source of the draws.
    """
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()


@torch.no_grad()
def batched_logits(model: nn.Module, images: Tensor, batch_size: int = 500) -> Tensor:
    """Logits (n, c) of many images, a batch at a time, on the CPU.

    Args:
        model: In the mode it is in.
        images: Shape (n, channels, h, w).
        batch_size: Images a forward pass.

    Returns:
        The logits.
    """
    device = next(model.parameters()).device
    return torch.cat([model(part.to(device)).cpu() for part in images.split(batch_size)])


def _conv_block(in_channels: int, channels: int) -> tuple[nn.Module, ...]:
    # BatchNorm supplies the bias.
    return (
        nn.Conv2d(in_channels, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.MaxPool2d(2),
    )


def _conv3x3(in_channels: int, channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)


def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, channels, stride)
    rest = (BasicBlock(channels, channels, 1) for _ in range(blocks - 1))
    return nn.Sequential(first, *rest)
