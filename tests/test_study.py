"""Tables and figures of the CIFAR-10 study: the right numbers in the right cells."""

import json
import sys
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
METHODS = ("MAP", "temperature scaling", "ELLA, NeuralEF", "ELLA, NeuralEF, factor")
KINDS = ("fog", "jpeg")


@pytest.fixture
def study(monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(EXPERIMENTS)
    yield __import__("_study")
    sys.modules.pop("_study")


@pytest.fixture
def results(study, tmp_path):
    """Two networks and the ensemble. NLL is .3, .2, .19, .18 by method, less on the second net."""
    sizes = ("seeds", "num_test", "fit_on", "fit_slow_on", "num_inputs")
    settings = {"first_seed": 0, **dict.fromkeys(sizes, 2), "num_test": 10_000}
    machine = {"torch": "2", "gpu": None, "cpus": 2, "threads": 1}

    def write(measure, name, rows):
        content = {"settings": settings, "environment": machine, "rows": rows}
        (tmp_path / f"{measure}-{name}.json").write_text(json.dumps(content))

    for name, less in (("resnet20", 0.0), ("resnet32", 0.01), ("ensemble", 0.1)):
        calibration, ood, shift = [], [], []
        for i, method in enumerate(METHODS):
            if name == "ensemble" and i > 1:
                continue
            nll = (0.3, 0.2, 0.19, 0.18)[i] - less
            who = {"arch": name, "method": method}
            costs = {"fit_seconds": 1.0, "fit_bytes": 2**20, "predict_ratio": 1.1}
            for seed in range(2):
                both = {"nll": nll + 0.002 * seed, "ece": nll / 10, "risk": [0.0, 0.05]}
                rest = {key: 0.5 for key in study.METRICS if key not in both}
                row = {**who, "seed": seed, **both, **rest, **costs, "state_bytes": 8}
                calibration += [{**row, "protocol": letter} for letter in "AB"]
            for score in study.SCORES:
                auroc = 0.5 if i < 2 and score not in study.BASE_SCORES else 0.8 + 0.05 * i
                found = {"auroc": [auroc] * 2, "aupr": [0.7, 0.9], "fpr95": [0.3, 0.3]}
                ood += [{**who, "source": s, "score": score, **found} for s in ("cats", "noise")]
            for kind in KINDS:
                worse = 0.5 if kind == "jpeg" and i > 1 else 0.0  # ours loses on one of the two
                for severity in range(1, 6):
                    found = {"nll": [nll * severity + worse] * 2, "ece": [nll, nll + 0.02]}
                    shift.append({**who, "corruption": kind, "severity": severity, **found})
        for measure, rows in (("calibration", calibration), ("ood", ood), ("shift", shift)):
            write(measure, name, rows)
    return study.Study(tmp_path)


def cells(table):
    lines = [line.strip("| ").split(" | ") for line in table.splitlines()]
    return {line[0]: dict(zip(lines[0][1:], line[1:], strict=True)) for line in lines[2:]}


def test_protocol_a_has_the_published_figures_and_the_ensemble_as_references(study, results):
    table = cells(study.TABLES["protocol-a"](results))
    assert table["temperature scaling"]["NLL, ResNet-20"] == "0.2010"
    assert table["ELLA, NeuralEF, factor"]["NLL, ResNet-32"] == "**0.1710**"
    assert table["published ELLA, k = 20"]["NLL, ResNet-32"] == "0.2161"
    assert table["published best post-hoc (the goal)"]["ECE, ResNet-20"] == "0.0074"
    # Neither is a rival, so neither is bold; the ensemble stands under the last network.
    assert table["ensemble of the four"]["NLL, ResNet-20"] == "–"
    assert table["ensemble of the four, temperature scaling"]["NLL, ResNet-32"] == "0.1010"
    assert not any("published" in key for key in cells(study.TABLES["protocol-b"](results)))


def test_published_figures_are_not_set_beside_other_images(study, results):
    path = results.folder / "calibration-resnet20.json"
    content = json.loads(path.read_text())
    content["settings"]["num_test"] = 2000
    path.write_text(json.dumps(content))
    assert "published" not in study.TABLES["protocol-a"](results)


def test_means_are_over_networks_without_the_ensemble(study, results):
    assert cells(study.TABLES["metrics"](results))["MAP"]["NLL"] == "0.2960"
    shift = cells(study.TABLES["shift"](results))
    assert shift["MAP"]["NLL, severity 2"] == "0.5900"
    assert shift["MAP"]["ECE, severity 1"] == "0.3050"
    assert shift["ensemble of the four"]["NLL, severity 2"] == "0.4000"  # best, but not bold
    one = cells(study.TABLES["shift-corruptions"](results))["jpeg"]
    assert one["NLL, ELLA, NeuralEF"] == f"{3 * 0.185 + 0.5:.4f}"


def test_detection_leaves_out_scores_that_a_method_lacks(study, results):
    scores = cells(study.TABLES["ood-scores"](results))
    assert "temperature scaling: logit variance" not in scores
    assert scores["ELLA, NeuralEF: logit variance"]["AUROC"] == "0.9000"
    sources = dict.fromkeys(("cats", "noise", "mean"), "0.8000")
    assert cells(study.TABLES["ood"](results))["MAP"] == sources
    assert cells(study.TABLES["ood"](results))["ensemble of the four"] == sources


def test_goals_compare_with_the_publications_and_with_scaling(study, results):
    table = cells(study.TABLES["goals"](results))
    assert table["MAP NLL as published, ResNet-20"]["reached"] == "**no**"
    better = table["protocol A, NLL, ResNet-20, below the best published"]
    assert better == {"wanted": "0.2222", "found": "0.1810", "reached": "yes"}
    assert table["protocol A, ECE, ResNet-20, below the best published"]["reached"] == "**no**"
    assert table["AUROC gain, mean over sources"]["found"] == "+0.1000"
    nll = table["corruptions whose mean NLL is below temperature scaling's"]
    assert nll == {"wanted": "2", "found": "1", "reached": "**no**"}
    assert table["corruptions whose mean ECE is below temperature scaling's"]["reached"] == "yes"


def test_reproduction_is_corrected_by_what_scaling_has_on_the_other_images(study, results):
    folder = results.folder.with_name(f"{results.folder.name}-exact")
    folder.mkdir()
    content = json.loads((results.folder / "calibration-resnet20.json").read_text())
    where = {"arch": "resnet20", "protocol": "A"}
    content["rows"] = [
        {**where, "method": study.PAPER, "nll": 0.24},
        {**where, "method": "temperature scaling", "nll": 0.21},
    ]
    (folder / "calibration-resnet20.json").write_text(json.dumps(content))
    row = cells(study.TABLES["goals"](results))["NLL of the paper's ELLA as published, ResNet-20"]
    assert row == {"wanted": "0.2331 ± .01", "found": "0.2310", "reached": "yes"}


def test_costs_are_those_of_the_smallest_and_the_largest_network(study, results):
    row = cells(study.TABLES["cost"](results))["MAP"]
    assert row["fit MiB, ResNet-20"] == "1"
    assert row["predict × forward pass, ResNet-32"] == "1.10"
    assert len(row) == 8


def test_figures_are_drawn(study, results):
    study.draw(results, METHODS)
    for name in ("shift", "risk"):
        assert (results.folder / f"{name}.png").stat().st_size > 5000


def test_a_missing_method_is_named_as_such(study, results):
    path = results.folder / "calibration-resnet20.json"
    content = json.loads(path.read_text())
    content["rows"] = [row for row in content["rows"] if row["method"] != "MAP"]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="lacks a method"):
        study.TABLES["goals"](study.Study(results.folder))
