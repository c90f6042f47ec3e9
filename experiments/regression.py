"""What is a linearized posterior worth for regression, and how close does ELLA come to it?

    python experiments/regression.py toy --out experiments/results
    python experiments/regression.py uci --root $ELLA_DATA --out experiments/results

`uci`: the nine UCI sets with their standard splits (20; protein 5), by the protocol of
Hernández-Lobato & Adams (2015), https://arxiv.org/abs/1502.05336, and Gal & Ghahramani (2016),
https://arxiv.org/abs/1506.02142: one hidden layer of 50 ReLU units (protein 100), inputs and
targets standardised. A tenth of each training part is held out; the rest fits the network and
every method, the held-out tenth tunes (δ, T, σ²) of every method by the same search. Finished
splits are in the result file, so a run that was killed goes on where it stopped.

`toy`: 16 points in two clusters, and Snelson's data. Every method has the same network, prior
precision δ and noise, and is compared with the linearized Laplace approximation from its
definition; at two δ, that of `fit` (prior standard deviation 1) and that of marginal likelihood.
"""

import itertools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _data import data_root
from _models import initialize, train_network
from _regression import (
    RULES,
    TOYS,
    UCI,
    AllWeights,
    RegressionTask,
    dense_variance,
    full_rank,
    gaussian_scores,
    load_uci,
    loader_of,
    predictive,
    toy_table,
    train_regressors,
    uci_table,
    uci_task,
)
from _report import IN_COLOR, OUT_COLOR, cpu_timed, load_results, new_figure, save_results
from _settings import Common, option, parsed, recorded
from matplotlib.axes import Axes
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from tqdm import tqdm

from ella import ELLA, LastLayer, NeuralEF, Nystrom, Perturb, Predictor, Training
from ella.baselines import MAP, KroneckerLaplace, LastLayerLaplace, TemperatureScaling
from ella.eigenfunctions import Augmentation

Make = Callable[[nn.Module], Predictor]
LIKELIHOOD: dict[str, Any] = {"likelihood": "regression", "progress": False}

# Learning rate between .03 and .1, of which each had the lower validation RMSE on some sets.
LEARNING = {"learning_rate": 0.05, "weight_decay": 0.01}
ROUND = 5
"""Splits of every data set that are run before the next ones of any."""
ROWS = 500
"""Training inputs whose rows "full rank" spans."""


@dataclass(frozen=True)
class Settings(Common):
    """What the script can be asked for.

    Attributes:
        part: "uci" or "toy".
        datasets: Keys of `UCI`.
        splits: Of each data set, at most.
        seed: Of the toy networks.
    """

    part: str = option("uci", "which study", choices=("uci", "toy"), positional=True)
    datasets: tuple[str, ...] = option(tuple(UCI), "of the archive", choices=tuple(UCI))
    splits: int = option(20, "of each data set, at most")
    seed: int = option(0, "of the toy networks")


def kept_settings(settings: Settings) -> dict[str, Any]:
    """What the numbers depend on, for the result file."""
    return recorded(settings, "root", "out")


