"""How few validation examples are enough? ELLA against temperature scaling, both tuned on them.

    python experiments/small_validation.py
    python experiments/small_validation.py --problems mlp-0 resnet20 resnet44 --root $ELLA_DATA

Each method is fitted and evaluated once; then both are tuned on the same draws of validation
examples and scored on the same test examples. A row tells, over all draws, the mean NLL of both,
the mean paired difference with its standard error (below zero: ELLA is better), and the worst NLL
of any draw, over that of the plain model. Figures that end in _wide are those of a wider
hyperprior, on the same draws.
"""

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from _data import data_root, load_task
from _given import batches_of
from _models import TRAINING, DigitsNet, checkpoint_path, load_model, train_classifier
from _report import earlier_rows, save_results
from _settings import OnDevice, option, parsed, recorded
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from ella import ELLA, Categorical, Evaluated, NeuralEF, Nystrom, Training
from ella.baselines import TemperatureScaling
from ella.metrics import negative_log_likelihood

SIZES = (5, 10, 20, 50, 100, 200, 500, 1000, 2000)
LARGE = 500
"""From this size on fewer draws are made: they differ less, and take longer."""
SPLIT = (slice(200), slice(200, 700), slice(700, None))
"""Of all ten digits: to train the README's classifier, to draw from, to test."""


class WideCategorical(Categorical):
    """Classes, with a hyperprior that ten examples can move too far."""

    spreads = replace(Categorical.spreads, precision=1.0, temperature=0.5, scale=0.2)


LIKELIHOODS = {"": Categorical(), "_wide": WideCategorical()}
"""By what the names of their figures end in."""


@dataclass(frozen=True)
class Settings(OnDevice):
    """What the script can be asked for.

    Attributes:
        problems: "digits-SEED"; "mlp-SEED", the README's, with Nyström; "underfit-SEED", the same
            trained too briefly to be sure of itself; or a published CIFAR-10 network.
        draws: Of validation examples, for each size.
        num_inputs: Images that NeuralEF learns from (CIFAR-10).
        num_sources: Training images that G comes from (CIFAR-10).
        threads: CPU threads.
    """

    problems: tuple[str, ...] = option(("digits-10", "digits-11", "digits-12"), "what to run on")
    draws: int = option(20, "of validation examples, for each size")
    num_inputs: int = option(3000, "images that NeuralEF learns from (CIFAR-10)")
    num_sources: int = option(5000, "training images that G comes from (CIFAR-10)")
    threads: int = option(1, "CPU threads")


@dataclass(frozen=True)
class Problem:
    """A classifier, and what ELLA needs for it.

    Attributes:
        model: The classifier.
        data: To train, to draw from, and to test.
        eigenfunctions: How ELLA finds them.
    """

    model: nn.Module
    data: tuple[TensorDataset, TensorDataset, TensorDataset]
    eigenfunctions: NeuralEF | Nystrom

    @classmethod
    def named(cls, name: str, settings: Settings) -> "Problem":
        """See `Settings.problems`."""
        kind, _, number = name.partition("-")
        if kind in ("mlp", "underfit"):
            return cls._mlp(int(number), underfit=kind == "underfit")
        if kind == "digits":
            task = load_task("digits", None, int(number))
            net = DigitsNet(task.num_classes)
            model = train_classifier(net, task.train, int(number), **TRAINING["digits"])
            neural = NeuralEF(num_inputs=3000, num_directions=128, teacher=Training(steps=1000))
        else:
            sizes = {"num_val": 3000, "num_test": 4000}
            task = load_task("cifar10", settings.root, 0, num_train=settings.num_sources, **sizes)
            model = load_model(name, checkpoint_path(name, data_root(settings.root)))
            neural = NeuralEF(num_inputs=settings.num_inputs)
        if settings.smoke:
            neural = NeuralEF(4, num_inputs=60, num_directions=16, teacher=Training(steps=20))
        return cls(model.to(settings.device), (task.train, task.val, task.test), neural)

    @classmethod
    def _mlp(cls, seed: int, *, underfit: bool) -> "Problem":
        """The README's classifier, on 200 digits of ten classes."""
        x, y = load_digits(return_X_y=True)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
        x, y = torch.tensor(x)[order].float() / 16, torch.tensor(y)[order]
        train, val, test = (TensorDataset(x[rows], y[rows]) for rows in SPLIT)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        for _ in range(40 if underfit else 100):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(train.tensors[0]), train.tensors[1]).backward()
            optimizer.step()
        return cls(model, (train, val, test), Nystrom(64, len(train)))


