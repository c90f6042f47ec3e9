"""The CIFAR-10 study: early stopping, wide tables, and going on where it stopped."""

import argparse
import os
import sys
from pathlib import Path

import pytest
import torch
from cases import loader_of, make_case

from ella import ELLA, Nystrom

EXPERIMENTS = Path(__file__).parent.parent / "experiments"


@pytest.fixture
def suite(monkeypatch):
    pytest.importorskip("laplace")
    monkeypatch.syspath_prepend(EXPERIMENTS)
    yield __import__("_suite")
    sys.modules.pop("_suite")


def test_early_stopping_is_a_temperature(suite):
    """Stopping after n of N examples with the prior scaled by n/N, G growing evenly, by hand."""
    case = make_case("mlp", n=40)
    loader = loader_of(case.x, case.y)
    ella = ELLA(case.model, eigenfunctions=Nystrom(4), residual="none", progress=False)
    known = ella.fit(loader).evaluated(loader)
    rows = torch.arange(40)
    found = suite.stopped_early(known, rows, case.y, fitted_on=40, num_train=8000)
    logits, phi, _ = ella.features(case.x)
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


def test_pivot_makes_a_wide_row_of_each_method_and_seed(suite):
    rows = [
        {"method": "a", "seed": s, "arch": arch, "nll": s + i}
        for s in (0, 1)
        for i, arch in enumerate(("one", "two", "two"))
    ]
    wide, columns = suite.pivot(rows, "nll", "arch")
    assert columns == ["one", "two"]
    assert wide[1] == {"method": "a", "seed": 1, "one": 1.0, "two": 2.5}


SIZES = {
    "fit_on": 10,
    "num_inputs": 10,
    "num_cropped": 10,
    "num_test": 10,
    "num_ood": 10,
    "num_shift": 10,
    "seeds": 1,
    "first_seed": 0,
}


def test_finished_units_are_not_run_again(suite, tmp_path, monkeypatch):
    args = argparse.Namespace(
        **SIZES, archs=["one"], only="MAP|temperature", slow=False, smoke=True, out=tmp_path
    )
    monkeypatch.setattr(suite, "Data", lambda args: None)
    ran, killed = [], []

    def run(unit, args, data, wanted):
        if unit.name == "temperature scaling" and not killed:
            killed.append(True)
            raise KeyboardInterrupt
        ran.append(unit.name)
        named = {"arch": unit.arch, "method": unit.name, "seed": 0}
        return {measure: [named] for measure in wanted}

    monkeypatch.setattr(suite.Unit, "run", run)
    with pytest.raises(KeyboardInterrupt):
        suite.run_suite(args)
    suite.run_suite(args)
    assert ran == ["MAP", "temperature scaling"]
    suite.run_suite(argparse.Namespace(**{**vars(args), "only": None}), ["ood"])
    assert ran.count("MAP") == 1
    assert "ELLA, NeuralEF" in ran
    args.num_test = 20
    with pytest.raises(ValueError, match="made with another num_test"):
        suite.run_suite(args)


@pytest.mark.slow
def test_study_of_one_network(suite, tmp_path, monkeypatch):
    if not os.environ.get("ELLA_DATA"):
        pytest.skip("needs real data: set ELLA_DATA to the data folder")
    sizes = ["--fit-on", "60", "--num-inputs", "60", "--num-cropped", "60", "--num-test", "60"]
    sizes += ["--num-ood", "20", "--num-shift", "20", "--seeds", "1", "--only", "MAP|Nyström k"]
    module = __import__("ood")
    module.main(["--smoke", "--slow", "--archs", "resnet20", *sizes, "--out", str(tmp_path)])
    assert (tmp_path / "ood-suite.json").exists()
    sys.modules.pop("ood")
