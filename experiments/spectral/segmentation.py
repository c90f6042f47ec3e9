"""Do neural eigenfunctions of a patch graph segment pictures that they have not seen?

    python experiments/spectral/segmentation.py

Nodes are the patches of a set of pictures. Edges join patches of different pictures with similar
features, and patches of one picture that are near in colour and place; the leading eigenfunctions
of the normalised affinity relax the normalised cut (NCut). A perceptron on a patch's features
learns them from groups of training pictures (`GraphGroups`), and k-means on its outputs names the
clusters. A new picture then needs neither graph nor eigenvectors.

Data: scenes drawn with textures, where masks are exact, and CamVid with features of a frozen
ImageNet EfficientNet-Lite0. Masks serve for judging only. Compared on the same held-out pictures:

- k-means on the features, and on all that the perceptron reads (colour and place as well);
- spectral clustering of each held-out picture by itself, from scikit-learn, which is told the
  true number of classes in the picture;
- the exact eigenvectors of the graph of all held-out pictures, clustered as ours are. NCut is
  judged on this graph.

Clusters are matched to classes one to one, for the largest sum of IoU, for all methods alike, in
three ways: on the held-out masks of all pictures together ("miou"), on the training masks
("miou_train"), or picture by picture ("miou_image", the only one that spectral clustering of
single pictures admits). Test time leaves out the features, which are the same for all.

Settings were chosen on the training and validation pictures; the test pictures are only reported.

References: Learning Neural Eigenfunctions for Unsupervised Semantic Segmentation (Deng & Luo,
2023), https://arxiv.org/abs/2304.02841; Normalized Cuts and Image Segmentation (Shi & Malik,
2000); On Spectral Clustering: Analysis and an Algorithm (Ng, Jordan & Weiss, 2001).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from _common import Headline, SpectralSettings, asked, cpu_timed, finish, mean_of, new_figure
from _data import data_root
from _report import Row
from _scenes import VOID, Scenes, camvid, textured_scenes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_matrix
from scipy.sparse.linalg import eigsh
from sklearn.cluster import KMeans, SpectralClustering
from sklearn.metrics import adjusted_rand_score
from torch import Tensor, nn
from torch.nn import functional as F

from ella.spectral import Eigenbasis, Graph, Pair, ResidualMLP, Training, learn_eigenbasis, whole

OURS = "neural eigenfunctions"
KMEANS = "k-means"
KMEANS_ALL = "k-means with colour and place"
SINGLE = "spectral clustering, each picture"
EXACT = "exact eigenvectors, all at once"
NUM_FUNCTIONS = 16
# Colour-blind safe (Paul Tol's muted scheme and two of his bright one); grey: no class.
COLORS = (
    *("#88CCEE", "#882255", "#DDCC77", "#332288", "#AA4499", "#117733"),
    *("#CC6677", "#44AA99", "#EE7733", "#999933", "#CCBB44"),
)
NO_CLASS = "#DDDDDD"


@dataclass(frozen=True)
class Study:
    """Data and the sizes that go with them.

    Attributes:
        name: Of the data.
        train: Training pictures.
        test: Held-out pictures.
        group: Pictures that share a training graph.
        training: See `ella.spectral.Training`.
    """

    name: str
    train: Scenes
    test: Scenes
    group: int
    training: Training


@dataclass(frozen=True)
class Patches:
    """What the methods see of a set of n pictures with p patches each.

    Attributes:
        features: Principal components of the features, of unit length, shape (n, p, d).
        colors: Mean colour, shape (n, p, 3).
        places: Row and column in [0, 1], shape (n, p, 2).
    """

    features: Tensor
    colors: Tensor
    places: Tensor

    def subset(self, rows: Tensor | slice) -> "Patches":
        """Some of the pictures."""
        return Patches(self.features[rows], self.colors[rows], self.places[rows])

    def inputs(self) -> Tensor:
        """All of it, each part of about unit mean square: one row a patch, shape (n·p, d + 5)."""
        features = self.features * self.features.shape[-1] ** 0.5
        spread = [(part - 0.5) * 12**0.5 for part in (self.colors, self.places)]
        return torch.cat([features, *spread], -1).flatten(0, 1)


def patches_of(scenes: Sequence[Scenes], *, components: int = 64) -> list[Patches]:
    """Standardise the features and project them, with the statistics of the first set."""
    flat = scenes[0].features.flatten(0, 2)
    mean, scale = flat.mean(0), flat.std(0)
    axes = torch.linalg.eigh((flat - mean).div(scale).T.cov()).eigenvectors[:, -components:]
    found = []
    for each in scenes:
        features = F.normalize((each.features - mean) / scale @ axes, dim=-1).flatten(1, 2)
        colors = F.adaptive_avg_pool2d(each.images, each.grid).flatten(2).mT
        axis = [torch.linspace(0, 1, count) for count in each.grid]
        places = torch.stack(torch.meshgrid(*axis, indexing="ij"), -1).flatten(0, 1)
        found.append(Patches(features, colors, places.expand(len(features), -1, -1)))
    return found


def nearest(distances: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Column indices (n, count) of the smallest entries of each row, and the entries."""
    found = distances.topk(count, largest=False)
    return found.indices, found.values


