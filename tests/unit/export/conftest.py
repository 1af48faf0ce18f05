"""Lets the export tests import `networks`, which lies beside them; PyTorch computes on one thread in them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """The seed and the number of threads are fixed, so that a network has the same bits on every run."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
