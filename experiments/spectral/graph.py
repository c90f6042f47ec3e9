"""Do neural eigenmaps of a citation graph help where few labels are known?

    python experiments/spectral/graph.py --root $ELLA_DATA

Cora and Citeseer, with the Planetoid split. A perceptron on the words of a paper learns the
leading eigenfunctions of the normalised adjacency matrix (NestedLoRA: the matrix is indefinite)
without labels; a logistic regression on its hidden layer, chosen on the validation nodes, then
classifies. Peers: the same regression on the words, on exact Laplacian eigenmaps and on node2vec
(p = q = 1; gensim), and a graph convolution net with two layers (PyTorch Geometric).

1. Accuracy at 1, 5 and 20 labels a class, and with all labels outside validation and test.
2. New nodes: all edges of a fifth of the test nodes are removed before anything is fitted, and
   these nodes are judged. Eigenmaps and node2vec have nothing to say about them.

Needs `pip install 'ella[spectral]'`.

Reference: Neural Eigenfunctions Are Structured Representation Learners (Deng et al., 2022),
https://arxiv.org/abs/2210.12637; Planetoid split: Revisiting Semi-Supervised Learning with Graph
Embeddings (Yang et al., 2016), https://arxiv.org/abs/1603.08861; node2vec: Scalable Feature
Learning for Networks (Grover & Leskovec, 2016), https://arxiv.org/abs/1607.00653
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import Headline, arguments, cpu_timed, finish, mean_of, needed, new_figure
from _data import data_root
from matplotlib.figure import Figure
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn import functional as F

from ella.spectral import Graph, Training, WholeGraph, learn_eigenbasis

RANK = 64
LABELS = (1, 5, 20, None)
"""Of each class; None: all nodes that are neither in validation nor in test."""
OURS, GCN = "neural eigenmaps", "GCN"
WORDS, EXACT, WALKS = "words", "Laplacian eigenmaps", "node2vec"


@dataclass(frozen=True)
class Citations:
    """A citation graph.

    Attributes:
        words: Bags of words, rows of sum 1, shape (n, d).
        labels: Shape (n,).
        edges: Shape (2, m).
        train: Nodes whose labels may be used.
        val: Nodes that settings are chosen on.
        test: Nodes that are judged.
    """

    words: Tensor
    labels: Tensor
    edges: Tensor
    train: Tensor
    val: Tensor
    test: Tensor

    @property
    def num_nodes(self) -> int:
        """N."""
        return len(self.labels)

    def with_labels(self, count: int | None, generator: torch.Generator) -> "Citations":
        """`count` training nodes of each class, drawn from all outside validation and test."""
        free = torch.ones(self.num_nodes, dtype=torch.bool)
        free[torch.cat([self.val, self.test])] = False
        pool = free.nonzero()[:, 0]
        if count is None:
            return replace(self, train=pool)
        pool = pool[torch.randperm(len(pool), generator=generator)]
        chosen = [pool[self.labels[pool] == label][:count] for label in self.labels.unique()]
        return replace(self, train=torch.cat(chosen))

    def with_new_nodes(self, share: float, generator: torch.Generator) -> "Citations":
        """Some of the test nodes without their edges, and only these to be judged."""
        order = torch.randperm(len(self.test), generator=generator)
        new = self.test[order[: int(share * len(self.test))]]
        kept = ~torch.isin(self.edges, new).any(0)
        return replace(self, edges=self.edges[:, kept], test=new)


def citations(root: Path, name: str) -> Citations:
    """Cora or Citeseer from a Planetoid archive."""
    with np.load(root / "planetoid" / f"{name}.npz") as stored:
        parts = {key: stored[key] for key in stored.files}
    triple = parts["x_data"], parts["x_indices"], parts["x_indptr"]
    words = torch.from_numpy(csr_matrix(triple, shape=parts["shape"]).toarray()).float()
    return Citations(
        words=F.normalize(words, p=1, dim=1),
        labels=torch.from_numpy(parts["y"]).long(),
        edges=torch.from_numpy(parts["edges"]).long().T,
        **{each: torch.from_numpy(parts[each]).long() for each in ("train", "val", "test")},
    )


def block_model(seed: int, n: int = 120) -> Citations:
    """Three communities with words of their own: a graph for tests."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    same = labels[:, None] == labels
    linked = torch.rand(n, n, generator=generator) < torch.where(same, 0.2, 0.02)
    words = torch.rand(n, 30, generator=generator) + F.one_hot(labels, 3).repeat(1, 10)
    parts = torch.randperm(n, generator=generator).split(n // 3)
    return Citations(F.normalize(words, p=1, dim=1), labels, linked.triu(1).nonzero().T, *parts)


class WordNetwork(nn.Module):
    """Two hidden layers and a linear head: words (n, d) to functions (n, 1, k).

    Args:
        num_words: d.
        rank: k.
        generator: Source of the weights.
    """

    def __init__(self, num_words: int, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        layers = [nn.Linear(num_words, 256), nn.Linear(256, 256), nn.Linear(256, rank)]
        for layer in layers:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=generator)
            nn.init.zeros_(layer.bias)
        first, second, self.head = layers
        self.backbone = nn.Sequential(nn.Dropout(0.5), first, nn.ReLU(), second, nn.ReLU())
        self.scale = num_words**0.5  # of rows that sum to 1

    def forward(self, words: Tensor) -> Tensor:
        """Shape (n, 1, k)."""
        return self.head(self.backbone(words * self.scale)).unsqueeze(1)


def neural_eigenmaps(data: Citations, seed: int, steps: int) -> Tensor:
    """The hidden layer of a network whose outputs are the leading eigenfunctions, (n, 256)."""
    generator = torch.Generator().manual_seed(seed)
    network = WordNetwork(data.words.shape[1], RANK, generator)
    learn_eigenbasis(
        network,
        WholeGraph(Graph(data.edges, data.num_nodes), data.words),
        Training(steps=steps, learning_rate=3e-3, weight_decay=0, checks=4, patience=99),
        generator=generator,
        num_batches=1,
        progress=False,
    )
    with torch.no_grad():
        return network.backbone(data.words * network.scale)


def laplacian_eigenmaps(data: Citations) -> Tensor:
    """The leading eigenvectors of the same matrix, computed exactly, (n, k).

    Of the largest component only, the other nodes being 0: each component has an eigenvalue 1,
    whose eigenvector says no more than which nodes belong to it.
    """
    matrix = Graph(data.edges, data.num_nodes).matrix.to_dense().double()
    edges = matrix.nonzero().T.numpy()
    adjacency = csr_matrix((np.ones(edges.shape[1]), tuple(edges)), shape=matrix.shape)
    members = torch.from_numpy(connected_components(adjacency)[1]).long()
    largest = (members == members.bincount().argmax()).nonzero()[:, 0]
    vectors = torch.linalg.eigh(matrix[largest][:, largest]).eigenvectors[:, -RANK:]
    found = torch.zeros(data.num_nodes, vectors.shape[1])
    found[largest] = vectors.float()
    return found


def node2vec(data: Citations, seed: int, epochs: int) -> Tensor:
    """Skip-grams of ten uniform walks of length 40 from each node, (n, 64)."""
    rng = np.random.default_rng(seed)
    both = torch.cat([data.edges, data.edges.flip(0)], 1).numpy()
    neighbors = [both[1, both[0] == node] for node in range(data.num_nodes)]
    walks = []
    for node in np.tile(np.arange(data.num_nodes), 10):
        walk = [node]
        while len(walk) < 40 and len(neighbors[walk[-1]]):
            near = neighbors[walk[-1]]
            walk.append(near[int(rng.random() * len(near))])
        walks.append([str(each) for each in walk])
    rng.shuffle(walks)
    model = needed("gensim.models").Word2Vec(
        walks, vector_size=RANK, window=5, min_count=0, sg=1, workers=1, epochs=epochs, seed=seed
    )
    return torch.from_numpy(np.stack([model.wv[str(node)] for node in range(data.num_nodes)]))


def probe(embedding: Tensor, data: Citations) -> float:
    """Test accuracy of the logistic regression that is best on the validation nodes."""
    x = embedding - embedding[data.train].mean(0)
    x = (x / x.norm(dim=1).mean() * x.shape[1] ** 0.5).numpy()
    y = data.labels.numpy()
    tried = []
    for strength in (1e-3, 1e-2, 1e-1, 1.0):
        model = LogisticRegression(C=strength, max_iter=100).fit(x[data.train], y[data.train])
        tried.append((model.score(x[data.val], y[data.val]), model))
    best = max(tried, key=lambda each: each[0])[1]
    return float(best.score(x[data.test], y[data.test]))


def graph_convolution(data: Citations, seed: int, epochs: int) -> float:
    """Test accuracy of a GCN with the settings of its paper, at its best validation epoch.

    Reference: Semi-Supervised Classification with Graph Convolutional Networks (Kipf & Welling,
    2016), https://arxiv.org/abs/1609.02907
    """
    convolution = needed("torch_geometric.nn").GCNConv
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        first = convolution(data.words.shape[1], 16)
        second = convolution(16, int(data.labels.max()) + 1)
        groups = [
            {"params": first.parameters(), "weight_decay": 5e-4},
            {"params": second.parameters()},
        ]
        optimizer = torch.optim.Adam(groups, lr=0.01)
        edges = torch.cat([data.edges, data.edges.flip(0)], 1)

        def logits(training: bool) -> Tensor:
            hidden = first(F.dropout(data.words, training=training), edges).relu()
            return second(F.dropout(hidden, training=training), edges)

        best = (0.0, 0.0)
        for _ in range(epochs):
            loss = F.cross_entropy(logits(True)[data.train], data.labels[data.train])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                right = (logits(False).argmax(1) == data.labels).float()
            best = max(best, (right[data.val].mean().item(), right[data.test].mean().item()))
    return best[1]


def embeddings(data: Citations, seed: int, smoke: bool) -> dict[str, tuple[Tensor, float]]:
    """Each unsupervised embedding, and its CPU seconds."""
    methods: dict[str, Callable[[], Tensor]] = {
        OURS: lambda: neural_eigenmaps(data, seed, 20 if smoke else 200),
        EXACT: lambda: laplacian_eigenmaps(data),
        WORDS: lambda: data.words,
    }
    if not smoke:
        methods[WALKS] = lambda: node2vec(data, seed, 5)
    return {name: cpu_timed(method) for name, method in methods.items()}


def rows_of(name: str, data: Citations, seed: int, smoke: bool) -> list[dict[str, Any]]:
    """All methods on one graph: at each number of labels, then for nodes without edges."""
    rows: list[dict[str, Any]] = []
    epochs = 5 if smoke else 200

    def note(method: str, accuracy: float, seconds: float, key: str) -> None:
        rows.append(
            {
                "method": f"{name}, {key}: {method}",
                "seed": seed,
                "accuracy": accuracy,
                "seconds": seconds,
            }
        )

    found = embeddings(data, seed, smoke)
    cases = {"Planetoid split": data}
    for count in LABELS:
        generator = torch.Generator().manual_seed(seed)
        title = "all labels" if count is None else f"{count} labels a class"
        cases[title] = data.with_labels(count, generator)
    for title, case in cases.items():
        for method, (embedding, seconds) in found.items():
            note(method, probe(embedding, case), seconds, title)
        accuracy, seconds = cpu_timed(lambda case=case: graph_convolution(case, seed, epochs))
        note(GCN, accuracy, seconds, title)
    cut = data.with_new_nodes(0.2, torch.Generator().manual_seed(seed))
    inductive = embeddings(cut, seed, smoke)
    for method in (OURS, WORDS):
        note(method, probe(inductive[method][0], cut), inductive[method][1], "nodes without edges")
    accuracy, seconds = cpu_timed(lambda: graph_convolution(cut, seed, epochs))
    note(GCN, accuracy, seconds, "nodes without edges")
    return rows


def figure(rows: list[dict[str, Any]], names: list[str]) -> Figure:
    """Accuracy against the number of labels, and for nodes without edges."""
    drawn = new_figure(9, 3.4)
    panels = drawn.subplots(1, len(names), squeeze=False)[0]
    titles = ["all labels" if n is None else f"{n} labels a class" for n in LABELS]
    shown = {row["method"] for row in rows}
    for panel, name in zip(panels, names, strict=True):
        for i, method in enumerate((OURS, EXACT, WORDS, WALKS, GCN)):
            if f"{name}, {titles[0]}: {method}" not in shown:
                continue
            values = [mean_of(rows, f"{name}, {title}: {method}", "accuracy") for title in titles]
            panel.plot(titles, values, marker="osD^v"[i], label=method)
            alone = f"{name}, nodes without edges: {method}"
            if alone in shown:
                panel.plot(
                    ["nodes without\nedges"],
                    [mean_of(rows, alone, "accuracy")],
                    marker="osD^v"[i],
                    color=f"C{i}",
                )
        panel.set(title=name, ylabel="test accuracy")
        panel.tick_params(axis="x", labelsize=6)
    panels[0].legend(frameon=False, fontsize=7)
    return drawn


def main(argv: list[str] | None = None) -> None:
    """Run and write everything."""
    args = arguments(__doc__.splitlines()[0], argv)
    rows: list[dict[str, Any]] = []
    names = ["blocks"] if args.smoke else ["Cora", "Citeseer"]
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        for name in names:
            data = (
                block_model(seed) if args.smoke else citations(data_root(args.root), name.lower())
            )
            rows += rows_of(name, data, seed, args.smoke)
            print(rows[-1], flush=True)

    def accuracy(method: str, name: str = names[0], case: str = "Planetoid split") -> float:
        return mean_of(rows, f"{name}, {case}: {method}", "accuracy")

    reached = all(
        accuracy(OURS, name) >= accuracy(EXACT, name) + 0.05
        and accuracy(OURS, name) >= accuracy(WORDS, name) + 0.10
        for name in names
    )
    headline = Headline(
        question="Do neural eigenmaps of a graph help where few labels are known?",
        metric=f"test accuracy, {names[0]}, Planetoid split",
        ours=accuracy(OURS),
        peer=GCN,
        theirs=accuracy(GCN),
        truth=None,
        goal="≥ exact eigenmaps + .05 and ≥ words + .10 on both graphs; within .04 of GCN",
        reached=reached and all(accuracy(OURS, n) >= accuracy(GCN, n) - 0.04 for n in names),
        seconds=mean_of(rows, f"{names[0]}, Planetoid split: {OURS}", "seconds"),
    )
    finish("graph", args, rows, headline, figure(rows, names))


if __name__ == "__main__":
    main()