def feature_edges(features: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Edges (2, n·p·count) from each patch to the most similar ones of other pictures.

    Staying in the picture would make its own boundary the cheapest cut of all. A picture alone has
    edges within.

    Args:
        features: Of unit length, shape (n, p, d).
        count: Edges from each patch.

    Returns:
        The edges between rows of the flattened patches, and their cosines, at least 0.
    """
    n, p, _ = features.shape
    flat, targets, cosines = features.flatten(0, 1), [], []
    for i, own in enumerate(features):
        away = 1 - own @ flat.T
        within = away[:, i * p : (i + 1) * p]
        within.fill_diagonal_(torch.inf) if n == 1 else within.fill_(torch.inf)
        found, distances = nearest(away, count)
        targets.append(found.flatten())
        cosines.append((1 - distances).clamp_min(0).flatten())
    sources = torch.arange(n * p).repeat_interleave(count)
    return torch.stack([sources, torch.cat(targets)]), torch.cat(cosines)


def pixel_edges(colors: Tensor, places: Tensor, count: int) -> Tensor:
    """Edges (2, p·count) of one picture to the patches nearest in colour and place."""
    points = torch.cat([colors, places], 1)
    targets, _ = nearest(torch.cdist(points, points).fill_diagonal_(torch.inf), count)
    return torch.stack([torch.arange(len(points)).repeat_interleave(count), targets.flatten()])


def affinity(patches: Patches, *, neighbors: int = 10, pixel_weight: float = 1.0) -> Tensor:
    r"""The affinities :math:`W = \hat A_{feature} + w \hat A_{pixel}`, sparse (n·p, n·p).

    Both are normalised, :math:`\hat A = D^{-1/2} A D^{-1/2}`. Pixel edges are drawn twice, once
    with place counting much and once with it counting little.
    """
    n, p, _ = patches.features.shape
    edges, cosines = feature_edges(patches.features, neighbors)
    near = [
        pixel_edges(colors, weight * places, neighbors) + i * p
        for i, (colors, places) in enumerate(zip(patches.colors, patches.places, strict=True))
        for weight in (2.0, 0.1)
    ]
    alike, close = Graph(edges, n * p, cosines), Graph(torch.cat(near, 1), n * p)
    return (alike.matrix + pixel_weight * close.matrix).coalesce()


def normalized(weights: Tensor) -> Graph:
    """The graph of an affinity matrix: eigenfunctions of its operator relax NCut of W."""
    return Graph(weights.indices(), len(weights), weights.values())


class GraphGroups:
    """Graphs on several groups of pictures, one group a batch: Tψ is exact within the group.

    Each group is a sample of the operator on all pictures. (A `Problem` of `ella.spectral`.)

    Args:
        groups: Inputs of the network and the graph on them, for each group.
        held: The same for a group that is never in a batch.
    """

    def __init__(self, groups: Sequence[tuple[Tensor, Graph]], held: tuple[Tensor, Graph]) -> None:
        self.groups, self.held = groups, held

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Graph]:
        """One group, whatever `size` is."""
        return self.groups[int(torch.randint(len(self.groups), (), generator=generator))]

    def held_out(self) -> tuple[Tensor, Graph]:
        """The group held out."""
        return self.held

    def evaluate(self, network: nn.Module, batch: tuple[Tensor, Graph]) -> tuple[Tensor, Tensor]:
        """See `Problem.evaluate`."""
        inputs, graph = batch
        psi = network(inputs)
        product = torch.sparse.mm(graph.matrix, psi.detach().flatten(1))
        return psi, product.view_as(psi)

    def pairs(self, n: int) -> list[Pair]:
        """The whole group."""
        return whole(n)


def learn(study: Study, patches: Patches, generator: torch.Generator) -> Eigenbasis:
    """Eigenfunctions from two divisions of the training pictures into groups."""

    def prepare(rows: Tensor) -> tuple[Tensor, Graph]:
        chosen = patches.subset(rows)
        return chosen.inputs(), normalized(affinity(chosen))

    order = torch.randperm(len(patches.features), generator=generator)
    held, pool = order[: study.group], order[study.group :]
    divisions = [pool[torch.randperm(len(pool), generator=generator)] for _ in range(2)]
    groups = [prepare(rows) for each in divisions for rows in each.split(study.group)]
    network = ResidualMLP(
        patches.inputs().shape[1], (1, NUM_FUNCTIONS), width=128, generator=generator
    )
    return learn_eigenbasis(
        network,
        GraphGroups(groups, prepare(held)),
        study.training,
        generator=generator,
        num_batches=len(groups),
        progress=False,
    )


@dataclass(frozen=True)
class Segmenter:
    """Nearest of the centres that k-means finds for an embedding of the training patches.

    Attributes:
        embed: `patches` ↦ (n·p, e).
        centers: Shape (clusters, e).
    """

    embed: Callable[[Patches], Tensor]
    centers: Tensor

    @classmethod
    def fit(
        cls, embed: Callable[[Patches], Tensor], train: Patches, clusters: int, seed: int
    ) -> "Segmenter":
        """k-means with ten starts."""
        found = KMeans(clusters, n_init=10, random_state=seed).fit(embed(train).numpy())
        return cls(embed, torch.from_numpy(found.cluster_centers_))

    def __call__(self, patches: Patches) -> Tensor:
        """The cluster of each patch, shape (n, p)."""
        labels = torch.cdist(self.embed(patches), self.centers).argmin(1)
        return labels.view(patches.features.shape[:2])


def fit_ours(study: Study, patches: Patches, clusters: int, seed: int) -> Segmenter:
    """k-means on the eigenfunctions ψ√μ, each row scaled to length 1 (Ng, Jordan & Weiss).

    The scaling removes the factor √degree of an eigenvector, which a new patch does not have.
    """
    basis = learn(study, patches, torch.Generator().manual_seed(seed))
    return Segmenter.fit(
        lambda some: F.normalize(basis.features(some.inputs())[:, 0], dim=1),
        patches,
        clusters,
        seed,
    )


def fit_kmeans_all(study: Study, patches: Patches, clusters: int, seed: int) -> Segmenter:
    """k-means on everything that the perceptron reads."""
    return Segmenter.fit(Patches.inputs, patches, clusters, seed)


def fit_kmeans(study: Study, patches: Patches, clusters: int, seed: int) -> Segmenter:
    """k-means on the features of unit length, whose products are the graph's cosines."""
    return Segmenter.fit(lambda some: some.features.flatten(0, 1), patches, clusters, seed)


LEARNERS: dict[str, Callable[[Study, Patches, int, int], Segmenter]] = {
    OURS: fit_ours,
    KMEANS: fit_kmeans,
    KMEANS_ALL: fit_kmeans_all,
}


def spectral_by_picture(test: Scenes, patches: Patches, seed: int) -> Tensor:
    """scikit-learn on each picture's own graph, told the number of classes; labels (n, p)."""
    labels = []
    for i, mask in enumerate(test.masks):
        present = len(mask[mask != VOID].unique())
        solver = SpectralClustering(present, affinity="precomputed", random_state=seed)
        weights = affinity(patches.subset(slice(i, i + 1)))
        labels.append(torch.from_numpy(solver.fit_predict(to_scipy(weights))).long())
    return torch.stack(labels)


def exact_clusters(weights: Tensor, clusters: int, seed: int) -> Tensor:
    """Our recipe with exact eigenvectors: a label for each node of W, sparse (n, n)."""
    start = np.random.default_rng(seed).standard_normal(len(weights))
    matrix = to_scipy(normalized(weights).matrix)
    values, vectors = eigsh(matrix, NUM_FUNCTIONS, which="LA", v0=start)
    embedded = F.normalize(torch.from_numpy(vectors * values.clip(0) ** 0.5), dim=1)
    found = KMeans(clusters, n_init=10, random_state=seed).fit_predict(embedded.numpy())
    return torch.from_numpy(found).long()


def to_scipy(matrix: Tensor) -> csr_matrix:
    """A coalesced sparse matrix, with the 32-bit indices that scikit-learn asks for."""
    indices = matrix.indices().to(torch.int32).numpy()
    return csr_matrix((matrix.values().double().numpy(), tuple(indices)), shape=matrix.shape)


def normalized_cut(weights: Tensor, labels: Tensor) -> float:
    r"""NCut :math:`= \sum_c cut(c, \bar c) / vol(c)` of labels (n,), from W sparse (n, n)."""
    rows, columns = weights.indices()
    _, labels = labels.unique(return_inverse=True)
    values, sums = weights.values().double(), torch.zeros(int(labels.max()) + 1).double()
    volume = sums.index_add(0, labels[rows], values)
    cut = sums.index_add(0, labels[rows], values * (labels[rows] != labels[columns]))
    return (cut / volume).sum().item()


def confusion(labels: Tensor, masks: Tensor, clusters: int, classes: int) -> Tensor:
    """Counts of pixels (clusters, classes); void is left out."""
    judged = masks != VOID
    codes = labels[judged] * classes + masks[judged]
    return torch.bincount(codes, minlength=clusters * classes).view(clusters, classes)


def match(counts: Tensor) -> Tensor:
    """The class of each cluster, one to one, for the largest sum of IoU; -1 without a class."""
    counts = counts.double()
    union = counts.sum(0) + counts.sum(1, keepdim=True) - counts
    chosen = linear_sum_assignment(-(counts / union.clamp_min(1)).numpy())
    found = torch.full((len(counts),), -1)
    found[chosen[0]] = torch.from_numpy(chosen[1])
    return found


def mean_iou(predicted: Tensor, masks: Tensor) -> float:
    """Mean over the classes that occur of |P ∩ M| / |P ∪ M| in pixels; predictions may be -1."""
    judged = masks != VOID
    predicted, masks = predicted[judged], masks[judged]
    scores = []
    for label in masks.unique():
        found, truth = predicted == label, masks == label
        scores.append((found & truth).sum() / (found | truth).sum())
    return torch.stack(scores).mean().item()


def match_by_picture(labels: Tensor, scenes: Scenes) -> Tensor:
    """Classes of pixels where each picture has a matching of its own."""
    clusters, classes = int(labels.max()) + 1, len(scenes.classes)
    return torch.stack(
        [
            match(confusion(each, mask, clusters, classes))[each]
            for each, mask in zip(labels, scenes.masks, strict=True)
        ]
    )


def rand_index(labels: Tensor, masks: Tensor) -> float:
    """Adjusted Rand index over the judged pixels."""
    judged = masks != VOID
    return float(adjusted_rand_score(masks[judged].numpy(), labels[judged].numpy()))


def judge(labels: Tensor, scenes: Scenes) -> dict[str, float]:
    """The scores that any segmentation has, from labels of patches (n, p)."""
    pixels = scenes.to_pixels(labels)
    indices = [rand_index(each, mask) for each, mask in zip(pixels, scenes.masks, strict=True)]
    return {
        "miou_image": 100 * mean_iou(match_by_picture(pixels, scenes), scenes.masks),
        "ari_image": sum(indices) / len(indices),
    }


def judge_together(labels: Tensor, scenes: Scenes, weights: Tensor) -> dict[str, float]:
    """The scores of a segmentation (n, p) whose clusters mean the same in all pictures."""
    clusters, classes = int(labels.max()) + 1, len(scenes.classes)
    pixels = scenes.to_pixels(labels)
    named = match(confusion(pixels, scenes.masks, clusters, classes))[pixels]
    return {
        "miou": 100 * mean_iou(named, scenes.masks),
        "ari": rand_index(pixels, scenes.masks),
        **judge(labels, scenes),
        "ncut": normalized_cut(weights, labels.flatten()),
    }


@dataclass(frozen=True)
class Outcome:
    """Scores of all methods for one seed, and the cluster that each gave to each patch.

    Attributes:
        rows: One a method.
        labels: Shape (n, p), by method.
    """

    rows: list[dict[str, Any]]
    labels: dict[str, Tensor]


def compare(study: Study, patches: Sequence[Patches], weights: Tensor, seed: int) -> Outcome:
    """Fit all methods and judge them on the held-out pictures.

    Args:
        study: See `Study`.
        patches: Of the training and of the held-out pictures.
        weights: `affinity` of all held-out pictures at once.
        seed: Of everything random.
    """
    train, held = patches
    test, clusters, count = study.test, len(study.test.classes), len(held.features)
    rows: dict[str, dict[str, Any]] = {}
    labels: dict[str, Tensor] = {}
    for method, fit in LEARNERS.items():
        segment, seconds = cpu_timed(lambda fit=fit: fit(study, train, clusters, seed))
        labels[method], spent = cpu_timed(lambda segment=segment: segment(held))
        names = match(
            confusion(study.train.to_pixels(segment(train)), study.train.masks, clusters, clusters)
        )
        rows[method] = {
            **judge_together(labels[method], test, weights),
            "miou_train": 100 * mean_iou(names[test.to_pixels(labels[method])], test.masks),
            "test_ms": 1000 * spent / count,
            "seconds": seconds,
        }
    labels[SINGLE], spent = cpu_timed(lambda: spectral_by_picture(test, held, seed))
    test_ms = 1000 * spent / count
    rows[SINGLE] = {**judge(labels[SINGLE], test), "test_ms": test_ms, "seconds": spent}
    labels[EXACT], spent = cpu_timed(lambda: exact_clusters(weights, clusters, seed))
    labels[EXACT] = labels[EXACT].view(count, -1)
    rows[EXACT] = {**judge_together(labels[EXACT], test, weights), "seconds": spent}
    named = [
        {"method": f"{study.name}: {method}", "seed": seed, **row} for method, row in rows.items()
    ]
    return Outcome(named, labels)


def marks(name: str, rows: Sequence[Row]) -> dict[str, bool]:
    """Which of the four marks our method reaches on one data set, from means over the seeds."""

    def mean(method: str, key: str) -> float:
        return mean_of(rows, f"{name}: {method}", key)

    kmeans = max(mean(KMEANS, "miou"), mean(KMEANS_ALL, "miou"))
    return {
        "miou >= k-means + 3": mean(OURS, "miou") >= kmeans + 3,
        "miou_image >= 90 % of spectral clustering": (
            mean(OURS, "miou_image") >= 0.9 * mean(SINGLE, "miou_image")
        ),
        "NCut within 10 % of exact eigenvectors": mean(OURS, "ncut") <= 1.1 * mean(EXACT, "ncut"),
        "test time <= 1/20 of spectral clustering": (
            mean(OURS, "test_ms") <= mean(SINGLE, "test_ms") / 20
        ),
    }


def headline(rows: Sequence[Row]) -> Headline:
    """CamVid against the better k-means; the goal counts the marks of both data sets."""
    reached = [mark for name in ("textures", "CamVid") for mark in marks(name, rows).values()]
    peer = max((KMEANS, KMEANS_ALL), key=lambda each: mean_of(rows, f"CamVid: {each}", "miou"))
    return Headline(
        question="Do eigenfunctions of a patch graph segment unseen pictures without labels?",
        metric="CamVid mIoU (%) of held-out pictures, one matching for all",
        ours=mean_of(rows, f"CamVid: {OURS}", "miou"),
        peer=peer,
        theirs=mean_of(rows, f"CamVid: {peer}", "miou"),
        truth=None,
        goal="on both data sets: 3 points over k-means, 90 % of spectral clustering of each "
        f"picture, NCut within 10 %, 20 times faster ({sum(reached)} of {len(reached)} reached)",
        reached=all(reached),
        seconds=mean_of(rows, f"CamVid: {OURS}", "seconds"),
    )


def draw(studies: Sequence[Study], outcomes: Sequence[Outcome], *, count: int = 3) -> Figure:
    """Pictures, truth and the classes that three methods gave, matched picture by picture."""
    figure = new_figure(11, 2.0 * count * len(studies))
    parts = figure.subfigures(len(studies), 1)
    for part, study, outcome in zip(parts, studies, outcomes, strict=True):
        test, cells = study.test, part.subplots(count, 5, squeeze=False)
        named = {
            method: match_by_picture(test.to_pixels(outcome.labels[method]), test)
            for method in (OURS, KMEANS, SINGLE)
        }
        colors = [*COLORS[: len(test.classes)], NO_CLASS]
        palette = ListedColormap([NO_CLASS, *colors[:-1]])
        chosen = np.linspace(0, len(test.images) - 1, count + 2)[1:-1].round().astype(int)
        for line, i in zip(cells, chosen, strict=True):
            line[0].imshow(test.images[i].permute(1, 2, 0).numpy())
            for cell, each in zip(line[1:], [test.masks, *named.values()], strict=True):
                cell.imshow(each[i].numpy(), cmap=palette, vmin=-1, vmax=len(test.classes) - 1)
            for cell in line:
                cell.set_xticks([])
                cell.set_yticks([])
        for cell, title in zip(cells[0], (study.name, "truth", *named), strict=True):
            cell.set_title(title, fontsize=9)
        legend = zip((*test.classes, "none"), colors, strict=True)
        handles = [Patch(color=color, label=label) for label, color in legend]
        part.legend(handles=handles, loc="outside lower center", ncols=12, fontsize=7)
    return figure


def studies_of(settings: SpectralSettings) -> list[Study]:
    """The two data sets, drawn or read once for all seeds."""
    num_train, num_test, group = (6, 3, 2) if settings.smoke else (96, 32, 8)
    training = Training(steps=20 if settings.smoke else 400)
    generator = torch.Generator().manual_seed(settings.first_seed)
    drawn = [textured_scenes(count, generator) for count in (num_train, num_test)]
    root = data_root(settings.root)
    read = [camvid(root, "train", num_train), camvid(root, "test", num_test)]
    return [
        Study("textures", *drawn, group=group, training=training),
        Study("CamVid", *read, group=group, training=training),
    ]


def main(argv: list[str] | None = None) -> None:
    """Run both studies for all seeds."""
    settings = asked(SpectralSettings, "Unsupervised segmentation by neural eigenfunctions", argv)
    studies, rows, shown = studies_of(settings), [], []
    for study in studies:
        patches = patches_of([study.train, study.test])
        weights = affinity(patches[1])
        for seed in range(settings.first_seed, settings.first_seed + settings.seeds):
            outcome = compare(study, patches, weights, seed)
            rows += outcome.rows
            print(*(_line(row) for row in outcome.rows), sep="\n")
        shown.append(outcome)
        for mark, reached in marks(study.name, rows).items():
            print(f"{study.name}: {mark}: {'reached' if reached else 'missed'}")
    finish("segmentation", settings, rows, headline(rows), draw(studies, shown))


def _line(row: Row) -> str:
    numbers = [f"{key} {value:.3g}" for key, value in row.items() if key not in ("method", "seed")]
    return f"{row['method']}, seed {row['seed']}: {', '.join(numbers)}"


if __name__ == "__main__":
    main()
