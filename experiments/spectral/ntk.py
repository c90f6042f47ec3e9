"""How close do neural eigenfunctions come to the tangent kernel of a trained ResNet-20?

    python experiments/spectral/ntk.py --root $ELLA_DATA

The published ResNet-20 for CIFAR-10, κ(x, x') = J(x)J(x')ᵀ with J the Jacobian of the ten logits
in all 272,474 weights. Networks learn its leading eigenfunctions from Jacobian products on 2,000
training images (`ella.NeuralEF`), and are compared on test images with the exact kernel and with
Nyström, which needs k Jacobian products for every image at test time:

- energy: share of the trace of κ within the span of φ, over that of the best span of this rank;
- kernel error: ‖κ − φφᵀ‖ / ‖κ‖ over all pairs of images and logits;
- clusters: normalised mutual information of k-means (ten clusters) with the classes, on the
  eigenfunctions of an image, on exact kernel principal components, and on penultimate features.

Reference: NeuralEF: Deconstructing Kernels by Deep Neural Networks (Deng et al., 2022),
https://arxiv.org/abs/2205.00165
"""

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
from _fidelity import ExactKernel, fidelity
from _models import DigitsNet, checkpoint_path, load_model, train_classifier
from _settings import option
from matplotlib.figure import Figure
from sklearn.cluster import KMeans
from sklearn.metrics import normalized_mutual_info_score
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ella import (
    FeatureTaps,
    Linearized,
    LogitGaussian,
    NeuralEF,
    Nystrom,
    Training,
    choose_taps,
)
from ella.eigenfunctions import EigenfunctionMethod

OURS, PEER = "NeuralEF", "Nyström"


@dataclass(frozen=True)
class Study:
    """A trained classifier, and the images on which kernels are compared.

    Attributes:
        model: The classifier.
        train: Its training data.
        images: Test images, sorted by class.
        labels: Theirs.
    """

    model: nn.Module
    train: TensorDataset
    images: Tensor
    labels: Tensor


def prepare(root: Path | None, count: int, seed: int) -> Study:
    """ResNet-20 on CIFAR-10, or, without a root, a small net on digits."""
    if root is None:
        task = load_task("digits", None, seed)
        model = train_classifier(DigitsNet(task.num_classes), task.train, seed)
    else:
        task = load_task("cifar10", root, seed)
        model = load_model("resnet20", checkpoint_path("resnet20", root))
    images, labels = (tensor[:count] for tensor in task.test.tensors)
    order = labels.argsort(stable=True)
    return Study(model.eval(), task.train, images[order], labels[order])


def clusters(embedding: Tensor, labels: Tensor, seed: int) -> float:
    """Normalised mutual information of k-means with the classes."""
    found = KMeans(len(labels.unique()), n_init=10, random_state=seed).fit_predict(embedding)
    return float(normalized_mutual_info_score(labels, found))


def of_images(kernel: Tensor, n: int) -> Tensor:
    """The kernel summed over logits, tr κ(x, x'), shape (n, n), from (n·c, n·c)."""
    c = len(kernel) // n
    return kernel.view(n, c, n, c).diagonal(dim1=1, dim2=3).sum(-1)


def cosines(kernel: Tensor, norms: Tensor) -> Tensor:
    """A kernel between images over their norms."""
    return kernel / norms / norms.unsqueeze(1)


def gram(prior: LogitGaussian) -> Tensor:
    """φφᵀ over all images and logits."""
    phi = prior.factor.double().flatten(0, 1)
    return phi @ phi.T