@dataclass(frozen=True)
class Known:
    """Both methods at all labelled examples that they were not fitted on.

    Attributes:
        methods: By name.
        labels: Of the examples.
        num_val: How many of them draws come from; the others test.
    """

    methods: dict[str, Evaluated]
    labels: Tensor
    num_val: int

    @classmethod
    def of(cls, problem: str, settings: Settings) -> "Known":
        """Train or load the classifier; fit both methods."""
        found = Problem.named(problem, settings)
        train, val, test = found.data
        both = zip(val.tensors, test.tensors, strict=True)
        images, labels = (torch.cat(pair) for pair in both)
        methods = {
            "temperature scaling": TemperatureScaling(found.model, progress=False),
            "ELLA": ELLA(found.model, eigenfunctions=found.eigenfunctions, progress=False),
        }
        known = {
            name: method.fit(DataLoader(train, batch_size=250)).evaluated(batches_of(images))
            for name, method in methods.items()
        }
        return cls(known, labels.to(settings.device), len(val))

    def nll(self, method: Evaluated) -> float:
        """On the test examples."""
        test = torch.arange(self.num_val, len(self.labels), device=self.labels.device)
        return negative_log_likelihood(method.predict_proba([test]), self.labels[test])

    def row(self, size: int, draws: int) -> dict[str, Any]:
        """All draws of one size."""
        plain = self.nll(self.methods["temperature scaling"].copied())
        count = draws if size < LARGE else max(1, draws // 2)
        row: dict[str, Any] = {"size": size, "draws": count, "nll_map": plain}
        for suffix, likelihood in LIKELIHOODS.items():
            figures = self._figures(size, count, likelihood, plain)
            row |= {name + suffix: value for name, value in figures.items()}
        return row

    def _figures(
        self, size: int, draws: int, likelihood: Categorical, plain: float
    ) -> dict[str, float]:
        generator = torch.Generator().manual_seed(size)
        found: dict[str, list[float]] = {name: [] for name in self.methods}
        for _ in range(draws):
            rows = torch.randperm(self.num_val, generator=generator)[:size]
            rows = rows.to(self.labels.device)
            for name, method in self.methods.items():
                tuned = method.copied()
                tuned.likelihood = likelihood
                tuned.calibrate([(rows, self.labels[rows])])
                found[name].append(self.nll(tuned))
        scaled, ella = (torch.tensor(found[name]) for name in self.methods)
        difference = ella - scaled
        return {
            "nll_scaling": scaled.mean().item(),
            "nll": ella.mean().item(),
            "difference": difference.mean().item(),
            "error": (difference.std() / len(difference) ** 0.5).item() if draws > 1 else 0.0,
            "worst_scaling": (scaled.max() / plain).item(),
            "worst": (ella.max() / plain).item(),
        }


def rows_of(problem: str, settings: Settings) -> Iterator[dict[str, Any]]:
    """One problem, all sizes."""
    known = Known.of(problem, settings)
    for size in tqdm(SIZES, desc=problem):
        if size <= known.num_val:
            yield {"problem": problem, **known.row(size, settings.draws)}


def table(results: Mapping[str, Any]) -> str:
    """Paired differences in units of 10⁻⁴ nats, and the worst ratios, by problem and size."""
    rows = results["rows"]
    sizes = sorted({row["size"] for row in rows})
    problems = list(dict.fromkeys(row["problem"] for row in rows))
    lines = ["| validation examples | " + " | ".join(map(str, sizes)) + " |"]
    lines.append("| --- |" + " ---: |" * len(sizes))
    for title, text in (
        ("", lambda row: f"{1e4 * row['difference']:+.0f} ± {1e4 * row['error']:.0f}"),
        (", worst / MAP", lambda row: f"{row['worst']:.2f} ({row['worst_scaling']:.2f})"),
        (", worst / MAP, wider hyperprior", lambda row: f"{row['worst_wide']:.2f}"),
        (", NLL − wider's", lambda row: f"{1e4 * (row['nll'] - row['nll_wide']):+.0f}"),
    ):
        for problem in problems:
            cells = {row["size"]: text(row) for row in rows if row["problem"] == problem}
            columns = " | ".join(cells.get(size, "–") for size in sizes)
            lines.append(f"| {problem}{title} | {columns} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Run what is missing, writing after each problem."""
    settings = parsed(Settings, __doc__.splitlines()[0], argv)
    torch.set_num_threads(settings.threads)
    # That few examples determine little is what is measured here.
    warnings.filterwarnings("ignore", "calibrate: ")
    path = settings.out / "small-validation.json"
    kept = recorded(settings, "root", "out", "problems")
    rows = earlier_rows(path, kept, ("draws", "num_inputs", "num_sources", "smoke"))
    done = {row["problem"] for row in rows}
    for problem in settings.problems:
        if problem not in done:
            rows += rows_of(problem, settings)
            save_results(path, kept, rows)
    print(table({"rows": rows}))


if __name__ == "__main__":
    main()
