"""Runs before a model is ready: of every size, and those that its options ask for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.service import models
from tests.unit.made import session

from forwardpass.errors import ConfigError, ModelError
from forwardpass.model.options import ModelConfig
from forwardpass.protocol.bytes_tensors import pack
from forwardpass.repository import warm_up


class Watched:
    """A real session that remembers what it was run on."""

    def __init__(self, inner: Any) -> None:
        self.signature = inner.signature
        self.ran: list[list[NDArray[Any]]] = []
        self._inner = inner

    def run(self, arrays: Sequence[NDArray[Any]], outputs: tuple[int, ...], options: Any = None) -> Any:
        self.ran.append(list(arrays))
        return self._inner.run(arrays, outputs, options)


def request(rows: int = 1, count: int = 1, **inputs: dict[str, Any]) -> ModelConfig:
    return ModelConfig(warm_up=[{"name": "r", "rows": rows, "count": count, "inputs": inputs}])  # type: ignore[list-item]


def test_every_size_is_run_up_to_the_largest(tmp_path: Path) -> None:
    watched = Watched(session(models.chain(), tmp_path))
    times = warm_up.every_size(watched.signature, watched, 6, None)  # type: ignore[arg-type]
    assert [*dict.fromkeys(len(x) for (x,) in watched.ran)] == [1, 2, 4, 6]
    assert times.model.predict(6) > 0 and times.largest > 0
    rows = np.arange(8, dtype=np.float32).reshape(2, 4)
    watched.ran.clear()
    warm_up.every_size(watched.signature, watched, 3, [rows])  # type: ignore[arg-type]
    assert all(np.array_equal(x, np.resize(rows, x.shape)) for (x,) in watched.ran)


def test_times_are_those_of_the_clock_that_is_given(tmp_path: Path) -> None:
    """By which a run takes 3 s, whatever it takes: that of the thread's CPU time, when others want the machine too."""
    opened = session(models.chain(), tmp_path)
    seconds = iter(range(0, 3000, 3))
    times = warm_up.every_size(opened.signature, opened, 2, None, lambda: float(next(seconds)))
    assert times.largest == 3.0 and times.model.predict(1) == pytest.approx(3.0)


def test_only_the_smallest_and_the_largest_are_run_where_times_are_known(tmp_path: Path) -> None:
    watched = Watched(session(models.chain(), tmp_path))
    warm_up.smallest_and_largest(watched.signature, watched, 6, None)  # type: ignore[arg-type]
    assert [*dict.fromkeys(len(x) for (x,) in watched.ran)] == [1, 6]


def test_a_network_that_rejects_made_up_values_is_no_reason_to_refuse_it(tmp_path: Path) -> None:
    opened = session(models.table(rows=1), tmp_path)  # 0 is in the table, 1 is not
    warm_up.every_size(opened.signature, opened, 64, None)


def test_requests_are_made_as_they_are_asked_for(tmp_path: Path) -> None:
    watched = Watched(session(models.two_by_two(), tmp_path))
    (tmp_path / "warmup").mkdir()
    row = np.array([[5.0, 6.0, 7.0]], np.float32)
    (tmp_path / "warmup" / "a.raw").write_bytes(row.tobytes())
    config = request(
        4,
        3,
        a={"datatype": "FP32", "dims": [3], "data": "file", "file": "a.raw"},
        n={"datatype": "INT64", "dims": [1], "data": "zero"},
    )
    warm_up.as_told(watched.signature, watched, config, tmp_path)  # type: ignore[arg-type]
    assert len(watched.ran) == 3
    a, n = watched.ran[0]
    assert np.array_equal(a, np.repeat(row, 4, axis=0))  # one row stands for all
    assert n.shape == (4, 1) and not n.any() and n.dtype == np.int64
    all_rows = np.arange(12, dtype=np.float32).reshape(4, 3)
    (tmp_path / "warmup" / "a.raw").write_bytes(all_rows.tobytes())
    warm_up.as_told(watched.signature, watched, config, tmp_path)  # type: ignore[arg-type]
    assert np.array_equal(watched.ran[-1][0], all_rows)


def test_text_and_scalars_are_made_too(tmp_path: Path) -> None:
    watched = Watched(session(models.echo(models.STRING, ("batch", 2)), tmp_path))
    (tmp_path / "warmup").mkdir()
    (tmp_path / "warmup" / "words").write_bytes(pack([b"one", b"two"]))
    for given, expected in (
        ({"data": "zero"}, ["", ""]),
        ({"data": "random"}, ["a", "a"]),
        ({"data": "file", "file": "words"}, ["one", "two"]),
    ):
        config = request(2, x={"datatype": "BYTES", "dims": [2], **given})
        warm_up.as_told(watched.signature, watched, config, tmp_path)  # type: ignore[arg-type]
        assert watched.ran[-1][0].tolist() == [expected, expected]
    scalar = Watched(session(models.echo(shape=()), tmp_path))
    config = request(x={"datatype": "FP32", "dims": [], "data": "random"})
    warm_up.as_told(scalar.signature, scalar, config, tmp_path)  # type: ignore[arg-type]
    assert scalar.ran[0][0].shape == ()


X = {"datatype": "FP32", "dims": [2], "data": "zero"}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (request(z=X), "request 'r': expected the inputs x, got z"),
        (request(x=X, z=X), "expected the inputs x, got x, z"),
        (request(x={**X, "datatype": "FP64"}), "input 'x': expected FP32, as the network, got FP64"),
        (request(x={**X, "dims": [3]}), "input 'x': expected dims [2], got [3]"),
        (request(1 << 40, x=X), "input 'x': the sizes of [1099511627776, 2] are out of range"),
        (request(x={**X, "dims": []}), "input 'x': expected dims [2], got []"),
        (request(x={**X, "data": "file", "file": "none"}), "none cannot be read"),
        (request(x={**X, "data": "file", "file": "odd"}), "has 7 bytes; expected those of [1, 2] FP32"),
    ],
)
def test_requests_that_the_network_cannot_take_are_told(tmp_path: Path, config: ModelConfig, reason: str) -> None:
    (tmp_path / "warmup").mkdir()
    (tmp_path / "warmup" / "odd").write_bytes(b"7 bytes")
    opened = session(models.echo(), tmp_path)
    with pytest.raises(ConfigError) as caught:
        warm_up.as_told(opened.signature, opened, config, tmp_path)
    assert reason in str(caught.value) and str(caught.value).startswith("model.toml: warm_up: ")


def test_rows_need_a_batch_axis(tmp_path: Path) -> None:
    opened = session(models.echo(shape=(1, 2)), tmp_path)
    with pytest.raises(ConfigError, match="expected one row, since axis 0 of the network is not a batch, got 2"):
        warm_up.as_told(opened.signature, opened, request(2, x={**X, "dims": [1, 2]}), tmp_path)


def test_a_request_that_fails_is_a_reason_not_to_serve(tmp_path: Path) -> None:
    (tmp_path / "warmup").mkdir()
    (tmp_path / "warmup" / "beyond").write_bytes(np.array([99]).tobytes())
    opened = session(models.table(), tmp_path)
    config = request(x={"datatype": "INT64", "dims": [1], "data": "file", "file": "beyond"})
    with pytest.raises(ModelError, match="warm_up: request 'r' failed: the network cannot be run on these values"):
        warm_up.as_told(opened.signature, opened, config, tmp_path)