def figure(study: Study, kernel: ExactKernel, found: dict[str, LogitGaussian]) -> Figure:
    """Heat maps of the exact and the learned kernel, images in the order of classes; spectra.

    Both kernels are divided by the exact norms √κ(x, x), so that one scale of colours serves both.
    """
    n = len(study.labels)
    norms = of_images(kernel.matrix, n).diagonal().sqrt()
    drawn = new_figure(11, 3.4)
    exact, learned, spectrum = drawn.subplots(1, 3)
    for panel, title, matrix in (
        (exact, "exact", kernel.matrix),
        (learned, "learned", gram(found[OURS])),
    ):
        panel.imshow(cosines(of_images(matrix, n), norms), vmin=-0.1, vmax=0.6, cmap="viridis")
        panel.set(title=f"{title} kernel, images by class", xticks=[], yticks=[])
    rank = found[OURS].factor.shape[2]
    spectrum.semilogy(kernel.eigenvalues[: 2 * rank] / n, "k", label="exact")
    for name, features in found.items():
        phi = features.factor.double().flatten(0, 1)
        spectrum.semilogy(torch.linalg.eigvalsh(phi.T @ phi).flip(0) / n, label=name)
    spectrum.set(title="spectrum", xlabel="index", ylabel="eigenvalue")
    spectrum.legend(frameon=False)
    return drawn


def rows_of(
    study: Study, kernel: ExactKernel, rank: int, inputs: int, steps: int, seed: int
) -> tuple[list[dict[str, Any]], dict[str, LogitGaussian]]:
    """Both methods, and k-means on other embeddings."""
    linearized = Linearized(study.model)
    generator = torch.Generator().manual_seed(seed)
    loader = DataLoader(study.train, batch_size=100, shuffle=True, generator=generator)
    rows: list[dict[str, Any]] = []
    found: dict[str, LogitGaussian] = {}

    def measure(name: str, method: EigenfunctionMethod) -> None:
        fitted, seconds = cpu_timed(
            lambda: method.fit(linearized, loader, seed=seed, progress=False)
        )
        features, evaluate = cpu_timed(lambda: fitted(study.images))
        found[name] = features
        figures = fidelity(kernel, features)
        row = {"method": name, "seed": seed, "seconds": seconds, "evaluate_seconds": evaluate}
        row |= {key: figures[key] for key in ("energy", "kernel_error")}
        rows.append(row | {"clusters": clusters(features.factor.flatten(1), study.labels, seed)})

    measure(PEER, Nystrom(rank, inputs, residual="none"))
    teacher = Training(steps=steps, weight_decay=0.3)
    measure(OURS, NeuralEF(rank, num_inputs=inputs, teacher=teacher, residual="none"))
    values, vectors = torch.linalg.eigh(of_images(kernel.matrix, len(study.labels)))
    taps = FeatureTaps(linearized.network, choose_taps(linearized.network, study.images)[-1:])
    others = {
        "exact kernel components": (vectors * values.clamp_min(0).sqrt())[:, -rank:],
        "penultimate features": taps(study.images)[1],
    }
    for name, embedding in others.items():
        score = clusters(embedding, study.labels, seed)
        rows.append({"method": name, "seed": seed, "clusters": score})
    return rows, found


@dataclass(frozen=True)
class Settings(SpectralSettings):
    """What the script can be asked for."""

    seeds: int = option(1, "how many")


def main(argv: list[str] | None = None) -> None:
    """Run and write everything."""
    settings = asked(Settings, __doc__.splitlines()[0], argv)
    root = None if settings.smoke else data_root(settings.root)
    rank, inputs, count, steps = (4, 80, 60, 20) if settings.smoke else (64, 2000, 300, 1500)
    ledger, drawn = Ledger("ntk", settings), None
    for seed in range(settings.first_seed, settings.first_seed + settings.seeds):
        if (seed, OURS) in ledger:
            continue
        study = prepare(root, count, seed)
        kernel = ExactKernel.of(Linearized(study.model), study.images)
        rows, found = rows_of(study, kernel, rank, inputs, steps, seed)
        ledger.add(*rows)
        drawn = figure(study, kernel, found)
    headline = Headline(
        question="How close do neural eigenfunctions come to the tangent kernel of a ResNet-20?",
        metric=f"kernel error on test images, k = {rank}",
        ours=mean_of(ledger.rows, OURS, "kernel_error"),
        peer=PEER,
        theirs=mean_of(ledger.rows, PEER, "kernel_error"),
        truth=0.0,
        goal="none: the figure of the talk",
        reached=None,
        seconds=mean_of(ledger.rows, OURS, "seconds"),
    )
    finish("ntk", settings, ledger.rows, headline, drawn)


if __name__ == "__main__":
    main()
