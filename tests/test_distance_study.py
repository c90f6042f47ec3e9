"""The distance study: its rivals, its sets, its tables, and the loop that trains its like."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
KINDS = ("fog", "jpeg")
SOURCES = ("cats", "noise")


@pytest.fixture
def load(monkeypatch):
    """Imports a module of the experiments, and forgets it."""
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(EXPERIMENTS)
    loaded = []

    def by_name(name):
        loaded.append(name)
        return __import__(name)

    yield by_name
    for name in loaded:
        sys.modules.pop(name, None)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels_of(probs, seed=7):
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(probs, 1, generator=generator).squeeze(1)


def test_vector_scaling_finds_the_weights_that_drew_the_labels(load):
    module = load("_recalibrated")
    logits = 2 * normal(40_000, 3)
    weight, bias = torch.tensor([0.5, 1.0, 0.7]), torch.tensor([0.4, -0.4, 0.0])
    truth = (weight * logits + bias).softmax(1)
    found = module.vector_scaling(logits, labels_of(truth))(logits)
    torch.testing.assert_close(found, truth, atol=0.03, rtol=0)


def test_an_ensemble_of_temperatures_is_a_mixture_that_fits_no_worse(load):
    module = load("_recalibrated")
    logits = 4 * normal(20_000, 4)
    truth = 0.7 * (logits / 2).softmax(1) + 0.1 * logits.softmax(1) + 0.2 / 4
    y = labels_of(truth)
    one, three = (
        fit(logits, y)(logits)
        for fit in (module.temperature_scaling, module.ensemble_temperature_scaling)
    )
    torch.testing.assert_close(three.sum(1), torch.ones(20_000).double())
    losses = [F.nll_loss(probs.log(), y).item() for probs in (one, three, truth)]
    assert losses[1] < losses[0] - 0.01
    assert abs(losses[1] - losses[2]) < 0.01


def test_the_best_temperature_is_the_one_that_drew_the_labels(load):
    module = load("_recalibrated")
    logits = 3 * normal(40_000, 4)
    found = module.best_temperature(logits, labels_of((logits / 1.7).softmax(1)))
    assert found.item() == pytest.approx(1.7, rel=0.03)


@pytest.fixture
def known(load):
    pytest.importorskip("pytorch_ood")
    module = load("_detectors")
    last = nn.Linear(12, 3)
    features = normal(300, 12).float().relu()
    with torch.no_grad():
        read = module.Read(features, last(features))
    labels = torch.arange(300) % 3
    return module, module.Known(read, labels, last)


@torch.no_grad()
def test_every_detector_scores_every_image(known):
    module, training = known
    for name, scores in module.detectors(training).items():
        for setting, score in scores.items():
            found = score(training.read)
            assert found.shape == (300,), (name, setting)
            assert torch.isfinite(found).all(), (name, setting)


@torch.no_grad()
def test_detectors_by_their_formulas(known):
    module, training = known
    scores, read = module.detectors(training), training.read
    far = module.Read(5 + read.features, read.logits)
    score = scores["class Mahalanobis"][""]
    assert score(far).min() > score(read).max()
    unit = F.normalize(read.features, dim=1)
    nearest = torch.cdist(unit[:5], unit).sort(1).values[:, 19]
    found = scores["kNN, k = 20"][""](module.Read(read.features[:5], read.logits[:5]))
    torch.testing.assert_close(found.float(), nearest, atol=1e-3, rtol=1e-3)
    row = read.logits[0] - read.logits[0].mean()
    expected = -row.max() / row.abs().pow(3).sum() ** (1 / 3)
    torch.testing.assert_close(module.p_norm(3)(read)[0], expected)


def test_settings_are_chosen_by_what_they_are_for(known):
    module, _ = known
    inside = {"tells": torch.arange(4.0), "ranks": torch.tensor([3.0, 0.0, 1.0, 2.0])}
    changed = {"tells": torch.arange(4.0) + 10, "ranks": torch.zeros(4)}
    assert module.best_detecting(inside, changed) == "tells"
    wrong = torch.tensor([True, False, False, False])
    assert module.best_ranking(inside, wrong) == "ranks"


@pytest.mark.parametrize("score", ["aps", "raps"])
def test_sets_cover_as_often_as_they_promise(load, score):
    pytest.importorskip("mapie")
    module = load("_sets")
    truth = (3 * normal(14_000, 6)).softmax(1)
    y, said = labels_of(truth), truth.sqrt() / truth.sqrt().sum(1, keepdim=True)
    sets = {
        name: module.conformal_sets((probs[:4000], y[:4000]), probs[4000:], score, 0)
        for name, probs in (("truth", truth), ("vague", said))
    }
    for found in sets.values():
        hit = found[torch.arange(10_000), y[4000:]].double().mean(0)
        for covered, level in zip(hit.tolist(), module.LEVELS, strict=True):
            assert covered == pytest.approx(level, abs=0.015)
    sizes = {name: found.sum(1).double().mean(0) for name, found in sets.items()}
    if score == "aps":
        assert (sizes["truth"] < sizes["vague"]).all()


def test_a_tuning_that_others_begin_with_runs_once(load):
    pytest.importorskip("laplace")
    module = load("distance")

    class Method:
        def __init__(self, evaluation):
            self.evaluation, self.tuned = evaluation, None

        def copied(self, like):
            found = Method(self.evaluation)
            found.tuned = like.tuned
            return found

    calls = []

    def tuning(method, rows, labels):
        calls.append(rows)
        method.tuned = rows.sum().item()
        return method

    once, evaluation = module.Once(tuning), object()
    first, other = torch.arange(3), torch.arange(4)
    results = [once(Method(evaluation), rows, None) for rows in (first, other, first)]
    assert [each.tuned for each in results] == [3, 6, 3]
    assert len(calls) == 2
    assert results[0] is not results[2]


def test_training_is_adamw_on_a_cycle_over_shuffled_batches(load):
    module = load("_models")
    x, y = normal(20, 3).float(), torch.arange(20) % 2
    models = [nn.Linear(3, 2) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    module.fine_tune(
        models[0],
        TensorDataset(x, y),
        F.cross_entropy,
        torch.Generator().manual_seed(1),
        epochs=3,
        learning_rate=0.1,
        batch_size=8,
        weight_decay=0.1,
    )
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(models[1].parameters(), 0.1, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=9)
    for _ in range(3):
        for rows in torch.randperm(20, generator=generator).tensor_split(3):
            optimizer.zero_grad()
            F.cross_entropy(models[1](x[rows]), y[rows]).backward()
            optimizer.step()
            schedule.step()
    torch.testing.assert_close(models[0].weight, models[1].weight)
    assert not models[0].training
    assert models[0].weight.grad is None


# Tables


@pytest.fixture
def tables(load, tmp_path, monkeypatch):
    """Tables of a study of one network, in which the term brings what it should, but for AURC."""
    module = load("_distance_tables")
    monkeypatch.setattr(module, "CORRUPTIONS", KINDS)
    study = sys.modules["_study"]
    sizes = ("seeds", "num_inputs", "fit_on", "num_ood", "num_shift", "num_test")
    settings = {"first_seed": 10, **dict.fromkeys(sizes, 2000), "seeds": 2}
    machine = {"torch": "2", "gpu": None, "cpus": 2, "threads": 1}
    calibration, ood, shift, sets = [], [], [], []
    for i, method in enumerate(module.METHODS):
        who = {"arch": "resnet20", "method": method}
        aurc = {"aurc confidence_deficit": 0.009, f"aurc {module.P_NORM}": 0.0089}
        row = {**who, "nll": 0.2 + 0.0002 * i, "ece": 0.01 - 0.001 * i, **aurc}
        calibration += [{**row, "seed": s, "predict_ratio": 1.0} for s in (10, 11)]
        for source in SOURCES:
            for score in ("entropy", "energy", "corrected_energy", "distance"):
                auroc = 0.9 + 0.02 * i if score == "entropy" else 0.91
                ood.append({**who, "source": source, "score": score, "auroc": [auroc] * 2})
        for kind in KINDS:
            worse = 0.5 if (kind, i) == ("fog", 3) else 0.0
            for severity in range(1, 6):
                found = {"nll": [1 - 0.1 * i + worse] * 2, "ece": [0.1 - 0.01 * i] * 2}
                shift.append({**who, "corruption": kind, "severity": severity, **found})
        cells = {f"{w} {g}": [1.5, 1.7] for g in module.GROUPS for w in ("size", "coverage")}
        sets.append({**who, "score": "aps", "level": 0.95, **cells})
    plain = {"arch": "resnet20", "method": "kNN", "seed": 10, "aurc": 0.02}
    rivals = [{**plain, **{f"auroc {source}": 0.7 for source in SOURCES}}]
    places = [f"{kind} {severity}" for kind in KINDS for severity in range(1, 6)]
    shifts = {f"{key} {place}": 0.3 for key in ("nll", "ece") for place in places}
    rivals.append({**rivals[0], "method": "vector", "nll": 0.21, "ece": 0.02, **shifts})
    written = {"calibration": calibration, "ood": ood, "shift": shift, "sets": sets}
    for measure, rows in {**written, "rivals": rivals}.items():
        content = {"settings": settings, "environment": machine, "rows": rows}
        (tmp_path / f"{measure}-resnet20.json").write_text(json.dumps(content))
    found = study.Study(tmp_path)
    return {name: make(found) for name, make in module.TABLES.items()}


def cells(table):
    lines = [line.strip("| ").split(" | ") for line in table.splitlines() if "|" in line]
    return {line[0]: dict(zip(lines[0][1:], line[1:], strict=True)) for line in lines[2:]}


def test_goals_are_judged_one_by_one(tables):
    found = cells(tables["goals"])
    own, perturbed = "ELLA + D, ResNet-20", "ELLA + D, perturbed, ResNet-20"
    assert found["NLL above ELLA's without the term"][own] == "+0.0002"
    assert found["mean AUROC of the entropy"][own] == "0.9600"
    shifts = found["corruptions below temperature scaling in NLL, in ECE"]
    assert (shifts[own], shifts[perturbed]) == ("**1, 2**", "2, 2")
    assert found["ECE above temperature scaling's"][own] == "-0.0030"
    assert found["AURC · 10³ above the p-norm's"][own] == "**+0.10**"


def test_methods_are_compared_with_temperature_scaling(tables):
    lines = [line.split(" | ") for line in tables["methods"].splitlines()]
    own = next(line for line in lines if line[1:2] == ["ELLA + D"])
    assert own[2:6] == ["0.2006", "0.0070", "9.00", "8.90"]
    assert own[-3:-1] == ["1", "2"]
    assert "Seeds 10 to 11; 2,000 images" in tables["methods"]


def test_rivals_and_our_scores_stand_in_one_table(tables):
    found = cells(tables["rivals"])
    assert found["kNN"]["AURC · 10³, ResNet-20"] == "20.00"
    assert found["kNN"]["AUROC, ResNet-20"] == "0.7000"
    assert found["ELLA + D, norms kept: entropy"]["cats"] == "**1.000**"
    assert cells(tables["recalibrated"])["vector"]["NLL, shift"] == "**0.3000**"


def test_sets_are_means_over_seeds(tables):
    assert cells(tables["sets"])["APS, 0.95: ELLA"]["size, all"] == "1.60"
