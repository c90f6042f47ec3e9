"""Scripts about other people's models run end to end on tiny settings, and say what they did."""

import json

import pytest


def results(path):
    return json.loads(path.read_text())


def test_latency(load, tmp_path, capsys):
    script = load("latency")
    script.main(["--smoke", "--blocks", "1", "--calls", "3", "--out", str(tmp_path)])
    found = results(tmp_path / "latency.json")
    assert all(set(row["milliseconds"]) == set(script.STAGES) for row in found["rows"])
    assert all(row["milliseconds"]["forward"] > 0 for row in found["rows"])
    table = script.latency_table(found)
    assert table in capsys.readouterr().out
    slow = {**found["rows"][0], "milliseconds": dict.fromkeys(script.STAGES, 1.0)}
    slow["milliseconds"]["predict_proba"] = 3.3
    assert "**3.300** | 3.200" in script.latency_table({"rows": [slow]})


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("task", ["camvid", "truecasing"])
def test_dense(load, task, tmp_path, capsys):
    if task == "truecasing":
        pytest.importorskip("transformers")
    options = [task, "--smoke", "--seeds", "1", "--out", str(tmp_path)]
    load("dense").main(options)
    path = tmp_path / f"dense-{task}.json"
    first = results(path)["rows"]
    assert {row["method"] for row in first} >= {"temperature scaling", "ELLA, NeuralEF"}
    assert all(row["positions"] > 50 and 0 <= row["outside"] <= 1 for row in first)
    load("dense").main(options)  # goes on where it was stopped: nothing is left to do
    assert results(path)["rows"] == first
    assert "| MAP |" in capsys.readouterr().out


def test_casing(load):
    casing = load("_dense").casing
    assert [casing(word) for word in ("the", "Oil", "I", "AP", "iPod", "(Reuters)")] == [
        *(0, 1, 1, 2, 0, 1)
    ]
    assert casing("36;10") == load("_dense").IGNORED


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_smoke_imagenet(load, tmp_path, capsys):
    script = load("imagenet")
    options = ["--smoke", "--pixels", "16", "--timed-pixels", "16", "--out", str(tmp_path)]
    script.main(options)
    first = (tmp_path / "imagenet.json").read_text()
    assert "| ELLA, NeuralEF |" in capsys.readouterr().out
    rows = json.loads(first)["rows"]
    assert [row["method"] for row in rows][-1] == "ELLA, NeuralEF"
    assert all(0 <= row["accuracy"] <= row["top five"] <= 1 for row in rows)
    script.main(options)  # goes on: nothing is left to do
    assert (tmp_path / "imagenet.json").read_text() == first


def test_classes_of_tiny_imagenet(load):
    classes = load("_data").TINY_IMAGENET
    assert len(set(classes)) == len(classes) == 200
    assert set(classes) <= set(range(1000))
