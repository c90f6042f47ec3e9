"""Every Python block of the README runs, in order, in one namespace."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"


# Whether 300 examples settle every hyperparameter depends on rounding, that is on threads.
@pytest.mark.filterwarnings("ignore:calibrate. 300 validation examples alone")
def test_python_blocks_run(capsys, tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    assert blocks
    monkeypatch.chdir(tmp_path)  # blocks may save files
    namespace = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), namespace)


def test_first_screen_installs_and_tests():
    lines = README.read_text().splitlines()
    installs = [line for line in lines if line.startswith("python -m pip install")]
    assert any("experiments/calibration.py" in line for line in installs)
    assert any("python -m pytest" in line for line in installs)


def test_tables_match_the_result_files(monkeypatch):
    monkeypatch.syspath_prepend(README.parent / "experiments")
    import tables

    for page in tables.PAGES:
        assert tables.fill(page.read_text()) == page.read_text(), page
        assert "<!-- table:" in page.read_text()
