"""What the tests of the worker share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
from tests.unit.batching.bench import Bench


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def make(model: onnx.ModelProto, **more: Any) -> Bench:
        made.append(Bench(model, tmp_path, **more))
        return made[-1]

    yield make
    for one in made:
        one.worker.end_runs_since(float("inf"))
        assert one.worker.close(10.0), "a thread is left"
