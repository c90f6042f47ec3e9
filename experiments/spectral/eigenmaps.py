"""Do eigenfunctions of the augmentation kernel make good, ordered representations?

    python experiments/spectral/eigenmaps.py --root $ELLA_DATA

No labels: two random views (shift, turn, scale, cut-out) of each image, and a small convolution
net whose outputs become the leading eigenfunctions of the kernel that views share
(`ella.spectral.Views` with NestedLoRA). On scikit-learn's digits (8x8) and on FashionMNIST:

- probe: accuracy of a logistic regression on the backbone's features; transfer: of one on MNIST,
  with the backbone from FashionMNIST;
- retrieval: mean average precision of ranking by cosine, with the first d numbers of the code
  ψ√μ; "random columns" and "PCA" shorten the same code in other ways.

Peers on the same network, batches and steps: the spectral contrastive loss, which finds the span
without an order, and Barlow Twins; also pixels, PCA of pixels and the untrained network.

Reference: Neural Eigenfunctions Are Structured Representation Learners (Deng et al., 2022),
https://arxiv.org/abs/2210.12637; Provable Guarantees for Self-Supervised Deep Learning with
Spectral Contrastive Loss (HaoChen et al., 2021), https://arxiv.org/abs/2106.04156; Barlow Twins:
Self-Supervised Learning via Redundancy Reduction (Zbontar et al., 2021),
https://arxiv.org/abs/2103.03230
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _common import (
    Headline,
    Ledger,
    SpectralSettings,
    asked,
    cpu_timed,
    finish,
    mean_of,
    new_figure,
)
from _data import data_root, load_task
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn import functional as F

from ella.spectral import NestedLoRA, Objective, SpectralLoss, Training, Views, ritz_basis, train

RANK = 64
LENGTHS = (2, 4, 8, 16, 32, 64)
OURS, CONTRASTIVE, BARLOW = "neural eigenmaps", "spectral contrastive", "Barlow Twins"
UNTRAINED, PRINCIPAL, PIXELS = "untrained network", "PCA", "pixels"
METHODS = (OURS, CONTRASTIVE, BARLOW, UNTRAINED, PRINCIPAL, PIXELS)
STEPS = {"digits": 800, "FashionMNIST": 500}
QUERIES = 400
"""Of retrieval."""


@dataclass(frozen=True)
class BarlowTwins:
    r"""Cross-correlations of two views: :math:`\sum_i (1 - C_{ii})^2 + w \sum_{i≠j} C_{ij}^2`.

    Fits the `Objective` of the shared loop: Tψ holds the other view, and as rows come in both
    orders, the gradient in ψ alone is half of the whole one.

    Attributes:
        weight: w.
    """

    weight: float = 5e-3

    def gradient(self, psi: Tensor, tpsi: Tensor, source: Tensor) -> Tensor:
        """See `Objective.gradient`; the source is not used."""
        with torch.enable_grad():
            values = psi.detach().requires_grad_()
            return torch.autograd.grad(self._value(values, tpsi), values)[0]

    def loss(self, psi: Tensor, tpsi: Tensor, source: Tensor) -> float:
        """See `Objective.loss`."""
        return self._value(psi, tpsi).item()

    def _value(self, psi: Tensor, tpsi: Tensor) -> Tensor:
        left, right = (
            (each - each.mean(0)) / (each.std(0) + 1e-5) for each in (psi[:, 0], tpsi[:, 0])
        )
        cross = left.T @ right / len(left)
        diagonal = cross.diagonal()
        others = cross.square().sum() - diagonal.square().sum()
        return (1 - diagonal).square().sum() + self.weight * others


OBJECTIVES: dict[str, Objective] = {
    OURS: NestedLoRA(),
    CONTRASTIVE: NestedLoRA(nested=False),
    BARLOW: BarlowTwins(),
}


@dataclass(frozen=True)
class Images:
    """Images without labels, and labelled ones to judge by.

    Attributes:
        train: Shape (n, 1, h, w), values about 0 to 1.
        train_labels: For the probe and as the database of retrieval only.
        test: Held-out images.
        test_labels: Theirs.
        transfer: Another labelled set for the probe: images and labels, training then test.
    """

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    transfer: tuple[Tensor, Tensor, Tensor, Tensor] | None = None


def digits(seed: int) -> Images:
    """scikit-learn's digits: 1,000 to learn from, 797 held out."""
    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float().unsqueeze(1) / 16
    labels = torch.from_numpy(bunch.target).long()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    train, test = order[:1000], order[1000:]
    return Images(images[train], labels[train], images[test], labels[test])


