"""One thread (the tests are small), and generators so that no test depends on another."""

import sys
from pathlib import Path

import pytest
import torch
from torch.overrides import _get_current_function_mode_stack

EXPERIMENTS = Path(__file__).parent.parent / "experiments"

torch.set_num_threads(1)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture(autouse=True)
def _nothing_left_behind():
    """No test, and nothing that one interrupts, leaves a mode of torch behind for the next."""
    yield
    left = _get_current_function_mode_stack()
    while _get_current_function_mode_stack():
        left[0].__exit__(None, None, None)
    assert not left


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
