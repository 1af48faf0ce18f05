"""How many rows go in one request, and what is shown meanwhile."""

from __future__ import annotations

import io

import numpy as np
import pytest

from forwardpass.cli.bulk import CHUNK_BYTES, CHUNK_ROWS, Progress, chunk_rows, divisible, request_rows
from forwardpass.client import ModelInfo, TensorInfo
from forwardpass.console.row_reader import NpyRows


def info(columns: int, answer: int = 1, **parameters: int) -> ModelInfo:
    inputs = (TensorInfo("x", "FP32", (-1, columns)),)
    return ModelInfo("m", ("1",), "", inputs, (TensorInfo("y", "FP32", (-1, answer)),), parameters)


@pytest.fixture
def rows(tmp_path_factory: pytest.TempPathFactory) -> NpyRows:
    path = tmp_path_factory.mktemp("rows") / "x.npy"
    np.save(path, np.zeros((5, 64), np.float64))
    return NpyRows(path)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, CHUNK_ROWS),
        ({"max_request_rows": 100}, 100),
        ({"max_message_bytes": 100_000}, (100_000 - 4096) // 256),  # as the model has them, not as the file
        ({"max_message_bytes": 1024}, 1),  # which the server refuses by name
        ({"answer": CHUNK_BYTES // 40}, 10),  # their answers are as large
    ],
)
def test_a_chunk_fits_every_limit(rows: NpyRows, given: dict[str, int], expected: int) -> None:
    found = info(64, **given)
    assert chunk_rows(found, {"x": rows}) == expected <= request_rows(found, {"x": rows})


def test_only_rows_that_do_not_depend_on_each_other_are_parted() -> None:
    assert divisible(info(4, max_batch_size=32)) and divisible(info(4))
    assert not divisible(info(4, max_batch_size=0))
    fixed = (TensorInfo("x", "FP32", (1, 4)),)
    assert not divisible(ModelInfo("m", ("1",), "", fixed, info(4).outputs, {}))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_shown_on_terminals_alone() -> None:
    terminal, file = Terminal(), io.StringIO()
    for out in (terminal, file):
        progress = Progress(10_000, out)
        progress.show(2_000)
        progress.clear()
    assert "2,000 of 10,000 rows" in terminal.getvalue() and terminal.getvalue().endswith("\r\x1b[K")
    assert file.getvalue() == ""