def fashion(root: Path, seed: int) -> Images:
    """FashionMNIST: 5,000 to learn from and 2,000 held out; MNIST for the transfer."""
    parts = []
    for name in ("fashionmnist", "mnist"):
        task = load_task(name, root, seed, num_val=100, num_test=2000)
        scaled = [0.5 + 0.3 * each.tensors[0] for each in (task.train, task.test)]
        parts.append((scaled[0], task.train.tensors[1], scaled[1], task.test.tensors[1]))
    return Images(*parts[0], parts[1])


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Turned up to 15°, scaled and shifted up to 15 %, with a square cut out: one view each."""
    n, _, height, width = images.shape
    spread = 2 * torch.rand(n, 4, generator=generator) - 1
    angle, zoom = 0.26 * spread[:, 0], 1 + 0.15 * spread[:, 1]
    rows = [zoom * angle.cos(), -zoom * angle.sin(), 0.3 * spread[:, 2]]
    rows += [zoom * angle.sin(), zoom * angle.cos(), 0.3 * spread[:, 3]]
    affine = torch.stack(rows, 1).view(n, 2, 3)
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    views = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    corner = torch.rand(2, n, 1, generator=generator)
    size = height // 4
    across = torch.arange(width) - corner[0] * (width - size)
    down = torch.arange(height) - corner[1] * (height - size)
    inside = ((down >= 0) & (down < size))[:, :, None] & ((across >= 0) & (across < size))[:, None]
    return views.masked_fill(inside.unsqueeze(1), 0.0)


class ConvNetwork(nn.Module):
    """Three convolutions and a pooled backbone (n, 64), then a projector to (n, 1, k).

    Args:
        stride: Of the first convolution.
        rank: k.
        seed: Of the weights.
    """

    def __init__(self, stride: int, rank: int, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.backbone = nn.Sequential(
                *_stage(1, 16, stride),
                *_stage(16, 32, 2),
                *_stage(32, 64, 2),
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
            )
            hidden = (nn.Linear(64, 256, bias=False), nn.BatchNorm1d(256), nn.ReLU())
            self.projector = nn.Sequential(*hidden, nn.Linear(256, rank))

    def forward(self, images: Tensor) -> Tensor:
        """Shape (n, 1, k)."""
        return self.projector(self.backbone(images)).unsqueeze(1)


def _stage(num_inputs: int, num_outputs: int, stride: int) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(num_inputs, num_outputs, 3, stride, padding=1, bias=False)
    return convolution, nn.BatchNorm2d(num_outputs), nn.ReLU()


@dataclass(frozen=True)
class Representation:
    """What one method makes of an image.

    Attributes:
        features: Images ↦ (n, any), for the probe.
        code: Images ↦ (n, k), the most important columns first, for retrieval; None: no code.
        order: Spearman's correlation of the raw columns' norms with their order, reversed.
    """

    features: Callable[[Tensor], Tensor]
    code: Callable[[Tensor], Tensor] | None = None
    order: float | None = None


def first_stride(data: Images) -> int:
    """Small images keep their size in the first convolution."""
    return 1 if data.train.shape[-1] < 16 else 2


def learn(data: Images, method: str, steps: int, seed: int) -> Representation:
    """Train with one objective. The constant, the top eigenfunction, is left out of the code."""
    generator = torch.Generator().manual_seed(seed)
    network = ConvNetwork(first_stride(data), RANK + 1, seed)
    problem = Views(data.train, augment, generator=generator, holdout=0.05)
    training = Training(
        steps=steps,
        batch_size=256,
        learning_rate=3e-3,
        weight_decay=1e-4,
        checks=10 if steps > 100 else 1,
        patience=99,
    )
    loss = SpectralLoss(problem, OBJECTIVES[method])
    train(network, loss, training, generator=generator, progress=False)
    network.requires_grad_(False)
    raw = network(data.train)[:, 0]
    norms = raw.square().mean(0)
    order = float(spearmanr(norms.numpy(), range(len(norms), 0, -1)).statistic)
    if method == BARLOW:  # its columns have no order and no eigenvalues
        mean, scale = raw.mean(0), raw.std(0) + 1e-5

        def standardised(x: Tensor) -> Tensor:
            return ((network(x)[:, 0] - mean) / scale)[:, :RANK]

        return Representation(network.backbone, standardised, order)
    basis = ritz_basis(network, problem, generator, 24 if steps > 100 else 2, 1024)
    return Representation(network.backbone, lambda x: basis.features(x)[:, 0, 1:], order)


def untrained(data: Images, seed: int) -> Representation:
    """The same network with its first weights, and batch statistics of the images."""
    network = ConvNetwork(first_stride(data), RANK, seed).requires_grad_(False)
    network.train()(data.train[:1000])
    return Representation(network.eval().backbone)


def components(data: Images) -> Representation:
    """The leading principal components of the pixels."""
    mean = data.train.flatten(1).mean(0)
    axes = torch.linalg.svd(data.train.flatten(1) - mean, full_matrices=False).Vh[:RANK].T

    def project(x: Tensor) -> Tensor:
        return (x.flatten(1) - mean) @ axes

    return Representation(project, project)


def represent(data: Images, method: str, steps: int, seed: int) -> Representation:
    """By the name that rows have."""
    if method in OBJECTIVES:
        return learn(data, method, steps, seed)
    if method == UNTRAINED:
        return untrained(data, seed)
    if method == PRINCIPAL:
        return components(data)
    return Representation(lambda x: x.flatten(1))


def probe(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
    """Accuracy of a logistic regression on standardised features."""
    mean, scale = train.mean(0), train.std(0) + 1e-5
    model = LogisticRegression(C=0.1, max_iter=200)
    model.fit(((train - mean) / scale).numpy(), train_labels.numpy())
    return float(model.score(((test - mean) / scale).numpy(), test_labels.numpy()))


def average_precision(
    queries: Tensor, query_labels: Tensor, database: Tensor, labels: Tensor
) -> float:
    """Mean over queries of the average precision of all of the database, ranked by cosine."""
    cosines = F.normalize(queries, dim=1) @ F.normalize(database, dim=1).T
    ranked = labels[cosines.argsort(1, descending=True)] == query_labels.unsqueeze(1)
    found = ranked.double().cumsum(1)
    ranks = torch.arange(1, ranked.shape[1] + 1)
    return ((found / ranks * ranked).sum(1) / ranked.sum(1)).mean().item()


def retrieval(
    code: Callable[[Tensor], Tensor], data: Images, num_queries: int, seed: int
) -> dict[str, float]:
    """Mean average precision of short codes: leading, random, and principal columns."""
    database, queries = code(data.train), code(data.test[:num_queries])
    permuted = torch.randperm(RANK, generator=torch.Generator().manual_seed(seed))
    mean = database.mean(0)
    axes = torch.linalg.svd(database - mean, full_matrices=False).Vh.T
    shortenings: dict[str, Callable[[Tensor], Tensor]] = {
        "map": lambda x: x,
        "map_random": lambda x: x[:, permuted],
        "map_pca": lambda x: (x - mean) @ axes,
    }
    figures = {}
    for name, shorten in shortenings.items():
        left, right = shorten(queries), shorten(database)
        for d in LENGTHS:
            figures[f"{name}_{d}"] = average_precision(
                left[:, :d], data.test_labels[:num_queries], right[:, :d], data.train_labels
            )
    return figures


def row_of(name: str, data: Images, method: str, seed: int, smoke: bool) -> dict[str, Any]:
    """One method on one data set."""
    steps = 10 if smoke else STEPS[name]
    found, seconds = cpu_timed(lambda: represent(data, method, steps, seed))
    train, test = found.features(data.train), found.features(data.test)
    row: dict[str, Any] = {
        "method": f"{name}: {method}",
        "seed": seed,
        "probe": probe(train, data.train_labels, test, data.test_labels),
        "seconds": seconds,
    }
    if data.transfer is not None:
        x, y, new, truth = data.transfer
        row["transfer"] = probe(found.features(x), y, found.features(new), truth)
    if found.order is not None:
        row["order"] = found.order
    if found.code is not None:
        row |= retrieval(found.code, data, 100 if smoke else QUERIES, seed)
    return row


def figure(rows: list[dict[str, Any]], names: list[str]) -> Figure:
    """Retrieval against the length of the code."""
    drawn = new_figure(4.6 * len(names), 3.6)
    panels = drawn.subplots(1, len(names), squeeze=False)[0]
    lines = (
        (OURS, "map", "o-"),
        (OURS, "map_random", "o:"),
        (CONTRASTIVE, "map", "s-"),
        (BARLOW, "map", "D-"),
        (BARLOW, "map_pca", "D:"),
        (PRINCIPAL, "map", "^-"),
    )
    titles = {"map": "", "map_random": ", random columns", "map_pca": ", PCA of the code"}
    for panel, name in zip(panels, names, strict=True):
        for method, key, style in lines:
            values = [mean_of(rows, f"{name}: {method}", f"{key}_{d}") for d in LENGTHS]
            panel.semilogx(LENGTHS, values, style, label=method + titles[key], base=2)
        panel.set(title=name, xlabel="numbers in the code", ylabel="mean average precision")
        panel.set_xticks(LENGTHS, LENGTHS)
    panels[0].legend(frameon=False, fontsize=7)
    return drawn


def main(argv: list[str] | None = None) -> None:
    """Run what is missing and write everything."""
    settings = asked(SpectralSettings, __doc__.splitlines()[0], argv)
    ledger = Ledger("eigenmaps", settings)
    names = ["digits"] if settings.smoke else ["digits", "FashionMNIST"]
    for seed in range(settings.first_seed, settings.first_seed + settings.seeds):
        for name in names:
            missing = [each for each in METHODS if (seed, f"{name}: {each}") not in ledger]
            if missing:
                data = (
                    digits(seed) if name == "digits" else fashion(data_root(settings.root), seed)
                )
            for method in missing:
                ledger.add(row_of(name, data, method, seed, settings.smoke))
    rows = ledger.rows

    def figure_of(key: str, method: str = OURS, name: str = names[-1]) -> float:
        return mean_of(rows, f"{name}: {method}", key)

    def passes(name: str) -> bool:
        ours = {key: figure_of(key, OURS, name) for key in ("probe", "map_8", "map_64", "order")}
        return (
            ours["probe"] >= figure_of("probe", UNTRAINED, name) + 0.03
            and ours["probe"] >= figure_of("probe", BARLOW, name) - 0.01
            and ours["map_8"] >= 0.95 * ours["map_64"]
            and ours["map_8"] >= figure_of("map_random_8", OURS, name) + 0.05
            and ours["order"] > 0.95
        )

    peer = max(METHODS[1:], key=lambda method: figure_of("probe", method))
    headline = Headline(
        question="Do eigenfunctions of the augmentation kernel make good, ordered features?",
        metric=f"linear probe, {names[-1]}",
        ours=figure_of("probe"),
        peer=peer,
        theirs=figure_of("probe", peer),
        truth=None,
        goal="probe ≥ untrained + .03 and ≥ Barlow Twins − .01; mAP of 8 columns ≥ 95 % of that "
        "of 64 and ≥ random columns + .05; order > .95",
        reached=all(passes(name) for name in names),
        seconds=figure_of("seconds"),
    )
    finish("eigenmaps", settings, rows, headline, figure(rows, names))


if __name__ == "__main__":
    main()
