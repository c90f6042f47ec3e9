"""Frozen features: what is read, where, and that reading changes nothing."""

import pytest
import torch
from cases import make_case
from torch import nn

from ella.activations import STATISTICS, FeatureTaps, Tap
from ella.choosing import MAX_WIDTH, choose_taps
from ella.network import Network


class Block(nn.Module):
    """A residual block whose ReLU overwrites what its normalisation returned."""

    def __init__(self, channels, stride=1):
        super().__init__()
        self.conv = nn.Conv2d(channels // stride, channels, 3, stride, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.relu(self.norm(self.conv(x)))
        return out + x if out.shape == x.shape else out


def convnet(channels=6):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1),
        Block(channels),
        Block(2 * channels, stride=2),
        Block(2 * channels),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * channels, 4),
    ).eval()


def images(n=5, size=8):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("channels_first", [True, False])
@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (2, 3, 7), (2, 3, 1, 1)])
def test_pooling_is_mean_deviation_and_share_above_zero(shape, channels_first):
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    images[0, 0] = 0.0  # neither above zero nor spread
    activation = images if channels_first else images.movedim(1, -1)
    pooled = Tap("any", "output", channels_first).pool(activation)
    expected = []
    for image in images:
        means = [c.mean() for c in image]
        deviations = [c.std(correction=0) for c in image]
        shares = [(c > 0).float().mean() for c in image]
        expected.append(torch.stack(means + deviations + shares))
    assert pooled.shape == (2, 3 * STATISTICS)
    torch.testing.assert_close(pooled, torch.stack(expected))


def test_taps_cover_the_last_stage_and_end_with_the_penultimate_features():
    network = Network(convnet())
    taps = choose_taps(network, images())
    names = [tap.module for tap in taps]
    assert names[-1] == "6"
    assert taps[-1].side == "input"
    assert {"2.norm", "3.norm", "2"} <= set(names)
    assert "1.norm" not in names  # an earlier stage
    assert len(set(names)) == len(names)


def test_the_last_stage_is_bounded():
    channels = MAX_WIDTH // STATISTICS // 4  # 2 · channels each: room for two of the layers
    taps = choose_taps(Network(convnet(channels)), images())
    names = [tap.module for tap in taps]
    first = names.index("3.norm")  # the latest first
    assert names[first:] == ["3.norm", "2", "6"]


def test_what_a_container_passes_on_is_read_once():
    inner = convnet()
    nested = nn.Sequential(
        inner[0], nn.Sequential(inner[1]), nn.Sequential(*inner[2:4]), *inner[4:]
    )
    network = Network(nested.eval())
    _, features = FeatureTaps(network, choose_taps(network, images()))(images())
    flat = Network(inner)
    _, expected = FeatureTaps(flat, choose_taps(flat, images()))(images())
    assert torch.equal(features, expected)


def test_features_of_a_batch_are_those_of_its_examples_and_end_with_the_logits():
    model = convnet()
    network = Network(model)
    taps = FeatureTaps(network, choose_taps(network, images()))
    logits, features = taps(images())
    assert torch.equal(logits, model(images()))
    assert torch.equal(features[:, -4:], logits)
    alone = torch.cat([taps(x[None])[1] for x in images()])
    torch.testing.assert_close(features, alone, rtol=1e-4, atol=1e-5)


def test_an_in_place_relu_does_not_change_what_was_read():
    network = Network(convnet())
    _, features = FeatureTaps(network, [Tap("3.norm", "output", True)])(images())
    share = features[:, 2 * 12 : 3 * 12]
    assert (share < 1).any()
    assert (features[:, :12] < 0).any()  # means before the ReLU


@pytest.mark.parametrize("channels_first", [True, False])
def test_padding_is_not_pooled(channels_first):
    sequences = torch.randn(3, 5, 2, generator=torch.Generator().manual_seed(0))
    lengths = (5, 3, 1)
    mask = torch.tensor([[1] * length + [0] * (5 - length) for length in lengths])
    tap = Tap("any", "output", channels_first)

    def laid_out(x):
        return x.movedim(-1, 1) if channels_first else x

    pooled = tap.pool(laid_out(sequences), mask)
    for row, sequence, length in zip(pooled, sequences, lengths, strict=True):
        torch.testing.assert_close(row, tap.pool(laid_out(sequence[None, :length]))[0])
    further = torch.cat([sequences, torch.ones(3, 2, 2)], dim=1)  # as some models pad
    torch.testing.assert_close(tap.pool(laid_out(further), mask), pooled)


def test_features_of_a_sequence_are_the_same_alone_and_padded():
    case = make_case("padded")
    network = Network(case.model)
    taps = FeatureTaps(network, choose_taps(network, case.x))
    logits, features = taps(case.x)
    lengths = case.x["attention_mask"].sum(1)
    assert lengths.min() < 5
    for i, length in enumerate(lengths):
        alone = {name: t[i : i + 1, :length] for name, t in case.x.items()}
        expected = taps(alone)
        torch.testing.assert_close((logits[i : i + 1], features[i : i + 1]), expected)


def test_of_a_transformer_the_residual_stream_is_read():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.TransformerEncoderLayer(4, 2, 20, batch_first=True) for _ in range(4)]
        model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * 3, 2)).eval()
    x = torch.randn(2, 3, 4)
    taps = choose_taps(Network(model), x)
    shapes = {}
    for tap in taps[:-1]:
        module = model.get_submodule(tap.module)
        module.register_forward_hook(
            lambda m, args, out, name=tap.module: shapes.update({name: out.shape[1:]})
        )
    model(x)
    assert set(shapes.values()) <= {(3, 4), (12,)}
    assert "3" in shapes
    assert any(name.startswith(("1", "2")) for name in shapes)
