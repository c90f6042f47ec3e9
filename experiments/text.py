"""Does ella work on a transformer of sentences, Jacobians of all its 22.6 M weights included?

    python experiments/text.py --root $ELLA_DATA

MiniLM-L6 is fine-tuned on a few sentences of SST-2, until it knows them by heart. Of the held-out
sentences some, drawn by the seed, tune every method by the same search, and the others test it;
AG News is out of distribution. The classifier, and every method, is fitted once for all seeds.

Writes text.json after each method, and goes on where it was stopped; and text-kernel.json, the
exact tr κ(x, x) of some sentences, which is what every method's variance is made of.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _minilm import (
    SentenceClassifier,
    Sentences,
    Sizes,
    Stacked,
    TextTask,
    Unlabelled,
    load_task,
    made_up_task,
    minilm,
    tiny_transformer,
)
from _models import fine_tune
from _report import earlier_rows, markdown_table, save_results
from _settings import Common, option, parsed, recorded
from _suite import SCORES, Tune, detection, keep, tune
from calibration import ece_if_calibrated
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from ella import (
    ELLA,
    Distance,
    Evaluated,
    LastLayer,
    Linearized,
    NeuralEF,
    Nystrom,
    Predictor,
    Training,
)
from ella.baselines import MAP, LastLayerLaplace, TemperatureScaling
from ella.metrics import evaluate
from ella.report import forward_ratio

FULL = Sizes(train=200, unlabelled=4000, outside=200)
SMOKE = Sizes(train=40, unlabelled=60, outside=20)
NUM_VAL = 372
"""Of the 872 held-out sentences, to tune on."""
HEAD_TRAINING: dict[str, Any] = {"epochs": 30, "learning_rate": 1e-2, "batch_size": 32}
FINE_TUNING: dict[str, Any] = {"epochs": 3, "learning_rate": 2e-4, "batch_size": 16}
MEMORY_BUDGET = 3 * 2**29
"""Bytes: 48 rows of the Jacobian must fit into four times as much."""
SENTENCES_TIMED = 16
SENTENCES_DIFFERENTIATED = 25
"""Of each kind, for the exact kernel."""


@dataclass(frozen=True)
class Settings(Common):
    """What the script can be asked for.

    Attributes:
        seeds: How many.
        first_seed: The first of them.
        num_inputs: Sentences that NeuralEF learns from.
        num_directions: See `NeuralEF`.
        cache: Folder of the trained weights; None takes one in `out`.
        threads: CPU threads.
        only: Parts of the names of the methods to run, a|b|c.
    """

    seeds: int = option(3, "how many")
    first_seed: int = option(10, "the first of them")
    num_inputs: int = option(400, "NeuralEF learns from")
    num_directions: int = option(48, "of NeuralEF")
    cache: Path | None = option(None, "of the trained weights (default: OUT/.cache)", parse=Path)
    threads: int = option(1, "CPU threads")
    only: str | None = option(None, "run the methods whose name contains one of these, a|b|c")


def make_classifier(settings: Settings, train: Sentences) -> SentenceClassifier:
    """MiniLM fitted to the training sentences; kept on disk once it is."""
    model = tiny_transformer() if settings.smoke else minilm()
    folder = settings.cache or settings.out / ".cache"
    path = folder / f"text-{'smoke' if settings.smoke else 'minilm'}-{len(train)}.safetensors"
    if path.exists():
        model.load_state_dict(load_file(path))
        return model.eval()
    fit_classifier(model, train)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), path)
    return model


def fit_classifier(model: SentenceClassifier, train: Sentences) -> None:
    """Fit the head to frozen embeddings, then everything for a few passes more.

    Reference: Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution
    (Kumar et al., 2022), https://arxiv.org/abs/2202.10054
    """
    train = train.by_length()
    with torch.no_grad():
        embedded = torch.cat([model.embed(**x) for x, _ in train.batches()])
    tokens = torch.stack([train.ids, train.mask], 1)
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():  # dropout
        torch.manual_seed(0)
        for module, inputs, settings in (
            (model.head, embedded, HEAD_TRAINING),
            (Stacked(model), tokens, FINE_TUNING),
        ):
            data = TensorDataset(inputs, train.labels)
            threads = torch.get_num_threads()
            fine_tune(module, data, F.cross_entropy, generator, num_threads=threads, **settings)


@dataclass(frozen=True)
class Method:
    """What is compared.

    Attributes:
        make: From a model to an unfitted method.
        whole: Whether it takes the training sentences in one batch, padded to one length.
        tune: From an evaluated method, row numbers and their labels to a tuned one.
    """

    make: Callable[[nn.Module], Predictor]
    whole: bool = False
    tune: Tune = tune


def methods(settings: Settings, task: TextTask) -> dict[str, Method]:
    """All methods, by their names in the table."""
    rank, rows = (4, 12) if settings.smoke else (16, 32)
    common: dict[str, Any] = {"seed": settings.first_seed, "progress": False}

    def ella(
        eigenfunctions: Any,  # noqa: ANN401
        residual: str,
        distance: Distance | None = None,
        **kind: bool,
    ) -> Method:
        options = {"residual": residual, "memory_budget": MEMORY_BUDGET, **common}
        options |= {"eigenfunctions": eigenfunctions, "distance": distance}
        return Method(lambda model: ELLA(model, **options), **kind)

    def last_layer(structure: str) -> Method:
        return Method(lambda model: LastLayerLaplace(model, structure=structure, **common))

    return {
        "MAP": Method(lambda model: MAP(model, **common), tune=keep),
        "temperature scaling": Method(lambda model: TemperatureScaling(model, **common)),
        "last-layer Laplace, full": last_layer("full"),
        "last-layer Laplace, Kronecker": last_layer("kron"),
        "ELLA, last layer, no residual": ella(LastLayer(), "none"),
        f"ELLA, Nyström k = {rank}": ella(Nystrom(rank, rows), "diag", whole=True),
        "ELLA, NeuralEF": ella(neural_ef(settings, task), "diag", whole=True),
        "ELLA, NeuralEF + D": ella(neural_ef(settings, task), "diag", Distance(), whole=True),
    }


def neural_ef(settings: Settings, task: TextTask) -> NeuralEF:
    """NeuralEF on the training sentences and as many unlabelled ones."""
    augment = Unlabelled(task.unlabelled)
    if settings.smoke:
        short = Training(steps=30, batch_size=32)
        return NeuralEF(
            4, num_inputs=80, num_directions=12, width=16, augment=augment, teacher=short
        )
    return NeuralEF(
        32, num_inputs=settings.num_inputs, num_directions=settings.num_directions, augment=augment
    )


class Fitted:
    """A fitted method with what it says of all sentences: to tune and to score it many times.

    Args:
        method: Which.
        model: The classifier.
        task: All sentences.
    """

    def __init__(self, method: Method, model: nn.Module, task: TextTask) -> None:
        self.tune, self.labels = method.tune, task.held_out.labels
        start = time.process_time()
        fitted = method.make(model)
        fitted.fit(task.train.whole() if method.whole else task.train.batches())
        self.fit_seconds = time.process_time() - start
        self.inside: Evaluated = fitted.evaluated(task.held_out.batches())
        self.outside: Evaluated = fitted.evaluated(task.outside.batches())
        self.cost = {"state_bytes": fitted.state_bytes, **self._ratio(fitted, task)}

    @staticmethod
    def _ratio(fitted: Predictor, task: TextTask) -> dict[str, float]:
        x = task.held_out.rows(slice(-SENTENCES_TIMED, None)).inputs()
        with torch.no_grad():
            ratio = forward_ratio(
                lambda: fitted.predict_proba(x, n_samples=64),
                lambda: fitted.model(**x),
                repeats=3,
            )
        return {"predict_ratio": ratio}

    def row(self, seed: int) -> dict[str, Any]:
        """The method tuned on the sentences that the seed draws, scored on the others."""
        order = torch.randperm(len(self.inside), generator=torch.Generator().manual_seed(seed))
        num_val = min(NUM_VAL, len(order) // 2)
        val, test = order[:num_val], order[num_val:]
        self.tune(self.inside, val, self.labels[val])
        self.outside = self.outside.copied(self.inside)
        probs = self.inside.predict_proba([test])
        return {
            "seed": seed,
            "fit_seconds": self.fit_seconds,
            **evaluate(probs, self.labels[test]),
            "ece_floor": ece_if_calibrated(probs),
            **self._detection(test),
            **self.cost,
            **vars(self.inside.hyperparameters),
        }

    def _detection(self, test: torch.Tensor) -> dict[str, float]:
        """How well each score tells the test sentences from AG News; `auroc` is for entropy."""
        inside = self.inside.uncertainty([test])
        outside = self.outside.uncertainty([torch.arange(len(self.outside))])
        found = {
            f"{measure} {score}": value
            for score in SCORES
            if getattr(inside, score) is not None
            for measure, value in detection(
                getattr(inside, score), getattr(outside, score)
            ).items()
        }
        return {"auroc": found["auroc entropy"], **found}


def kernel_rows(model: nn.Module, task: TextTask) -> list[dict[str, Any]]:
    """Number of tokens and exact tr κ(x, x) of some sentences in and out of distribution."""
    linearized = Linearized(model, memory_budget=MEMORY_BUDGET)
    generator = torch.Generator().manual_seed(0)
    rows = []
    for kind, sentences in (("SST-2", task.held_out), ("AG News", task.outside)):
        chosen = torch.randperm(len(sentences), generator=generator)[:SENTENCES_DIFFERENTIATED]
        for x, _ in sentences.rows(chosen).batches(1):
            trace = linearized.kernel_diagonal(x).sum().item()
            rows.append({"method": kind, "tokens": x["input_ids"].shape[1], "trace": trace})
    return rows


def sizes_of(settings: Settings) -> Sizes:
    """How many sentences."""
    return SMOKE if settings.smoke else FULL


def kept_settings(settings: Settings) -> dict[str, Any]:
    """The command line, without what may differ from one part of a run to the next."""
    kept = recorded(settings, "only", "root", "cache")
    training = {"head_training": HEAD_TRAINING, "fine_tuning": FINE_TUNING}
    sizes = vars(sizes_of(settings))
    return {**kept, "out": str(settings.out), "num_val": NUM_VAL, **training, **sizes}


def main(argv: list[str] | None = None) -> None:
    """Run what is missing, writing after each method."""
    settings = parsed(Settings, __doc__.splitlines()[0], argv)
    torch.set_num_threads(settings.threads)
    path = settings.out / "text.json"
    compared = [name for name in kept_settings(settings) if name not in ("out", "seeds")]
    rows = earlier_rows(path, kept_settings(settings), compared)
    sizes = sizes_of(settings)
    task = made_up_task(sizes) if settings.smoke else load_task(settings.root, sizes)
    model = make_classifier(settings, task.train)
    seeds = range(settings.first_seed, settings.first_seed + settings.seeds)
    found = methods(settings, task)
    for name, method in found.items():
        done = {row["seed"] for row in rows if row["method"] == name}
        missing = [seed for seed in seeds if seed not in done]
        if not missing or not any(part in name for part in (settings.only or "").split("|")):
            continue
        fitted = Fitted(method, model, task)
        rows += [{"method": name, **fitted.row(seed)} for seed in missing]
        rows.sort(key=lambda row: (list(found).index(row["method"]), row["seed"]))
        save_results(path, kept_settings(settings), rows)
        print(markdown_table(rows), flush=True)
    kernel_path = settings.out / "text-kernel.json"
    if not kernel_path.exists():
        save_results(kernel_path, kept_settings(settings), kernel_rows(model, task))
    print(f"{path} and {kernel_path} written")


if __name__ == "__main__":
    main()
