"""The CIFAR-10 study: early stopping, what is kept on disk, and going on where it stopped."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cases import loader_of, make_case

from ella import ELLA, NeuralEF, Nystrom, Training
from ella.linearize import Linearized

EXPERIMENTS = Path(__file__).parent.parent / "experiments"


@pytest.fixture
def suite(monkeypatch):
    pytest.importorskip("laplace")
    monkeypatch.syspath_prepend(EXPERIMENTS)
    yield __import__("_suite")
    for name in ("_suite", "_families", "_store", "_images"):
        sys.modules.pop(name, None)


@pytest.fixture
def families(suite):
    return __import__("_families")


def test_early_stopping_is_a_temperature(families):
    """Stopping after n of N examples with the prior scaled by n/N, G growing evenly, by hand."""
    case = make_case("mlp", n=40)
    loader = loader_of(case.x, case.y)
    ella = ELLA(case.model, eigenfunctions=Nystrom(4), residual="none", progress=False)
    known = ella.fit(loader).evaluated(loader)
    rows = torch.arange(40)
    found = families.stopped_early(known, rows, case.y, fitted_on=40, num_train=8000)
    prior = ella.features(case.x)
    logits, phi = prior.mean, prior.factor
    total = ella.curvature * (8000 / 40)  # G of all N, of which 40 were seen
    nlls = {}
    for n in range(1000, 8001, 1000):
        share = n / 8000
        covariance = torch.linalg.inv(share * total + share * 25 * torch.eye(4))
        spread = phi @ torch.linalg.cholesky(covariance)
        normals = torch.randn(20000, 4, generator=torch.Generator().manual_seed(0)).double()
        draws = logits + torch.einsum("nck,sk->snc", spread, normals)
        nlls[n] = -draws.softmax(-1).mean(0)[rows, case.y].log().mean().item()
    chosen = 40 / found.hyperparameters.temperature
    assert chosen in nlls
    assert nlls[chosen] == pytest.approx(min(nlls.values()), abs=2e-3)
    best = found.predict_proba(rows, n_samples=2000)[rows, case.y].log().mean().item()
    assert -best == pytest.approx(nlls[chosen], abs=2e-3)


def test_finished_units_are_not_run_again(suite, families, tmp_path, monkeypatch):
    settings = families.MethodSettings(
        archs=("resnet20",),
        seeds=1,
        smoke=True,
        device="cpu",
        only="temperature|full",
        out=tmp_path,
    )
    found = families.families(settings)
    monkeypatch.setattr(suite, "Data", lambda settings: SimpleNamespace(root=tmp_path))
    monkeypatch.setattr(suite.Network, "published", lambda name, *_: SimpleNamespace(name=name))
    ran, killed = [], []

    def run(unit, settings, data, wanted):
        if "MAP" not in unit.family.tunings and not killed:
            killed.append(True)
            raise KeyboardInterrupt
        ran.extend(unit.family.tunings)
        rows = [{"arch": unit.network.name, "method": name} for name in unit.family.tunings]
        return {measure: list(rows) for measure in wanted}

    monkeypatch.setattr(suite.Unit, "run", run)
    with pytest.raises(KeyboardInterrupt):
        suite.run_suite(settings, found)
    suite.run_suite(settings, found)
    assert ran == ["MAP", "temperature scaling", "last-layer Laplace, full"]
    suite.run_suite(replace(settings, only=None), found, {"ood": suite.MEASURES["ood"]})
    assert ran.count("MAP") == 1
    assert "ELLA, NeuralEF" in ran
    settings = replace(settings, num_test=20)
    with pytest.raises(ValueError, match="made with another num_test"):
        suite.run_suite(settings, found)


def test_ensemble_is_the_mean_of_probabilities(suite):
    members = [torch.nn.Linear(3, 4) for _ in range(3)]
    x = torch.randn(5, 3)
    mean = torch.stack([member(x).softmax(1) for member in members]).mean(0)
    torch.testing.assert_close(suite.Ensemble(members)(x).softmax(1), mean)


class Digits(torch.nn.Module):
    """A small classifier with a last layer `fc`, as the published networks have."""

    def __init__(self):
        super().__init__()
        self.hidden = torch.nn.Linear(64, 12)
        self.fc = torch.nn.Linear(12, 4)

    def forward(self, x):
        return self.fc(self.hidden(x).tanh())


@pytest.fixture
def kept(suite, tmp_path):
    torch.manual_seed(0)
    x, y = torch.randn(60, 64), torch.arange(60) % 4
    store = __import__("_store").Store(tmp_path)
    return Digits(), loader_of(x, y), x, store


def test_kept_passes_give_what_the_plain_methods_give(suite, families, kept, monkeypatch):
    """Whatever is read from disk: the same features, of every rank and residual, and networks."""
    model, loader, x, store = kept
    quiet = {"progress": False}
    large = Nystrom(8, 30, residual="exact")
    for rank, residual in ((8, "exact"), (4, "diag"), (3, "none")):
        plain = ELLA(model, eigenfunctions=Nystrom(rank, 30), residual=residual, **quiet)
        once = families.ProjectedOnce(large, rank, store)
        found = ELLA(model, eigenfunctions=once, residual=residual, **quiet).fit(loader)
        expected = plain.fit(loader).logits(x)[1]
        torch.testing.assert_close(found.logits(x)[1], expected, rtol=1e-3, atol=1e-5)
        with store.closed():
            torch.testing.assert_close(found.logits(x)[1], expected, rtol=1e-3, atol=1e-5)
        assert found.state_bytes == plain.state_bytes
    neural = NeuralEF(rank=4, num_inputs=60, num_directions=16, teacher=Training(steps=20))
    expected = ELLA(model, eigenfunctions=neural, **quiet).fit(loader).predict_proba(x)
    for _ in range(2):  # made, then read
        once = families.SampledOnce(neural, store)
        found = ELLA(model, eigenfunctions=once, **quiet).fit(loader)
        torch.testing.assert_close(found.predict_proba(x), expected)
    body = suite.KeptBody(model, store)
    for _ in range(2):
        torch.testing.assert_close(body(x), model(x))

    other = torch.randn(9, 64)
    expected = model(other)
    found.evaluated([other])  # activations, of which what the last layer reads is a part

    def refuse(*_):
        raise AssertionError("computed again")

    monkeypatch.setattr(Linearized, "jacobian", refuse)
    again = families.ProjectedOnce(large, 5, store)
    ELLA(model, eigenfunctions=again, **quiet).fit(loader)
    monkeypatch.setattr(model.hidden, "forward", refuse)
    body(x)
    torch.testing.assert_close(body(other), expected)
    assert store.seconds > 0
    assert store.bytes > 0


@pytest.mark.slow
def test_study_of_one_network(suite, tmp_path, monkeypatch):
    if not os.environ.get("ELLA_DATA"):
        pytest.skip("needs real data: set ELLA_DATA to the data folder")
    sizes = ["fit-on", "fit-slow-on", "num-inputs", "num-cropped", "num-test", "num-rows"]
    options = [each for size in sizes for each in (f"--{size}", "60")]
    options += ["--num-ood", "20", "--num-shift", "20", "--seeds", "1"]
    options += ["--only", "MAP|Nyström k|NeuralEF", "--smoke", "--slow", "--out", str(tmp_path)]
    module = __import__("calibration")
    module.main(["--suite", "cifar10", "--archs", "resnet20", "ensemble", *options])
    for measure in suite.MEASURES:
        rows = json.loads((tmp_path / f"{measure}-resnet20.json").read_text())["rows"]
        assert "ELLA, NeuralEF, factor" in {row["method"] for row in rows}
        assert (tmp_path / f"{measure}-ensemble.json").exists()
    sys.modules.pop("calibration")
