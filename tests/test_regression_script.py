"""The regression experiment: its protocol, its references, its tables, and that it runs."""

import json
import math
import os
from pathlib import Path

import pytest
import reference
import torch
from torch import nn
from torch.utils.data import TensorDataset

from ella import ELLA, Nystrom

SETTINGS = {"likelihood": "regression", "progress": False}
NOISE_VARIANCE, PRECISION = 0.04, 0.3


def data_folder():
    if "ELLA_DATA" not in os.environ:
        pytest.skip("needs real data: set ELLA_DATA to the data folder")
    return Path(os.environ["ELLA_DATA"])


def small_problem(n=12):
    """A tanh network on the line with weights of some size, and n points."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)).double()
        x = torch.linspace(-1, 1, n, dtype=torch.float64).unsqueeze(1)
        y = (3 * x).sin() + 0.1 * torch.randn_like(x)
    return model, x, y, torch.linspace(-3, 3, 31, dtype=torch.float64).unsqueeze(1)


def test_dense_reference_is_the_definition(load):
    model, x, _, grid = small_problem()
    found = load("_regression").dense_variance(model, x, grid, PRECISION, NOISE_VARIANCE)
    outputs, jacobian = reference.dense_jacobian(model, x)
    ggn = reference.dense_ggn(jacobian, reference.gaussian_hessian(outputs, NOISE_VARIANCE))
    covariance = reference.lla_covariance(reference.dense_jacobian(model, grid)[1], ggn, PRECISION)
    torch.testing.assert_close(found, covariance[:, 0, 0])


def test_full_rank_nystrom_equals_dense_linearized_laplace(load):
    script = load("_regression")
    model, x, y, grid = small_problem()
    loader = script.loader_of(TensorDataset(x, y), batch_size=5)
    common = {**SETTINGS, "prior_precision": PRECISION, "noise_variance": NOISE_VARIANCE}
    expected = script.dense_variance(model, x, grid, PRECISION, NOISE_VARIANCE) + NOISE_VARIANCE

    def variance(eigenfunctions, residual):
        ella = ELLA(model, eigenfunctions=eigenfunctions, residual=residual, **common)
        return script.predictive(ella.fit(loader), grid)[1]

    rank = script.full_rank(model, x)
    squares = torch.linalg.svdvals(reference.dense_jacobian(model, x)[1][:, 0]).square()
    assert rank == (squares > len(x) * torch.finfo(squares.dtype).eps * squares[0]).sum()
    full = variance(Nystrom(rank, len(x), outputs="all"), "diag")
    torch.testing.assert_close(full, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(variance(script.AllWeights(), "none"), expected)
    # Less than that: the residual errs above, dropping it errs below.
    few = Nystrom(3, len(x), outputs="all")
    assert (variance(few, "diag") >= expected * (1 - 1e-9)).all()
    assert (variance(few, "none") <= expected * (1 + 1e-9)).all()
    assert (variance(few, "none") < expected - 0.1).any()


def test_stacked_networks_train_as_if_alone(load, monkeypatch):
    script, models = load("_regression"), load("_models")
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(2, 20, 4, generator=generator, dtype=torch.float64)
    data = [TensorDataset(each[:, :3], each[:, 3:]) for each in draws]
    options = {"epochs": 3, "batch_size": 8, "learning_rate": 0.05, "weight_decay": 0.01}
    together = script.train_regressors(data, 4, **options)
    for seed, (each, network) in enumerate(zip(data, together, strict=True)):
        alone = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1)).double()
        models.initialize(alone, torch.Generator().manual_seed(seed))
        start = {name: value.clone() for name, value in alone.state_dict().items()}
        with monkeypatch.context() as patch:
            # It would draw the weights from the generator that shuffles.
            patch.setattr(models, "initialize", lambda model, generator: None)
            models.train_network(alone, each, nn.functional.mse_loss, **options)
        for name, value in alone.state_dict().items():
            torch.testing.assert_close(network.state_dict()[name], value)
            assert not torch.equal(value, start[name])


def test_scores_are_those_of_the_original_units(load):
    generator = torch.Generator().manual_seed(0)
    mean, y = torch.randn(2, 500, generator=generator, dtype=torch.float64)
    variance = 0.5 + torch.rand(500, generator=generator, dtype=torch.float64)
    scores = load("_regression").gaussian_scores(mean, variance, y, target_scale=7.0)
    normal = torch.distributions.Normal(7 * mean, 7 * variance.sqrt())
    assert scores["log_likelihood"] == pytest.approx(normal.log_prob(7 * y).mean().item())
    assert scores["rmse"] == pytest.approx((7 * (mean - y)).square().mean().sqrt().item())
    inside = (normal.cdf(7 * y) - 0.5).abs() < 0.475
    assert scores["coverage"] == inside.double().mean().item()


def test_standardised_on_the_fitted_rows_alone(load):
    x = torch.rand(30, 3, dtype=torch.float64) * 5 + 2
    x[:, 1] = 4  # a constant input, as the naval data have
    y = torch.rand(30, 1, dtype=torch.float64) * 9
    train, val, test = torch.arange(30).split([20, 4, 6])
    task = load("_regression").standardized(x, y, train, val, test)
    fitted_x, fitted_y = task.train.tensors
    assert fitted_x.mean(0).abs().max() < 1e-12
    torch.testing.assert_close(fitted_x.std(0), torch.tensor([1.0, 0, 1]).double())
    assert fitted_y.std().item() == pytest.approx(1)
    others = task.test.tensors[1] - task.val.tensors[1][0]
    torch.testing.assert_close(others * task.target_scale, y[test] - y[val][0])


def uci_results(shift=0.0):
    def row(dataset, split, method, value):
        numbers = {"log_likelihood": value, "rmse": 2.0 + split + shift * (method == "MAP")}
        sizes = {"num_examples": 1500, "num_features": 4}
        return {"dataset": dataset, "split": split, "method": method, **numbers, **sizes}

    rows = [
        row(dataset, split, method, value + split)
        for dataset in ("yacht", "wine")
        for split in (0, 1)
        for method, value in (("MAP", -2.0), ("ELLA, NeuralEF k = 20", -1.5))
    ]
    published = {"log_likelihood": [-0.5, -0.7, 9.0], "rmse": [1.0, 3.0, 9.0]}
    return {"rows": rows, "settings": {"published": {"yacht": published, "wine": published}}}


def test_uci_table(load):
    script = load("_regression")
    head, _, yacht, wine = script.uci_table(uci_results()).splitlines()
    assert head.count("|") == yacht.count("|") == wine.count("|") == 10
    cells = [cell.strip() for cell in yacht.strip("|").split("|")]
    assert cells[:4] == ["yacht", "1,500", "4", "2"]
    # Mean and standard error of two values one apart: ± 0.5.
    assert cells[4:6] == ["-1.500 ± 0.500", "**-1.000 ± 0.500**"]
    # Published figures of the same splits only.
    assert cells[6:] == ["-0.600 ± 0.100", "2.50 ± 0.50", "2.00 ± 1.00"]
    with pytest.raises(ValueError, match="do not share the mean"):
        script.uci_table(uci_results(shift=0.1))
    lacking = uci_results()
    lacking["rows"].pop()
    with pytest.raises(ValueError, match="was run on the splits"):
        script.uci_table(lacking)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_smoke_toy(load, tmp_path, capsys):
    load("regression").main(["toy", "--smoke", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "toy.json").read_text())["rows"]
    errors = {row["method"]: row for row in rows}
    assert errors["Nyström, full rank"]["worst_far"] < 1e-6
    assert errors["Nyström, k = 2"]["worst_near"] > 1e-3
    assert (tmp_path / "toy-curves.png").stat().st_size > 5000
    assert "Nyström, full rank" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_smoke_uci_goes_on_where_it_stopped(load, tmp_path, capsys):
    pytest.importorskip("laplace")
    root = data_folder()
    script = load("regression")
    options = ["uci", "--smoke", "--root", str(root), "--datasets", "yacht"]
    script.main([*options, "--splits", "1", "--out", str(tmp_path)])
    first = json.loads((tmp_path / "uci.json").read_text())["rows"]
    assert {row["split"] for row in first} == {0}
    assert all(math.isfinite(row["log_likelihood"]) for row in first)
    script.main([*options, "--splits", "2", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "uci.json").read_text())["rows"]
    assert rows[: len(first)] == first  # with the same seconds: not run again
    assert len(rows) == 2 * len(first)


def test_splits_are_disjoint_and_cover_the_data(load):
    script = load("_regression")
    data = script.load_uci("yacht", data_folder())
    assert data.x.shape == (308, 6)
    assert len(data.splits) == len(data.dropout["rmse"]) == 20
    for train, test in data.splits:
        assert torch.equal(torch.cat([train, test]).sort().values, torch.arange(308))
    task = script.uci_task(data, 3)
    assert [len(part) for part in (task.train, task.val, task.test)] == [249, 28, 31]


def test_missing_archive_is_named(load, tmp_path):
    with pytest.raises(FileNotFoundError, match="yaringal"):
        load("_regression").load_uci("yacht", tmp_path)
