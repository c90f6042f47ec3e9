"""`ella.__version__`: from the metadata of the distribution `ella-laplace`, when asked for."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

import ella

ROOT = Path(__file__).parents[1]


def test_the_version_is_that_of_the_installed_distribution(tmp_path, monkeypatch):
    info = tmp_path / "ella_laplace-9.8.7.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ella-laplace\nVersion: 9.8.7\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert ella.__version__ == "9.8.7"


def test_a_source_tree_has_a_version_too(monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    assert ella.__version__ == "0+unknown"


def test_import_does_not_look_it_up():
    script = "import ella; print('__version__' in vars(ella)); ella.__version__"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


def test_other_names_are_still_an_error():
    with pytest.raises(AttributeError, match="module 'ella' has no attribute 'version'"):
        _ = ella.version
