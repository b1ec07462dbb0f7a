"""Models of many shapes, grown by hand so that every block does something."""

import pytest
import torch
from exporting_models import Grown
from exporting_models import make


@pytest.fixture(autouse=True)
def _one_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def grown() -> Grown:
    return make("mlp")