# --- UCI --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """One unit of work.

    Attributes:
        dataset: A key of `UCI`.
        index: Number of the split.
    """

    dataset: str
    index: int


def uci_methods(train: TensorDataset, seed: int, *, smoke: bool) -> dict[str, Make]:
    """All methods by their names in the table; with c = 1 the diagonal residual is the exact one.

    Args:
        train: Of the split.
        seed: Of the split.
        smoke: Whether NeuralEF is to learn next to nothing.
    """
    common = {**LIKELIHOOD, "seed": seed}
    teacher = Training(300, 128, 1e-2, weight_decay=0.3, checks=5)
    if smoke:
        teacher = Training(steps=20, batch_size=32)
    neural = NeuralEF(20, num_inputs=1000, num_directions=128, width=64, teacher=teacher)
    inputs = train.tensors[0][:ROWS]

    def ella(eigenfunctions: Any, residual: str) -> Make:  # noqa: ANN401
        return lambda model: ELLA(
            model, eigenfunctions=eigenfunctions, residual=residual, **common
        )

    def full(model: nn.Module) -> Predictor:
        nystrom = Nystrom(full_rank(model, inputs), ROWS, outputs="all")
        return ella(nystrom, "diag")(model)

    return {
        "MAP": lambda model: MAP(model, **common),
        "MAP, σ² tuned": lambda model: TemperatureScaling(model, **common),
        "last-layer Laplace, full": lambda m: LastLayerLaplace(m, structure="full", **common),
        "last-layer Laplace, Kronecker": lambda m: LastLayerLaplace(m, structure="kron", **common),
        "Kronecker Laplace": lambda model: KroneckerLaplace(model, **common),
        "linearized Laplace, dense": lambda m: ELLA(m, eigenfunctions=AllWeights(), **common),
        "ELLA, Nyström k = 20, no residual": ella(Nystrom(20), "none"),
        "ELLA, Nyström k = 20": ella(Nystrom(20), "diag"),
        "ELLA, Nyström, full rank": full,
        "ELLA, NeuralEF k = 20": ella(neural, "diag"),
    }


@cache
def networks(name: str, root: Path, smoke: bool) -> list[nn.Module]:
    """The networks of all splits of a data set, trained at once."""
    data = load_uci(name, root)
    train = [uci_task(data, i).train for i in range(len(data.splits))]
    n = len(train[0])
    batch_size, epochs = (32, 100) if n < 1000 else (64, 100) if n < 2000 else (128, 40)
    if n > 20_000:
        batch_size = 512
    if smoke:
        epochs = 1
    return train_regressors(
        train, data.num_hidden, epochs=epochs, batch_size=batch_size, **LEARNING
    )


def run_split(split: Split, root: Path, *, smoke: bool) -> list[dict[str, Any]]:
    """Rows of all methods on one split."""
    data = load_uci(split.dataset, root)
    model = networks(split.dataset, root, smoke)[split.index]
    task = uci_task(data, split.index)
    rows = []
    for name, make in uci_methods(task.train, split.index, smoke=smoke).items():
        row = {"dataset": split.dataset, "split": split.index, "method": name}
        row |= {"num_examples": len(data.x), "num_features": data.x.shape[1]}
        rows.append(row | run_method(make, model, task))
    return rows


def run_method(make: Make, model: nn.Module, task: RegressionTask) -> dict[str, Any]:
    """Fit, tune and score one method."""
    train, val = loader_of(task.train), loader_of(task.val)
    method, fit_seconds = cpu_timed(lambda: make(model).fit(train))
    with warnings.catch_warnings():
        # The row tells δ and whether it lies at the edge.
        warnings.filterwarnings("ignore", "calibrate: ")
        method, tune_seconds = cpu_timed(lambda: method.calibrate(val))
    x, y = task.test.tensors
    scores = gaussian_scores(*predictive(method, x), y[:, 0], task.target_scale)
    assert method.hyperparameters is not None
    chosen = asdict(method.hyperparameters)
    chosen |= {"at_edge": "prior_precision" in method.tuning.edges} if method.tuning else {}
    return {**scores, "fit_seconds": fit_seconds, "tune_seconds": tune_seconds, **chosen}


def run_uci(settings: Settings) -> None:
    """Run the splits that the result file lacks."""
    root, path = data_root(settings.root), settings.out / "uci.json"
    rows = load_results(path)["rows"] if path.exists() else []
    done = {Split(row["dataset"], row["split"]) for row in rows}
    for split in tqdm([s for s in wanted_splits(settings, root) if s not in done], desc="splits"):
        rows += run_split(split, root, smoke=settings.smoke)
        names = sorted({row["dataset"] for row in rows})
        published = {name: load_uci(name, root).dropout for name in names}
        save_results(path, {**kept_settings(settings), "published": published}, rows)
    print(uci_table(load_results(path)))


def wanted_splits(settings: Settings, root: Path) -> Iterator[Split]:
    """The first `ROUND` splits of each data set, then the next ones of each, and so on."""
    counts = {
        name: min(settings.splits, len(load_uci(name, root).splits)) for name in settings.datasets
    }
    for start in range(0, settings.splits, ROUND):
        for name, count in counts.items():
            for index in range(start, min(start + ROUND, count)):
                yield Split(name, index)


# --- Toy curves -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Toy:
    """A data set on the line.

    Attributes:
        x: Inputs, shape (n, 1).
        y: Targets, shape (n, 1).
        grid: Where to predict, shape (m, 1), well beyond the data.
        noise_variance: σ², or None for the mean square of the network's residuals.
    """

    x: Tensor
    y: Tensor
    grid: Tensor
    noise_variance: float | None

    def near(self) -> Tensor:
        """Which points of the grid have a training input within 5 % of the data's range."""
        reach = 0.05 * (self.x.max() - self.x.min())
        return torch.cdist(self.grid, self.x).min(1).values <= reach


