"""The CIFAR-10 study: published ResNets, each method fitted once and tuned and scored often.

One unit of work is one method on one network: it is fitted, evaluated once on every set of images,
then tuned and scored for every seed and protocol. Finished units are in the result files, so a run
that was killed goes on where it stopped.

Protocol A tunes on 2,000 randomly cropped training images (as the ELLA paper does), drawn by the
seed, and tests on all test images. Protocol B tunes on 2,000 test images and tests on the others.
"""

import argparse
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _corruptions import CORRUPTIONS
from _data import Task, data_root, load_idx, load_mosaic, load_task, normalize
from _models import RESNET_DEPTHS, checkpoint_path, load_model
from _report import Row, forward_ratio, load_results, save_results, timed
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms.v2 import RandomResizedCrop
from tqdm import tqdm

from ella import ELLA, NeuralEF, Nystrom, Predictor, Training
from ella.baselines import (
    MAP,
    KroneckerLaplace,
    LastLayerLaplace,
    NystromLaplace,
    TemperatureScaling,
)
from ella.metrics import (
    area_under_risk_coverage,
    aupr,
    auroc,
    classwise_calibration_error,
    cross_entropy_to,
    divergence_from,
    evaluate,
    expected_calibration_error,
    fpr_at_95_tpr,
    negative_log_likelihood,
    risk_coverage,
)
from ella.predictive import Uncertainty, entropy
from ella.predictor import Evaluated

MEASURES = ("calibration", "ood", "shift")
SCORES = ("confidence_deficit", "entropy", "mutual_information", "logit_variance", "energy")
NUM_VAL = 2000
PAPER_PRECISION = 25.0
"""δ of the ELLA paper on CIFAR-10."""
COVERAGES = 50
ENSEMBLE = "ensemble of the networks"

Tune = Callable[[Evaluated, Tensor, Tensor], Evaluated]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Sizes of the study. The defaults are for a GPU; README.md says what was run."""
    parser.add_argument("--archs", nargs="+", default=[f"resnet{d}" for d in RESNET_DEPTHS])
    parser.add_argument("--fit-on", type=int, default=50_000, help="training images for G")
    parser.add_argument("--num-inputs", type=int, default=50_000, help="images NeuralEF learns on")
    parser.add_argument("--num-cropped", type=int, default=10_000, help="to tune on, protocol A")
    parser.add_argument("--num-test", type=int, default=10_000)
    parser.add_argument("--num-ood", type=int, default=5000, help="of each source")
    parser.add_argument("--num-shift", type=int, default=2000, help="images a corruption")


@dataclass(frozen=True)
class Images:
    """Labelled images.

    Attributes:
        x: Normalized, shape (n, 3, 32, 32).
        y: Class indices, shape (n,); zeros where there are none.
    """

    x: Tensor
    y: Tensor

    def loader(self, batch_size: int = 250) -> DataLoader:
        """In order."""
        return DataLoader(TensorDataset(self.x, self.y), batch_size=batch_size)


class Data:
    """All images of the study. What comes first in each set is the same for every method.

    Args:
        args: See `add_options`; also root and smoke.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.root = args, data_root(args.root)
        self.task: Task = load_task("cifar10", args.root, num_val=1)
        # The task shuffles the test set; the human labels come in its first order.
        images = load_mosaic(self.root / "cifar10" / "test_batch.webp")
        stored = np.load(self.root / "cifar10" / "labels.npz")
        labels = torch.from_numpy(stored["test_batch_labels"].astype(np.int64))
        count = args.num_test
        self.test = Images(self._normalized(images[:count]), labels[:count])
        self.fitting = self._training(args.fit_on)

    @cached_property
    def human(self) -> Tensor:
        """Shares of people who chose each class (CIFAR-10H), shape (n, 10)."""
        stored = np.load(self.root / "cifar10h" / "cifar10h_counts.npz")
        counts = torch.from_numpy(stored["counts"]).double()[: len(self.test.y)]
        return counts / counts.sum(1, keepdim=True)

    @cached_property
    def cropped(self) -> Images:
        """Training images as RandomResizedCrop(32, scale=(0.5, 1)) shows them, once each."""
        chosen = self._training(self.args.num_cropped, seed=1)
        crop = RandomResizedCrop(32, scale=(0.5, 1), antialias=True)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return Images(torch.stack([crop(image) for image in chosen.x]), chosen.y)

    @cached_property
    def ood(self) -> dict[str, Images]:
        """Images of no class of CIFAR-10, grey ones padded to 32 pixels."""
        count = self.args.num_ood
        sources = dict(self.task.ood)
        for name in ("FashionMNIST", "MNIST"):
            grey = load_idx(self.root / name / "raw" / "t10k-images-idx3-ubyte.gz")[:count]
            padded = nn.functional.pad(grey.unsqueeze(1).expand(-1, 3, -1, -1), (2, 2, 2, 2))
            sources[name] = self._normalized(padded)
        return {
            name: Images(x[:count], torch.zeros(len(x[:count]), dtype=torch.long))
            for name, x in sources.items()
        }

    def corrupted(self, kind: str, severity: int) -> Images:
        """The first test images, corrupted."""
        some = replace(self.task, test=TensorDataset(*self._first(self.args.num_shift)))
        return Images(*some.corrupted_test(kind, severity).tensors)

    def _first(self, count: int) -> tuple[Tensor, Tensor]:
        return self.test.x[:count], self.test.y[:count]

    def _normalized(self, images: Tensor) -> Tensor:
        return normalize(images, self.task.mean, self.task.std)

    def _training(self, count: int, seed: int = 0) -> Images:
        x, y = self.task.train.tensors
        rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:count]
        return Images(x[rows], y[rows])


