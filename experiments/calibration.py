"""Is a classifier with ella better calibrated than with what one would otherwise pick?

    python experiments/calibration.py
    python experiments/calibration.py --dataset cifar10 --root $ELLA_DATA --arch resnet20
    python experiments/calibration.py --suite cifar10 --root $ELLA_DATA

For each seed: a classifier (trained on the spot, or a published checkpoint), every method fitted
on its training data and tuned on the same validation data by the same search, and all scored on
the test data. Writes JSON, a Markdown table and two figures. With `--suite`, the study of the four
published networks instead, which `_suite.py` describes.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _data import DATASETS, Task, data_root, load_task
from _families import MethodSettings, families
from _models import TRAINING, DigitsNet, FashionNet, checkpoint_path, load_model, train_classifier
from _report import markdown_table, plot_uncertainty, save_results
from _settings import option, parsed, recorded
from _suite import run_suite
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ella import ELLA, LastLayer, NeuralEF, Nystrom, Predictor, Training
from ella.baselines import (
    MAP,
    KroneckerLaplace,
    LastLayerLaplace,
    NystromLaplace,
    TemperatureScaling,
)
from ella.metrics import auroc, evaluate, expected_calibration_error, reliability_diagram
from ella.report import forward_ratio, timed

FIGURE_METHODS = ("MAP", "temperature scaling", "last-layer Laplace, Kronecker", "ELLA, NeuralEF")


@dataclass(frozen=True)
class Settings(MethodSettings):
    """What the script can be asked for, beside the study's sizes.

    Attributes:
        dataset: One of `DATASETS`.
        arch: The network for CIFAR-10.
        weights: Its checkpoint; None takes the published one.
        num_train: Training examples to use; None takes all.
        threads: CPU threads; None takes 1 for digits.
        suite: "cifar10" runs the study of four networks instead.
    """

    dataset: str = option("digits", "one problem", choices=DATASETS)
    arch: str = option("resnet20", "CIFAR-10 network, resnet20 to 56")
    weights: Path | None = option(None, "checkpoint (default: the published one)", parse=Path)
    first_seed: int = option(10, "the first of them")
    num_train: int | None = option(None, "training examples to use", parse=int)
    threads: int | None = option(None, "CPU threads (digits: 1)", parse=int)
    suite: str | None = option(None, "the study of four networks", choices=("cifar10",))


def make_classifier(settings: Settings, task: Task, seed: int) -> nn.Module:
    """A published checkpoint for CIFAR-10, else a small network trained on the spot."""
    if settings.dataset == "cifar10":
        path = settings.weights or checkpoint_path(settings.arch, data_root(settings.root))
        return load_model(settings.arch, path).to(settings.device)
    net = (
        DigitsNet(task.num_classes)
        if settings.dataset == "digits"
        else FashionNet(task.num_classes)
    )
    options = dict(TRAINING[settings.dataset])
    if settings.smoke:
        options |= {"epochs": 10}
    return train_classifier(net, task.train, seed, **options).to(settings.device)


def neural_ef(settings: Settings) -> NeuralEF:
    """NeuralEF with settings for the size of the problem."""
    size: dict[str, Any]
    if settings.smoke:
        steps = Training(steps=30, batch_size=32)
        size = {"rank": 8, "num_inputs": 120, "num_directions": 24, "width": 32}
        return NeuralEF(teacher=steps, training=steps, **size)
    if settings.dataset == "digits":
        # Shorter than the defaults: five seeds in five minutes on two cores.
        teacher = Training(steps=1000, weight_decay=0.3)
        size = {"rank": 64, "num_inputs": 3000, "num_directions": 128, "width": 256}
        return NeuralEF(teacher=teacher, **size)
    return NeuralEF(rank=64)


def methods(
    settings: Settings, seed: int, num_train: int
) -> dict[str, Callable[[nn.Module], Predictor]]:
    """Every method that is compared, by the name it has in the table."""
    rows = 40 if settings.smoke else 2000
    common: dict[str, Any] = {"seed": seed, "progress": not settings.smoke}
    found: dict[str, Callable[[nn.Module], Predictor]] = {
        "MAP": lambda model: MAP(model, **common),
        "temperature scaling": lambda model: TemperatureScaling(model, **common),
        "last-layer Laplace, full": lambda model: LastLayerLaplace(
            model, structure="full", **common
        ),
        "last-layer Laplace, Kronecker": lambda model: LastLayerLaplace(
            model, structure="kron", **common
        ),
    }
    if settings.dataset != "cifar10" or settings.slow:
        found |= {
            "Kronecker Laplace (BatchNorm frozen)": lambda model: KroneckerLaplace(
                model, **common
            ),
            "laplace-torch ELLA, k = 20": lambda model: NystromLaplace(
                model, rank=20, subsample=min(rows, 400, num_train), **common
            ),
        }

    def ella(eigenfunctions: Any, residual: str) -> Callable[[nn.Module], Predictor]:  # noqa: ANN401
        return lambda model: ELLA(
            model, eigenfunctions=eigenfunctions, residual=residual, **common
        )

    found |= {
        "ELLA, Nyström k = 20, no residual": ella(Nystrom(20, rows), "none"),
        "ELLA, Nyström k = 64": ella(Nystrom(20 if settings.smoke else 64, rows), "diag"),
        "ELLA, last layer": ella(LastLayer(), "diag"),
        "ELLA, NeuralEF": ella(neural_ef(settings), "diag"),
    }
    wanted = settings.only.split("|") if settings.only else [""]
    return {name: make for name, make in found.items() if any(part in name for part in wanted)}


def score(method: Predictor, name: str, task: Task, device: str) -> tuple[dict[str, Any], Tensor]:
    """One row of the table (without fit time), and the test probabilities."""
    images, labels = task.test.tensors
    probs = torch.cat([method.predict_proba(x.to(device)) for x in images.split(500)]).cpu()
    inside = entropies(method, images, device)
    aurocs = {
        f"auroc {k}": auroc(inside, entropies(method, x, device)) for k, x in task.ood.items()
    }
    batch = images[:256].to(device)
    with torch.no_grad():
        ratio = forward_ratio(
            lambda: method.predict_proba(batch, n_samples=64), lambda: method.model(batch)
        )
    return {
        "method": name,
        **evaluate(probs, labels),
        "ece_floor": ece_if_calibrated(probs),
        **aurocs,
        "auroc": sum(aurocs.values()) / len(aurocs),
        "predict_ratio": ratio,
        "state_bytes": method.state_bytes,
    }, probs


def ece_if_calibrated(probs: Tensor, draws: int = 20) -> float:
    """Mean ECE when the labels are drawn from the predictions: what sampling alone makes of it."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.multinomial(probs, draws, replacement=True, generator=generator)
    errors = [expected_calibration_error(probs, column) for column in labels.T]
    return sum(errors) / draws