def sixteen_points(seed: int = 0) -> Toy:
    """16 points in two clusters: y = sin 2x plus noise of standard deviation 0.2."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(8, 2, generator=generator, dtype=torch.float64)
    x = (draws + torch.tensor([-2.0, 1.0])).T.reshape(-1, 1)
    noise = torch.randn(16, 1, generator=generator, dtype=torch.float64)
    grid = torch.linspace(-3, 3, 301, dtype=torch.float64).unsqueeze(1)
    return Toy(x, (2 * x).sin() + 0.2 * noise, grid, 0.04)


def snelson(root: Path) -> Toy:
    """The 200 points of Snelson & Ghahramani, Sparse Gaussian Processes (2006), centred."""
    with np.load(root / "toy1d" / "snelson1d.npz") as stored:
        x, y = (torch.from_numpy(stored[name]) for name in ("X", "Y"))
    grid = torch.linspace(-5, 5, 501, dtype=torch.float64).unsqueeze(1)
    return Toy(x - x.mean(), y - y.mean(), grid, None)


@dataclass(frozen=True)
class Spread:
    """Replaces inputs by draws from an interval, to learn eigenfunctions in all of it.

    Attributes:
        low: Its lower end.
        high: Its upper end.
    """

    low: float
    high: float

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """See `Augmentation`; Jacobians need no labels, so any input will do."""
        draws = torch.rand(x.shape, generator=generator, dtype=x.dtype)
        return self.low + (self.high - self.low) * draws


def toy_network(toy: Toy, seed: int, *, smoke: bool) -> nn.Module:
    """One hidden layer of 50 tanh units, in float64."""
    network = nn.Sequential(nn.Linear(1, 50), nn.Tanh(), nn.Linear(50, 1)).double()
    initialize(network, torch.Generator().manual_seed(seed))
    epochs = 20 if smoke else 16_000 // len(toy.x)
    data = TensorDataset(toy.x, toy.y)
    return train_network(network, data, F.mse_loss, seed, epochs, batch_size=32, **LEARNING)


def toy_methods(toy: Toy, rank: int, *, smoke: bool) -> dict[str, tuple[Any, str]]:
    """Eigenfunctions and residual by name.

    Args:
        toy: The data.
        rank: Number of directions that all training inputs span.
        smoke: Whether NeuralEF is to learn next to nothing.
    """
    found: dict[str, tuple[Any, str]] = {}
    for k, residual in itertools.product((2, 5, rank), ("none", "diag")):
        what = "full rank" if k == rank else f"k = {k}"
        ending = ", no residual" if residual == "none" else ""
        found[f"Nyström, {what}{ending}"] = (Nystrom(k, len(toy.x), outputs="all"), residual)
    found["last layer"] = (LastLayer(), "none")
    low, high = toy.grid.min().item(), toy.grid.max().item()
    training = Training(20 if smoke else 800, 128, 1e-2, checks=5)

    def neural(augment: Augmentation | None) -> NeuralEF:
        return NeuralEF(10, num_inputs=1000, augment=augment, width=64, teacher=training)

    return found | {
        "NeuralEF, training inputs perturbed": (neural(Perturb()), "diag"),
        "NeuralEF, inputs from the whole axis": (neural(Spread(low, high)), "diag"),
        "NeuralEF, the same, no residual": (neural(Spread(low, high)), "none"),
    }


@dataclass(frozen=True)
class Curves:
    """What is drawn and compared: every method at one network, δ and σ².

    Attributes:
        toy: The data.
        mean: f on the grid, shape (m,).
        noise_variance: σ².
        prior_precision: δ.
        exact: Predictive standard deviations of the dense reference, shape (m,).
        found: The same by method.
    """

    toy: Toy
    mean: Tensor
    noise_variance: float
    prior_precision: float
    exact: Tensor
    found: dict[str, Tensor]

    def rows(self) -> list[dict[str, Any]]:
        """Mean absolute and worst relative error, near the data and far from them."""
        near = self.toy.near()
        rows = []
        for method, deviation in self.found.items():
            row: dict[str, Any] = {"method": method, "noise_variance": self.noise_variance}
            row["prior_precision"] = self.prior_precision
            error = (deviation - self.exact).abs()
            for region, where in (("near", near), ("far", ~near)):
                row[f"mean_{region}"] = error[where].mean().item()
                row[f"worst_{region}"] = (error / self.exact)[where].max().item()
            rows.append(row)
        return rows


def toy_curves(toy: Toy, seed: int, *, smoke: bool) -> dict[str, Curves]:
    """Every method, fitted once, at the δ of each of the `RULES`."""
    model = toy_network(toy, seed, smoke=smoke)
    train = loader_of(TensorDataset(toy.x, toy.y))
    common = {**LIKELIHOOD, "seed": seed, "noise_variance": toy.noise_variance}
    dense = ELLA(model, eigenfunctions=AllWeights(), residual="none", **common).fit(train)
    assert dense.hyperparameters is not None
    noise = dense.hyperparameters.noise_variance
    grid = (10 ** (i / 4) for i in range(-16, 17))
    chosen = (
        dense.hyperparameters.prior_precision,
        max(grid, key=dense.log_marginal_likelihood),
    )
    methods = {
        name: ELLA(model, eigenfunctions=method, residual=residual, **common).fit(train)
        for name, (method, residual) in toy_methods(
            toy, full_rank(model, toy.x), smoke=smoke
        ).items()
    }
    with torch.no_grad():
        mean = model(toy.grid)[:, 0]
    curves = {}
    for rule, precision in zip(RULES, chosen, strict=True):
        variance = dense_variance(model, toy.x, toy.grid, precision, noise)
        found = {"MAP": torch.full_like(variance, noise**0.5)}
        for name, method in methods.items():
            assert method.hyperparameters is not None
            method.hyperparameters = replace(method.hyperparameters, prior_precision=precision)
            found[name] = predictive(method, toy.grid)[1].sqrt()
        exact = (variance + noise).sqrt()
        curves[rule] = Curves(toy, mean, noise, precision, exact, found)
    return curves


def plot_curves(curves: dict[str, Curves], path: Path) -> None:
    """A row of panels for each of the curves: bands of two standard deviations."""
    first = next(iter(curves.values())).found
    shown = [name for name in first if "k = 5" in name or "k =" not in name]
    figure = new_figure(2.1 * len(shown), 2.2 * len(curves))
    panels = figure.subplots(len(curves), len(shown), sharex="row", sharey="row", squeeze=False)
    for row, (title, each) in zip(panels, curves.items(), strict=True):
        for panel, name in zip(row, shown, strict=True):
            _draw(panel, each, each.found[name])
        row[0].set_ylabel(title, fontsize=8)
    for panel, name in zip(panels[0], shown, strict=True):
        panel.set_title(name.replace(", ", ",\n", 1), fontsize=8)
    panels[0][0].legend(frameon=False, fontsize=6, loc="upper left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _draw(panel: Axes, curves: Curves, deviation: Tensor) -> None:
    x, mean = curves.toy.grid[:, 0], curves.mean
    low, high = mean - 2 * deviation, mean + 2 * deviation
    panel.fill_between(x, low, high, color=IN_COLOR, alpha=0.4, linewidth=0, label="method")
    bounds = [mean + sign * curves.exact for sign in (-2, 2)]
    for bound, label in zip(bounds, ("dense reference", None), strict=True):
        panel.plot(x, bound, color=OUT_COLOR, linewidth=0.8, linestyle="--", label=label)
    panel.plot(x, mean, color="black", linewidth=0.8)
    panel.plot(curves.toy.x[:, 0], curves.toy.y[:, 0], ".", color="black", markersize=2)
    lowest, highest = bounds[0].min().item(), bounds[1].max().item()
    margin = 0.2 * (highest - lowest)
    panel.set_ylim(lowest - margin, highest + margin)
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(labelsize=7)


def run_toy(settings: Settings) -> None:
    """Both toy sets; Snelson's is left out in a smoke test without a `--root`."""
    toys = {TOYS[0]: sixteen_points()}
    if settings.root or not settings.smoke:
        toys[TOYS[1]] = snelson(data_root(settings.root))
    rows, drawn = [], {}
    for name, toy in toys.items():
        for rule, curves in toy_curves(toy, settings.seed, smoke=settings.smoke).items():
            rows += [{"dataset": name, "rule": rule, **row} for row in curves.rows()]
            drawn[f"{name},\n{rule}"] = curves
    save_results(settings.out / "toy.json", kept_settings(settings), rows)
    plot_curves(drawn, settings.out / "toy-curves.png")
    print(toy_table(load_results(settings.out / "toy.json")))


def main(argv: list[str] | None = None) -> None:
    """Run one part and write its results."""
    settings = parsed(Settings, __doc__.splitlines()[0], argv)
    torch.set_num_threads(1)  # the networks are too small for threads to pay
    (run_uci if settings.part == "uci" else run_toy)(settings)


if __name__ == "__main__":
    main()
