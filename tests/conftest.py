"""One thread (the tests are small), and generators so that no test depends on another."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)
