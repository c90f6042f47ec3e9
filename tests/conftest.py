"""One thread (the tests are small), and generators so that no test depends on another."""

import sys
from pathlib import Path

import pytest
import torch

EXPERIMENTS = Path(__file__).parent.parent / "experiments"

torch.set_num_threads(1)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def load(monkeypatch):
    """Import a script of the experiments, and forget it afterwards."""
    monkeypatch.syspath_prepend(EXPERIMENTS)
    monkeypatch.syspath_prepend(EXPERIMENTS / "spectral")
    loaded = []

    def load_script(name):
        loaded.append(name)
        return __import__(name)

    yield load_script
    for name in loaded:
        sys.modules.pop(name, None)
