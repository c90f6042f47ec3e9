"""The MNIST-1D study runs, goes on where it stopped, and makes its table."""

import json

import pytest

pytest.importorskip("mnist1d")


@pytest.mark.filterwarnings("ignore:calibrate. ")
def test_it_runs_and_goes_on(load, tmp_path, capsys):
    signals = load("signals")
    signals.main(["--smoke", "--seeds", "1", "--out", str(tmp_path)])
    first = json.loads((tmp_path / "mnist1d.json").read_text())["rows"]
    signals.main(["--smoke", "--seeds", "2", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "mnist1d.json").read_text())["rows"]
    assert rows[: len(first)] == first
    assert [row["seed"] for row in rows] == [10] * 4 + [11] * 4
    assert {column.key for column in signals.COLUMNS} <= set(rows[0])
    assert all(row["low"] <= row["high"] for row in rows if "low" in row)
    assert "seed 11" in capsys.readouterr().out
