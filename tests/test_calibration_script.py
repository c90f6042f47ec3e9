"""The main experiment runs end to end on tiny settings and writes what it says."""

import json
import sys
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).parent.parent / "experiments"


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("script", ["calibration", "eigenfunctions"])
def test_smoke(script, tmp_path, monkeypatch, capsys):
    pytest.importorskip("laplace")
    monkeypatch.syspath_prepend(EXPERIMENTS)
    module = __import__(script)
    module.main(["--smoke", "--seeds", "1", "--out", str(tmp_path)])
    results = json.loads((tmp_path / f"{script}-digits.json").read_text())
    assert results["rows"]
    assert (tmp_path / f"{script}-digits.md").read_text().startswith("| method |")
    if script == "calibration":
        by_name = {row["method"]: row for row in results["rows"]}
        assert "temperature scaling" in by_name
        assert all(0 <= row["accuracy"] <= 1 for row in by_name.values())
        assert len(list(tmp_path.glob("*.png"))) == 2
    sys.modules.pop(script)
