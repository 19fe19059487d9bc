"""Training in this process must leave no trace in torch's global state."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _torch_as_before() -> Iterator[None]:
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    with torch.random.fork_rng([]):
        yield
    torch.use_deterministic_algorithms(was_deterministic)