def entropies(method: Predictor, images: Tensor, device: str) -> Tensor:
    """Predictive entropy of many images, shape (n,), on the CPU."""
    parts = [method.uncertainty(x.to(device)).entropy for x in images.split(500)]
    return torch.cat(parts).cpu()


def loaders(settings: Settings, task: Task) -> tuple[Iterable[Any], Iterable[Any]]:
    """Training and validation data."""

    def loader(data: Dataset) -> DataLoader:
        return DataLoader(data, batch_size=100)

    return loader(task.train), loader(task.val)


def run_seed(
    settings: Settings, seed: int
) -> tuple[list[dict[str, Any]], Task, dict[str, tuple[Tensor, Predictor]]]:
    """All methods on one seed: their rows, and what the figures need."""
    task = load_task(settings.dataset, settings.root, seed, num_train=settings.num_train)
    model = make_classifier(settings, task, seed)
    train, val = loaders(settings, task)
    rows: list[dict[str, Any]] = []
    kept: dict[str, tuple[Tensor, Predictor]] = {}
    for name, make in tqdm(methods(settings, seed, len(task.train)).items(), desc=f"seed {seed}"):
        method, fit_seconds = timed(lambda make=make: make(model).fit(train))
        if name == "ELLA, NeuralEF":
            row, _ = score(method, "ELLA, NeuralEF, not tuned", task, settings.device)
            rows.append({"seed": seed, "fit_seconds": fit_seconds, **row})
        method, tune_seconds = timed(lambda method=method: method.calibrate(val))
        row, probs = score(method, name, task, settings.device)
        chosen = vars(method.hyperparameters) if method.hyperparameters else {}
        rows.append(
            {
                "seed": seed,
                "fit_seconds": fit_seconds,
                "tune_seconds": tune_seconds,
                **row,
                **chosen,
            }
        )
        kept[name] = (probs, method)
    return rows, task, kept


def main(argv: list[str] | None = None) -> None:
    """Run and write everything."""
    settings = parsed(Settings, __doc__.splitlines()[0], argv)
    if settings.suite:
        run_suite(settings, families(settings))
        return
    if settings.threads or settings.dataset == "digits":
        # The digits network is too small for threads to pay.
        torch.set_num_threads(settings.threads or 1)
    start = time.perf_counter()
    rows: list[dict[str, Any]] = []
    stem = settings.out / f"calibration-{settings.dataset}"
    if settings.dataset == "cifar10":
        stem = settings.out / f"calibration-{settings.dataset}-{settings.arch}"
    for seed in range(settings.first_seed, settings.first_seed + settings.seeds):
        found, task, kept = run_seed(settings, seed)
        rows += found
        save_results(stem.with_suffix(".json"), recorded(settings), rows)
        print(markdown_table(rows), flush=True)
    # The figures show the last seed.
    shown = {name: kept[name] for name in FIGURE_METHODS if name in kept}
    images, labels = task.test.tensors
    figure = reliability_diagram({name: probs for name, (probs, _) in shown.items()}, labels)
    figure.savefig(f"{stem}-reliability.png", dpi=120)
    inside = {name: entropies(m, images, settings.device) for name, (_, m) in shown.items()}
    outside = next(iter(task.ood.values()))
    out = {name: entropies(m, outside, settings.device) for name, (_, m) in shown.items()}
    plot_uncertainty(inside, out, f"{stem}-uncertainty.png")
    stem.with_suffix(".md").write_text(markdown_table(rows) + "\n")
    print(f"{stem}.json, .md, -reliability.png, -uncertainty.png", end=" ")
    print(f"written after {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