@dataclass(frozen=True)
class Method:
    """What is compared.

    Attributes:
        make: From a model to an unfitted method.
        slow: Whether it needs Jacobians of every image, which takes hours without a GPU.
        tune: From an evaluated method, row numbers and labels to a tuned one.
    """

    make: Callable[[nn.Module], Predictor]
    slow: bool = False
    tune: Tune = lambda method, rows, y: method.calibrate([(rows, y)])  # type: ignore[return-value]


def methods(args: argparse.Namespace) -> dict[str, Method]:
    """All methods, by their names in the tables."""
    quiet: dict[str, Any] = {"progress": False}
    short = Training(steps=30, batch_size=32)
    rows, fitted_on = (40, args.fit_on) if args.smoke else (2000, args.fit_on)
    size: dict[str, Any] = {"num_inputs": args.num_inputs}
    if args.smoke:
        size |= {"rank": 4, "num_directions": 16, "width": 16, "teacher": short}

    def last_layer(structure: str) -> Method:
        return Method(lambda model: LastLayerLaplace(model, structure=structure, **quiet))

    def nystrom(rank: int, residual: str) -> Callable[[nn.Module], Predictor]:
        found = Nystrom(min(rank, rows // 4), rows)
        return lambda model: ELLA(model, eigenfunctions=found, residual=residual, **quiet)

    def neural(residual: str) -> Method:
        found = NeuralEF(**size)
        return Method(lambda m: ELLA(m, eigenfunctions=found, residual=residual, **quiet))

    published = NystromLaplace
    return {
        "MAP": Method(lambda model: MAP(model, **quiet)),
        "temperature scaling": Method(lambda model: TemperatureScaling(model, **quiet)),
        "last-layer Laplace, full": last_layer("full"),
        "last-layer Laplace, Kronecker": last_layer("kron"),
        "ELLA, NeuralEF": neural("diag"),
        "ELLA, NeuralEF, factor": neural("factor"),
        "ELLA, Nyström k = 20, as in the paper": Method(
            nystrom(20, "none"), slow=True, tune=lambda *given: stopped_early(*given, fitted_on)
        ),
        "ELLA, Nyström k = 20, no residual": Method(nystrom(20, "none"), slow=True),
        "ELLA, Nyström k = 64": Method(nystrom(64, "diag"), slow=True),
        "laplace-torch ELLA, k = 20": Method(
            lambda model: published(model, rank=min(20, rows), subsample=rows, **quiet), slow=True
        ),
        "Kronecker Laplace, all weights": Method(
            lambda model: KroneckerLaplace(model, **quiet), slow=True
        ),
    }


def stopped_early(
    method: Evaluated, rows: Tensor, labels: Tensor, fitted_on: int, num_train: int = 50_000
) -> Evaluated:
    """The paper's choice: how many examples n to stop after, by validation NLL, at δ = 25.

    It scales the prior by n/N on the way, so stopping is tempering: with G summed over m of N
    examples, :math:`S = (m/n) φ (G + δ m/N)^{-1} φ^T` (G growing evenly).
    """
    start = method.hyperparameters
    assert start is not None
    scores = {}
    for n in range(1000, num_train + 1, 1000):
        precision = PAPER_PRECISION * fitted_on / num_train
        method.hyperparameters = replace(
            start, prior_precision=precision, temperature=fitted_on / n, logit_temperature=1.0
        )
        scores[n] = negative_log_likelihood(method.predict_proba([rows], n_samples=64), labels)
    best = min(scores, key=lambda n: scores[n])
    assert method.hyperparameters is not None
    method.hyperparameters = replace(method.hyperparameters, temperature=fitted_on / best)
    return method


@dataclass(frozen=True)
class Unit:
    """One method on one network.

    Attributes:
        arch: The network.
        name: The method.
        method: How it is made and tuned.
    """

    arch: str
    name: str
    method: Method

    def run(self, args: argparse.Namespace, data: Data, wanted: Iterable[str]) -> dict[str, list]:
        """Rows of the wanted measures, by measure."""
        model = load_model(self.arch, checkpoint_path(self.arch, data.root)).to(args.device)
        fitted, seconds = timed(lambda: self.method.make(model).fit(data.fitting.loader()))
        test = fitted.evaluated(data.test.loader())
        cost = {"fit_seconds": seconds, **self._cost(fitted, data, args.device)}
        rows: dict[str, list] = {measure: [] for measure in wanted}
        held_out = [self._held_out(test, data, seed) for seed in self._seeds(args)]
        if "calibration" in rows:
            cropped = fitted.evaluated(data.cropped.loader())
            for seed, (tuned, test_rows) in zip(self._seeds(args), held_out, strict=True):
                b = {"protocol": "B", "seed": seed, **scores(tuned, test_rows, data), **cost}
                rows["calibration"].append(b)
                chosen = torch.randperm(len(cropped), generator=_seeded(seed))[:NUM_VAL]
                other = self.method.tune(_copy(cropped), chosen, data.cropped.y[chosen])
                tuned = _copy(test, other)
                everything = torch.arange(len(test))
                a = {"protocol": "A", "seed": seed, **scores(tuned, everything, data), **cost}
                rows["calibration"].append(a)
        if "ood" in rows:
            rows["ood"] = list(self._ood(fitted, held_out, data))
        if "shift" in rows:
            rows["shift"] = list(self._shift(fitted, held_out, data))
        named = {"arch": self.arch, "method": self.name}
        return {measure: [{**named, **row} for row in found] for measure, found in rows.items()}

    @staticmethod
    def _seeds(args: argparse.Namespace) -> range:
        return range(args.first_seed, args.first_seed + args.seeds)

    def _held_out(self, test: Evaluated, data: Data, seed: int) -> tuple[Evaluated, Tensor]:
        """Protocol B: the method tuned on some test images, and the rows of the others."""
        val, rest = _split(len(test), seed)
        return self.method.tune(_copy(test), val, data.test.y[val]), rest

    @staticmethod
    def _cost(fitted: Predictor, data: Data, device: str) -> dict[str, float]:
        batch = data.test.x[:256].to(device)
        with torch.no_grad():
            ratio = forward_ratio(
                lambda: fitted.predict_proba(batch, n_samples=64),
                lambda: fitted.model(batch),
                repeats=5,
            )
        return {"predict_ratio": ratio, "state_bytes": fitted.state_bytes}

    def _ood(
        self, fitted: Predictor, held_out: list[tuple[Evaluated, Tensor]], data: Data
    ) -> Iterable[dict[str, Any]]:
        inside = [tuned.uncertainty([rest]) for tuned, rest in held_out]
        for source, images in data.ood.items():
            outside = fitted.evaluated(images.loader())
            for seed, (tuned, _) in enumerate(held_out):
                at = _copy(outside, tuned).uncertainty([torch.arange(len(outside))])
                for score in SCORES:
                    yield {
                        "seed": seed,
                        "source": source,
                        "score": score,
                        **detection(inside[seed], at, score),
                    }

    def _shift(
        self, fitted: Predictor, held_out: list[tuple[Evaluated, Tensor]], data: Data
    ) -> Iterable[dict[str, Any]]:
        for kind in CORRUPTIONS:
            for severity in range(1, 6):
                images = data.corrupted(kind, severity)
                shifted = fitted.evaluated(images.loader())
                for seed, (tuned, rest) in enumerate(held_out):
                    rows = rest[rest < len(shifted)]  # not those it was tuned on
                    probs = _copy(shifted, tuned).predict_proba([rows])
                    yield {
                        "seed": seed,
                        "corruption": kind,
                        "severity": severity,
                        "nll": negative_log_likelihood(probs, images.y[rows]),
                        "ece": expected_calibration_error(probs, images.y[rows]),
                    }


def scores(method: Evaluated, rows: Tensor, data: Data) -> dict[str, Any]:
    """Everything that probabilities of some test images are judged by."""
    probs = method.predict_proba([rows]).cpu()
    return probability_scores(probs, data.test.y[rows], data.human[rows])


def probability_scores(probs: Tensor, labels: Tensor, human: Tensor) -> dict[str, Any]:
    """Calibration, agreement with people, and selective prediction.

    Args:
        probs: Shape (n, c).
        labels: Shape (n,).
        human: Shares of people who chose each class, shape (n, c).
    """
    uncertain, wrong = entropy(probs), probs.argmax(1) != labels
    risk = risk_coverage(uncertain, wrong)[1]
    at = torch.linspace(0, len(risk) - 1, COVERAGES).long()
    return {
        **evaluate(probs, labels),
        "classwise_ece": classwise_calibration_error(probs, labels),
        "human_cross_entropy": cross_entropy_to(probs, human),
        "human_kl": divergence_from(probs, human),
        "aurc": area_under_risk_coverage(uncertain, wrong),
        "risk": risk[at].tolist(),
    }


def detection(inside: Uncertainty, outside: Uncertainty, score: str) -> dict[str, float]:
    """How well one score tells the two apart; a score that is constant detects nothing."""
    pair = getattr(inside, score), getattr(outside, score)
    return {"auroc": auroc(*pair), "aupr": aupr(*pair), "fpr95": fpr_at_95_tpr(*pair)}


def ensemble_rows(args: argparse.Namespace, data: Data) -> list[dict[str, Any]]:
    """The mean of the networks' probabilities, at the cost of all of them."""
    total = torch.zeros(len(data.test.y), 10, dtype=torch.float64)
    for arch in args.archs:
        model = load_model(arch, checkpoint_path(arch, data.root)).to(args.device)
        fitted = MAP(model, progress=False).fit(data.fitting.loader())
        total += fitted.predict_proba(data.test.loader()).double().cpu() / len(args.archs)
    everything = probability_scores(total, data.test.y, data.human)
    rows = [{"protocol": "A", "seed": args.first_seed, **everything}]
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        rest = _split(len(total), seed)[1]
        found = probability_scores(total[rest], data.test.y[rest], data.human[rest])
        rows.append({"protocol": "B", "seed": seed, **found})
    return [{"arch": "all", "method": ENSEMBLE, **row} for row in rows]


def run_suite(args: argparse.Namespace, measures: Iterable[str] = MEASURES) -> None:
    """Run what is missing from the result files of the measures, writing after each unit."""
    paths = {measure: args.out / f"{measure}-suite.json" for measure in measures}
    found = {measure: _stored(path, args) for measure, path in paths.items()}
    data = Data(args)
    chosen = {
        name: method
        for name, method in methods(args).items()
        if (args.slow or not method.slow) and any(p in name for p in (args.only or "").split("|"))
    }
    units = [Unit(arch, name, each) for arch in args.archs for name, each in chosen.items()]
    for unit in tqdm(units, desc="methods × networks"):
        missing = [
            measure
            for measure, rows in found.items()
            if not any((r["arch"], r["method"]) == (unit.arch, unit.name) for r in rows)
        ]
        if not missing:
            continue
        for measure, rows in unit.run(args, data, missing).items():
            found[measure] += rows
            save_results(paths[measure], settings(args), found[measure])
    calibration = found.get("calibration")
    if calibration is None or len(args.archs) == 1:
        return
    if not any(row["method"] == ENSEMBLE for row in calibration):
        calibration += ensemble_rows(args, data)
        save_results(paths["calibration"], settings(args), calibration)


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What must be the same for rows to be comparable, with the rest of the command line."""
    return {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items()}


def pivot(rows: Iterable[Row], metric: str, across: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows with one entry for each value of `across`, for a wide table; and those values."""
    grouped: dict[tuple[str, int], dict[str, list[float]]] = {}
    for row in rows:
        cell = grouped.setdefault((row["method"], row["seed"]), {})
        cell.setdefault(str(row[across]), []).append(row[metric])
    wide = [
        {"method": method, "seed": seed, **{k: statistics.fmean(v) for k, v in cells.items()}}
        for (method, seed), cells in grouped.items()
    ]
    return wide, list(dict.fromkeys(key for cells in grouped.values() for key in cells))


def _stored(path: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of an earlier run.

    Raises:
        ValueError: If it was run with other sizes.
    """
    if not path.exists():
        return []
    results = load_results(path)
    same = ("fit_on", "num_inputs", "num_cropped", "num_test", "num_ood", "num_shift")
    now, then = settings(args), results["settings"]
    changed = [key for key in (*same, "seeds", "first_seed") if now[key] != then.get(key)]
    if changed:
        raise ValueError(
            f"{path} was made with another {', '.join(changed)}. Give the same options to go on "
            f"with it, or another --out to start anew."
        )
    return results["rows"]


def _copy(method: Evaluated, like: Evaluated | None = None) -> Evaluated:
    """The same evaluation with its own hyperparameters, or with those of another."""
    twin = Evaluated(method.method, method._evaluation)
    if like is not None:
        twin.hyperparameters = like.hyperparameters
    return twin


def _split(num_examples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Protocol B: rows to tune on and rows to test on."""
    order = torch.randperm(num_examples, generator=_seeded(seed))
    num_val = min(NUM_VAL, num_examples // 4)
    return order[:num_val], order[num_val:]


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
