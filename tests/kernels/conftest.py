"""Memory that an op must write comes full of NaN."""

import pytest
import torch


@pytest.fixture(autouse=True)
def poison():
    """In deterministic mode torch fills whatever it allocates, in C++ too: with NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
