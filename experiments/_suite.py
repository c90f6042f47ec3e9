"""The CIFAR-10 study: published ResNets, each method fitted once and tuned and scored often.

What is compared is passed in: `_families.py` and `distance.py` have methods for it.
One unit of work is a family of methods on one network: what is fitted and evaluated once on every
set of images, then tuned and scored for every seed and protocol. Finished units are in the result
files, one for each network, so a run that was killed goes on where it stopped, and networks can
run side by side.

Protocol A tunes on 2,000 randomly cropped training images (as the ELLA paper does), drawn by the
seed, and tests on all test images. Protocol B tunes on 2,000 test images and tests on the others
(a quarter of the test images, where fewer than 8,000 are used). Without cropped images, of which
there are none at `--num-cropped 0`, only B is run.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from _corruptions import CORRUPTIONS
from _images import Data, Images
from _models import RESNET_DEPTHS, Ensemble, checkpoint_path, load_model
from _report import PeakMemory, cpu_timed, earlier_rows, save_results
from _settings import OnDevice, option, recorded
from _store import KeptBody, Store
from torch import Tensor, nn
from tqdm import tqdm

from ella import Evaluated, Predictor, entropy
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
from ella.report import forward_ratio

SCORES = (
    *("confidence_deficit", "entropy", "mutual_information", "logit_variance"),
    *("energy", "corrected_energy", "max_logit_p_norm", "distance"),
)
NUM_VAL = 2000
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
        fit_on: Training images for G.
        num_inputs: Images that NeuralEF learns on.
        num_directions: See `NeuralEF`.
        num_cropped: Images to tune on in protocol A; 0 leaves it out.
        num_test: Test images.
        num_ood: Images of each source that is out of distribution.
        num_shift: Images of each corruption.
    """

    archs: tuple[str, ...] = option(ARCHS, "networks")
    kept: Path | None = option(None, "folder of what is computed once (OUT/kept)", parse=Path)
    seeds: int = option(5, "how many")
    first_seed: int = option(0, "the first of them")
    only: str | None = option(None, "run the methods whose name contains one of these, a|b|c")
    fit_on: int = option(50_000, "training images for G")
    num_inputs: int = option(50_000, "images NeuralEF learns on")
    num_directions: int = option(256, "see NeuralEF")
    num_cropped: int = option(10_000, "to tune on, protocol A; 0: none")
    num_test: int = option(10_000, "test images")
    num_ood: int = option(5000, "of each source; 0: none")
    num_shift: int = option(2000, "images a corruption; 0: none")

    @property
    def kept_in(self) -> Path:
        """The folder of what is computed once."""
        return self.kept or self.out / "kept"


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
        fit_on: Training images for G.
        slow: Whether it needs Jacobians of every image, which takes hours without a GPU.
        shown: What a method is evaluated on once: the test images, then whatever else tunings use.
    """

    make: Callable[[Network], Predictor]
    tunings: dict[str, Tune]
    fit_on: int
    slow: bool = False
    shown: Callable[[Data], Sequence[Images]] = lambda data: [data.test]


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
        self, settings: StudySettings, data: Data, wanted: "Mapping[str, Measure]"
    ) -> dict[str, list[dict[str, Any]]]:
        """Rows of the wanted measures, by name."""
        fitted, fit_cost = self._fitted(data.fitting(self.family.fit_on).loader())
        shown = self.family.shown(data)
        test = fitted.evaluated(list(chain.from_iterable(each.loader() for each in shown)))
        elsewhere = Elsewhere(fitted, data)
        rows: dict[str, list[dict[str, Any]]] = {measure: [] for measure in wanted}
        for name, tuning in self.family.tunings.items():
            tuned = [Tuned.on(test, elsewhere, seed, tuning) for seed in seeds(settings)]
            named = {"arch": self.network.name, "method": name}
            for measure, rows_of in wanted.items():
                found = list(rows_of(tuned, data))
                if measure == "calibration":
                    cost = fit_cost | self._cost(tuned[0].predictor, data, settings.device)
                    found += paper(fitted, test, data, settings, tuning)
                    found = [{**row, **cost} for row in found]
                rows[measure] += [{**named, **row} for row in found]
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
class Elsewhere:
    """A method on images that it is never tuned on, each set of which is gone through once.

    Attributes:
        fitted: The method.
        data: All images.
    """

    fitted: Predictor
    data: Data

    @cached_property
    def outside(self) -> dict[str, Evaluated]:
        """By source of images of no class."""
        sources = self.data.ood.items()
        return {source: self.fitted.evaluated(images.loader()) for source, images in sources}

    @cached_property
    def shifted(self) -> dict[tuple[str, int], Evaluated]:
        """The first test images, by corruption and severity."""
        kinds = [(kind, severity) for kind in CORRUPTIONS for severity in range(1, 6)]
        return {each: self.fitted.evaluated(self.data.corrupted(*each).loader()) for each in kinds}


@dataclass(frozen=True)
class Tuned:
    """A method tuned on some test images.

    Attributes:
        seed: Drew them.
        test: Its evaluation of the test images, tuned.
        rest: Rows of the images that it was not tuned on.
        elsewhere: The method on other images.
    """

    seed: int
    test: Evaluated
    rest: Tensor
    elsewhere: Elsewhere

    @classmethod
    def on(cls, test: Evaluated, elsewhere: Elsewhere, seed: int, tuning: Tune) -> "Tuned":
        """Tune on some of the test images; see `drawn`."""
        labels = elsewhere.data.test.y
        val, rest = drawn(len(labels), seed)
        return cls(seed, tuning(test.copied(), val, labels[val]), rest, elsewhere)

    @property
    def predictor(self) -> Predictor:
        """The method with the numbers that were found, as a user has it."""
        found = copy.copy(self.elsewhere.fitted)
        found.hyperparameters = self.test.hyperparameters
        found.tuning, found.link = self.test.tuning, self.test.link
        return found


def drawn(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rows of the test images to tune on, 2,000 or a quarter if that is less, and the others."""
    order = torch.randperm(count, generator=_seeded(seed))
    num_val = min(NUM_VAL, count // 4)
    return order[:num_val], order[num_val:]


def held_out(tuned: list[Tuned], data: Data) -> Iterator[dict[str, Any]]:
    """Protocol B: tuned on some test images, tested on the others."""
    for each in tuned:
        found = scores(each.test, each.rest, data) | ranking(each.test, each.rest, data)
        yield {"protocol": "B", "seed": each.seed, **found, **chosen(each.test)}


def paper(
    fitted: Predictor, test: Evaluated, data: Data, settings: StudySettings, tuning: Tune
) -> Iterator[dict[str, Any]]:
    """Protocol A: tuned on cropped training images, tested on all test images."""
    if not settings.num_cropped:
        return
    cropped = fitted.evaluated(data.cropped.loader())
    for seed in seeds(settings):
        rows = torch.randperm(len(cropped), generator=_seeded(seed))[:NUM_VAL]
        other = tuning(cropped.copied(), rows, data.cropped.y[rows])
        tuned = test.copied(other)
        found = scores(tuned, torch.arange(len(data.test.y)), data)
        yield {"protocol": "A", "seed": seed, **found, **chosen(other)}


def out_of_distribution(tuned: list[Tuned], data: Data) -> Iterator[dict[str, Any]]:
    """How well each score tells test images from those of each source; lists over the seeds."""
    inside = [each.test.uncertainty([each.rest]) for each in tuned]
    for source, outside in tuned[0].elsewhere.outside.items():
        rows = torch.arange(len(outside))
        at = [outside.copied(each.test).uncertainty([rows]) for each in tuned]
        for score in SCORES:
            if getattr(inside[0], score) is None:
                continue
            pairs = zip(inside, at, strict=True)
            found = [detection(getattr(a, score), getattr(b, score)) for a, b in pairs]
            yield {"source": source, "score": score, **listed(found)}


def under_shift(tuned: list[Tuned], data: Data) -> Iterator[dict[str, Any]]:
    """NLL and ECE on corrupted images that a method was not tuned on; lists over the seeds."""
    for (kind, severity), images in tuned[0].elsewhere.shifted.items():
        found = []
        for each in tuned:
            rows = each.rest[each.rest < len(images)]
            probs, y = images.copied(each.test).predict_proba([rows]), data.test.y[rows]
            found.append(
                {
                    "accuracy": (probs.argmax(1) == y).double().mean().item(),
                    "nll": negative_log_likelihood(probs, y),
                    "ece": expected_calibration_error(probs, y),
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


def ranking(method: Evaluated, rows: Tensor, data: Data) -> dict[str, float]:
    """AURC of each score: the mean error rate of those it lets pass, over how many that are."""
    wrong = method.predict([rows]).cpu() != data.test.y[rows]
    found = method.uncertainty([rows])
    scores = {score: getattr(found, score) for score in SCORES}
    return {
        f"aurc {score}": area_under_risk_coverage(values.cpu(), wrong)
        for score, values in scores.items()
        if values is not None
    }


def detection(inside: Tensor, outside: Tensor) -> dict[str, float]:
    """How well a score tells the two apart; a score that is constant detects nothing."""
    pair = inside, outside
    return {"auroc": auroc(*pair), "aupr": aupr(*pair), "fpr95": fpr_at_95_tpr(*pair)}


def chosen(method: Evaluated) -> dict[str, float]:
    """The hyperparameters in use."""
    found = method.hyperparameters
    assert found is not None
    return {
        "prior_precision": found.prior_precision,
        "temperature": found.temperature,
        "logit_temperature": found.logit_temperature,
        "distance_scale": found.distance_scale,
        "norm_exponent": found.norm_exponent,
    }


def listed(found: list[dict[str, float]]) -> dict[str, list[float]]:
    """One list for each key, rounded: the study has thousands of them."""
    return {key: [round(each[key], 5) for each in found] for key in found[0]}


def seeds(settings: StudySettings) -> range:
    """All of the study."""
    return range(settings.first_seed, settings.first_seed + settings.seeds)


Measure = Callable[[list[Tuned], Data], Iterable[dict[str, Any]]]
"""From one method, tuned for every seed, to rows of a result file."""
MEASURES: dict[str, Measure] = {
    "calibration": held_out,
    "ood": out_of_distribution,
    "shift": under_shift,
}


def run_suite(
    settings: StudySettings,
    families: Iterable[Family],
    measures: Mapping[str, Measure] = MEASURES,
) -> None:
    """Run what is missing from the result files of the measures, writing after each unit.

    Args:
        settings: Sizes.
        families: What to compare.
        measures: By the name of their files.
    """
    families = list(families)
    data = Data(settings)
    kept = kept_settings(settings)
    sizes = {"calibration": "num_test", "ood": "num_ood"}
    for name in settings.archs:
        paths = {
            m: settings.out / f"{m}-{name}.json"
            for m in measures
            if kept[sizes.get(m, "num_shift")]
        }
        found = {m: earlier_rows(path, kept, compared(kept)) for m, path in paths.items()}
        network = Network.published(name, data.root, settings.kept_in, settings.device)
        for family in tqdm(_wanted(families, settings, name), desc=name):
            missing = {
                measure: measures[measure]
                for measure, rows in found.items()
                if not {row["method"] for row in rows} >= family.tunings.keys()
            }
            if not missing:
                continue
            for measure, rows in Unit(network, family).run(settings, data, missing).items():
                found[measure] += rows
                save_results(paths[measure], kept, found[measure])


def _wanted(families: Iterable[Family], settings: StudySettings, name: str) -> list[Family]:
    """Those that `--only` leaves; of the ensemble, the plain ones."""
    wanted = settings.only.split("|") if settings.only else [""]
    return [
        family
        for family in families
        if (name != ENSEMBLE or "MAP" in family.tunings)
        and any(part in title for part in wanted for title in family.tunings)
    ]


def compared(kept: Iterable[str]) -> list[str]:
    """Those of the settings that must be the same for rows to stand in one file."""
    return [name for name in (*SIZES, "seeds", "first_seed") if name in kept]


def kept_settings(settings: StudySettings) -> dict[str, Any]:
    """The command line, without the folders of one machine."""
    return recorded(settings, "kept", "out", "root")


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
