"""The CIFAR-10 study: published ResNets, each method fitted once and tuned and scored often.

One unit of work is a family of methods on one network: what is fitted and evaluated once on every
set of images, then tuned and scored for every seed and protocol. Finished units are in the result
files, one for each network, so a run that was killed goes on where it stopped, and networks can
run side by side.

Protocol A tunes on 2,000 randomly cropped training images (as the ELLA paper does), drawn by the
seed, and tests on all test images. Protocol B tunes on 2,000 test images and tests on the others
(a quarter of the test images, where fewer than 8,000 are used).
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from _corruptions import CORRUPTIONS
from _images import Data
from _models import RESNET_DEPTHS, Ensemble, checkpoint_path, load_model
from _report import PeakMemory, cpu_timed, earlier_rows, forward_ratio, save_results
from _settings import OnDevice, option, recorded
from _store import KeptBody, ProjectedOnce, SampledOnce, Store
from torch import Tensor, nn
from tqdm import tqdm

from ella import ELLA, Evaluated, NeuralEF, Nystrom, Predictor, Training, Uncertainty, entropy
from ella.baselines import (
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

MEASURES = ("calibration", "ood", "shift")
SCORES = ("confidence_deficit", "entropy", "mutual_information", "logit_variance", "energy")
NUM_VAL = 2000
PAPER_PRECISION = 25.0
"""δ of the ELLA paper on CIFAR-10."""
COVERAGES = 50
ENSEMBLE = "ensemble"
ARCHS = (*(f"resnet{depth}" for depth in RESNET_DEPTHS), ENSEMBLE)
SIZES = (
    "fit_on",
    "fit_slow_on",
    "num_inputs",
    "num_directions",
    "num_rows",
    "num_cropped",
    "num_test",
    "num_ood",
    "num_shift",
)

Tune = Callable[[Evaluated, Tensor, Tensor], Evaluated]


@dataclass(frozen=True)
class StudySettings(OnDevice):
    """Sizes of the study. The defaults are for a GPU; cifar10.md says what was run.

    Attributes:
        archs: Networks.
        kept: Folder of what is computed once; None takes one in `out`.
        seeds: How many.
        first_seed: The first of them.
        only: Parts of the names of the methods to run, a|b|c.
        slow: Whether to add what takes hours without a GPU.
        fit_on: Training images for G.
        fit_slow_on: The same for methods that need exact Jacobians.
        num_inputs: Images that NeuralEF learns on.
        num_directions: See `NeuralEF`.
        num_rows: Rows of Nyström.
        num_cropped: Images to tune on in protocol A.
        num_test: Test images.
        num_ood: Images of each source that is out of distribution.
        num_shift: Images of each corruption.
    """

    archs: tuple[str, ...] = option(ARCHS, "networks")
    kept: Path | None = option(None, "folder of what is computed once (OUT/kept)", parse=Path)
    seeds: int = option(5, "how many")
    first_seed: int = option(0, "the first of them")
    only: str | None = option(None, "run the methods whose name contains one of these, a|b|c")
    slow: bool = option(False, "add what takes hours without a GPU")
    fit_on: int = option(50_000, "training images for G")
    fit_slow_on: int = option(50_000, "for exact Jacobians")
    num_inputs: int = option(50_000, "images NeuralEF learns on")
    num_directions: int = option(256, "see NeuralEF")
    num_rows: int = option(2000, "rows of Nyström")
    num_cropped: int = option(10_000, "to tune on, protocol A")
    num_test: int = option(10_000, "test images")
    num_ood: int = option(5000, "of each source; 0: none")
    num_shift: int = option(2000, "images a corruption; 0: none")


@dataclass(frozen=True)
class Network:
    """What methods are fitted to.

    Attributes:
        name: As in the tables.
        model: The classifier, as a user has it.
        body: The same, whose activations are kept.
        stores: Where they are kept.
    """

    name: str
    model: nn.Module
    body: nn.Module
    stores: tuple[Store, ...]

    @classmethod
    def published(cls, name: str, root: Path, kept: Path, device: str) -> "Network":
        """A checkpoint; of "ensemble", all of them, the last of which is its `model`."""
        if name == ENSEMBLE:
            each = [cls.published(f"resnet{depth}", root, kept, device) for depth in RESNET_DEPTHS]
            stores = tuple(network.stores[0] for network in each)
            body = Ensemble([network.body for network in each])
            return cls(name, each[-1].model, body, stores)
        model = load_model(name, checkpoint_path(name, root)).to(device)
        store = Store(kept / name)
        return cls(name, model, KeptBody(model, store), (store,))

    @contextmanager
    def closed(self) -> Iterator[None]:
        """Compute everything, as for timing."""
        with ExitStack() as stack:
            for store in self.stores:
                stack.enter_context(store.closed())
            yield


def keep(method: Evaluated, rows: Tensor, labels: Tensor) -> Evaluated:
    """Tune nothing."""
    return method


def tune(method: Evaluated, rows: Tensor, labels: Tensor) -> Evaluated:
    """The search that all methods have in common."""
    method.calibrate([(rows, labels)])
    return method


@dataclass(frozen=True)
class Family:
    """Methods that differ in their tuning only.

    Attributes:
        make: From a network to an unfitted method.
        tunings: From names in the tables to tunings of (evaluated method, rows, their labels).
        slow: Whether it needs Jacobians of every image, which takes hours without a GPU.
    """

    make: Callable[[Network], Predictor]
    tunings: dict[str, Tune] = field(default_factory=dict)
    slow: bool = False


def families(settings: StudySettings) -> list[Family]:
    """All methods."""
    quiet: dict[str, Any] = {"progress": False}
    size: dict[str, Any] = {
        "num_inputs": settings.num_inputs,
        "num_directions": settings.num_directions,
    }
    if settings.smoke:
        short = Training(steps=30, batch_size=32)
        size |= {"rank": 4, "num_directions": 16, "width": 16, "teacher": short}
    rank, few = (6, 4) if settings.smoke else (64, 20)
    exact = Nystrom(rank, settings.num_rows, residual="exact")

    def last_layer(structure: str) -> Callable[[Network], Predictor]:
        return lambda network: LastLayerLaplace(network.body, structure=structure, **quiet)

    def nystrom(k: int, residual: str) -> Callable[[Network], Predictor]:
        def make(network: Network) -> Predictor:
            found = ProjectedOnce(exact, k, network.stores[0], residual)
            return ELLA(network.model, eigenfunctions=found, **quiet)

        return make

    def neural(residual: str) -> Callable[[Network], Predictor]:
        def make(network: Network) -> Predictor:
            found = SampledOnce(NeuralEF(**size, residual=residual), network.stores[0])
            return ELLA(network.model, eigenfunctions=found, **quiet)

        return make

    def published(network: Network) -> Predictor:
        return NystromLaplace(network.model, rank=few, subsample=settings.num_rows, **quiet)

    def paper(method: Evaluated, rows: Tensor, labels: Tensor) -> Evaluated:
        return stopped_early(method, rows, labels, settings.fit_slow_on)

    plain = {"MAP": keep, "temperature scaling": tune}
    return [
        Family(lambda network: TemperatureScaling(network.body, **quiet), plain),
        Family(last_layer("full"), {"last-layer Laplace, full": tune}),
        Family(last_layer("kron"), {"last-layer Laplace, Kronecker": tune}),
        Family(neural("diag"), {"ELLA, NeuralEF": tune}),
        Family(neural("factor"), {"ELLA, NeuralEF, factor": tune}),
        Family(
            nystrom(few, "none"),
            {
                "ELLA, Nyström k = 20, as in the paper": paper,
                "ELLA, Nyström k = 20, no residual": tune,
            },
            slow=True,
        ),
        Family(nystrom(few, "diag"), {"ELLA, Nyström k = 20": tune}, slow=True),
        Family(nystrom(rank, "diag"), {"ELLA, Nyström k = 64": tune}, slow=True),
        Family(nystrom(rank, "exact"), {"ELLA, Nyström k = 64, full residual": tune}, slow=True),
        Family(published, {"laplace-torch ELLA, k = 20": tune}, slow=True),
        Family(
            lambda network: KroneckerLaplace(network.model, **quiet),
            {"Kronecker Laplace, all weights": tune},
            slow=True,
        ),
    ]


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
    """One family on one network.

    Attributes:
        network: The network.
        family: The methods.
    """

    network: Network
    family: Family

    def run(
        self, settings: StudySettings, data: Data, wanted: Iterable[str]
    ) -> dict[str, list[dict[str, Any]]]:
        """Rows of the wanted measures, by measure."""
        count = settings.fit_slow_on if self.family.slow else settings.fit_on
        fitted, cost = self._fitted(data.fitting(count).loader())
        cost |= self._cost(fitted, data, settings.device)
        test = fitted.evaluated(data.test.loader())
        rows: dict[str, list[dict[str, Any]]] = {measure: [] for measure in wanted}
        for name, tuning in self.family.tunings.items():
            tuned = [Tuned.on(test, data.test.y, seed, tuning) for seed in seeds(settings)]
            named = {"arch": self.network.name, "method": name}
            if "calibration" in rows:
                found = [*held_out(tuned, data), *paper(fitted, test, data, settings, tuning)]
                rows["calibration"] += [{**named, **row, **cost} for row in found]
            if "ood" in rows:
                rows["ood"] += [{**named, **row} for row in out_of_distribution(tuned, data)]
            if "shift" in rows:
                rows["shift"] += [{**named, **row} for row in under_shift(tuned, data)]
        return rows

    def _fitted(self, loader: Iterable[Any]) -> tuple[Predictor, dict[str, Any]]:
        """CPU seconds and memory of the fit, with those of what was read from the stores."""
        for store in self.network.stores:
            store.seconds = store.bytes = 0.0
        with PeakMemory("cpu") as memory:
            fitted, seconds = cpu_timed(lambda: self.family.make(self.network).fit(loader))
        peak = memory.bytes
        for store in self.network.stores:
            seconds, peak = seconds + store.seconds, max(peak, store.bytes)
        return fitted, {"fit_seconds": seconds, "fit_bytes": peak}

    def _cost(self, fitted: Predictor, data: Data, device: str) -> dict[str, Any]:
        slow = self.family.slow
        batch = data.test.x[: 64 if slow else 256].to(device)
        model = self.network.model
        with torch.no_grad(), self.network.closed():
            ratio = forward_ratio(
                lambda: fitted.predict_proba(batch, n_samples=64),
                lambda: model(batch),
                repeats=2 if slow else 5,
            )
        return {"predict_ratio": ratio, "state_bytes": fitted.state_bytes}


@dataclass(frozen=True)
class Tuned:
    """A method tuned on some test images.

    Attributes:
        seed: Drew them.
        fitted: The method.
        test: Its evaluation of the test images, tuned.
        rest: Rows of the images that it was not tuned on.
    """

    seed: int
    fitted: Predictor
    test: Evaluated
    rest: Tensor

    @classmethod
    def on(cls, test: Evaluated, labels: Tensor, seed: int, tuning: Tune) -> "Tuned":
        """Tune on 2,000 of the test images, or on a quarter of them if that is less."""
        order = torch.randperm(len(test), generator=_seeded(seed))
        num_val = min(NUM_VAL, len(test) // 4)
        val, rest = order[:num_val], order[num_val:]
        return cls(seed, test.method, tuning(test.copied(), val, labels[val]), rest)


def held_out(tuned: list[Tuned], data: Data) -> Iterator[dict[str, Any]]:
    """Protocol B: tuned on some test images, tested on the others."""
    for each in tuned:
        found = scores(each.test, each.rest, data)
        yield {"protocol": "B", "seed": each.seed, **found, **chosen(each.test)}


def paper(
    fitted: Predictor, test: Evaluated, data: Data, settings: StudySettings, tuning: Tune
) -> Iterator[dict[str, Any]]:
    """Protocol A: tuned on cropped training images, tested on all test images."""
    cropped = fitted.evaluated(data.cropped.loader())
    for seed in seeds(settings):
        rows = torch.randperm(len(cropped), generator=_seeded(seed))[:NUM_VAL]
        other = tuning(cropped.copied(), rows, data.cropped.y[rows])
        tuned = test.copied(other)
        found = scores(tuned, torch.arange(len(test)), data)
        yield {"protocol": "A", "seed": seed, **found, **chosen(other)}


def out_of_distribution(tuned: list[Tuned], data: Data) -> Iterator[dict[str, Any]]:
    """How well each score tells test images from those of each source; lists over the seeds."""
    inside = [each.test.uncertainty([each.rest]) for each in tuned]
    for source, images in data.ood.items():
        outside = tuned[0].fitted.evaluated(images.loader())
        rows = torch.arange(len(outside))
        at = [outside.copied(each.test).uncertainty([rows]) for each in tuned]
        for score in SCORES:
            pairs = zip(inside, at, strict=True)
            found = [detection(first, second, score) for first, second in pairs]
            yield {"source": source, "score": score, **listed(found)}


def under_shift(tuned: list[Tuned], data: Data) -> Iterator[dict[str, Any]]:
    """NLL and ECE on corrupted images that a method was not tuned on; lists over the seeds."""
    for kind in CORRUPTIONS:
        for severity in range(1, 6):
            images = data.corrupted(kind, severity)
            shifted = tuned[0].fitted.evaluated(images.loader())
            found = []
            for each in tuned:
                rows = each.rest[each.rest < len(shifted)]
                probs = shifted.copied(each.test).predict_proba([rows])
                found.append(
                    {
                        "accuracy": (probs.argmax(1) == images.y[rows]).double().mean().item(),
                        "nll": negative_log_likelihood(probs, images.y[rows]),
                        "ece": expected_calibration_error(probs, images.y[rows]),
                    }
                )
            yield {"corruption": kind, "severity": severity, **listed(found)}


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
        "risk": [round(value, 5) for value in risk[at].tolist()],
    }


def detection(inside: Uncertainty, outside: Uncertainty, score: str) -> dict[str, float]:
    """How well one score tells the two apart; a score that is constant detects nothing."""
    pair = getattr(inside, score), getattr(outside, score)
    return {"auroc": auroc(*pair), "aupr": aupr(*pair), "fpr95": fpr_at_95_tpr(*pair)}


def chosen(method: Evaluated) -> dict[str, float]:
    """The hyperparameters in use."""
    found = method.hyperparameters
    assert found is not None
    return {
        "prior_precision": found.prior_precision,
        "temperature": found.temperature,
        "logit_temperature": found.logit_temperature,
    }


def listed(found: list[dict[str, float]]) -> dict[str, list[float]]:
    """One list for each key, rounded: the study has thousands of them."""
    return {key: [round(each[key], 5) for each in found] for key in found[0]}


def seeds(settings: StudySettings) -> range:
    """All of the study."""
    return range(settings.first_seed, settings.first_seed + settings.seeds)


def run_suite(settings: StudySettings, measures: Iterable[str] = MEASURES) -> None:
    """Run what is missing from the result files of the measures, writing after each unit."""
    data = Data(settings)
    kept = kept_settings(settings)
    sizes = {"calibration": "num_test", "ood": "num_ood", "shift": "num_shift"}
    for name in settings.archs:
        paths = {m: settings.out / f"{m}-{name}.json" for m in measures if kept[sizes[m]]}
        compared = (*SIZES, "seeds", "first_seed")
        found = {m: earlier_rows(path, kept, compared) for m, path in paths.items()}
        folder = settings.kept or settings.out / "kept"
        network = Network.published(name, data.root, folder, settings.device)
        for family in tqdm(_chosen_families(settings, name), desc=name):
            missing = [
                measure
                for measure, rows in found.items()
                if not {row["method"] for row in rows} >= family.tunings.keys()
            ]
            if not missing:
                continue
            for measure, rows in Unit(network, family).run(settings, data, missing).items():
                found[measure] += rows
                save_results(paths[measure], kept, found[measure])


def _chosen_families(settings: StudySettings, name: str) -> list[Family]:
    """Those that `--only` and `--slow` leave; of the ensemble, the plain ones."""
    wanted = settings.only.split("|") if settings.only else [""]
    return [
        family
        for family in families(settings)
        if (settings.slow or not family.slow)
        and (name != ENSEMBLE or "MAP" in family.tunings)
        and any(part in title for part in wanted for title in family.tunings)
    ]


def kept_settings(settings: StudySettings) -> dict[str, Any]:
    """The command line, without the folders of one machine."""
    return recorded(settings, "kept", "out", "root")


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
