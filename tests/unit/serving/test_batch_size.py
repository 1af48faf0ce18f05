"""What max_batch_size is: as told where somebody says, measured where nobody does, and said so at start-up."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper
from tests.unit.serving.made import session

from forwardpass.server_process import ServerProcess
from forwardpass.serving import batch_size
from forwardpass.serving.knee import MOST_ROWS

POWERS = [1 << i for i in range(MOST_ROWS.bit_length())]


def elementwise(op: str, *shape: int | str, element: int = TensorProto.FLOAT) -> object:
    graph = helper.make_graph(
        [helper.make_node(op, ["x"], ["y"])],
        "elementwise",
        [helper.make_tensor_value_info("x", element, shape)],
        [helper.make_tensor_value_info("y", element, shape)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def test_what_is_told_is_taken_without_a_run(tmp_path: Path) -> None:
    found = session(elementwise("Neg", "batch", 4), tmp_path)  # type: ignore[arg-type]
    assert batch_size.choose(found.interface, found, 7, None) == (7, "")
    assert batch_size.choose(found.interface, found, 0, None) == (0, "")


def test_what_is_not_told_is_measured(tmp_path: Path) -> None:
    found = session(elementwise("Neg", "batch", 4), tmp_path)  # type: ignore[arg-type]
    rows, why = batch_size.choose(found.interface, found, None, None)
    assert rows in POWERS
    assert why == f"max_batch_size {rows} measured: the least with 90% of the best throughput"


def test_real_rows_are_measured_where_there_are_some(tmp_path: Path) -> None:
    # An index into a table of three: made-up rows are small integers, but only the sample is certain to be inside.
    graph = helper.make_graph(
        [helper.make_node("Gather", ["table", "x"], ["y"])],
        "lookup",
        [helper.make_tensor_value_info("x", TensorProto.INT64, ["batch", 1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 1, 2])],
        [helper.make_tensor("table", TensorProto.FLOAT, [1, 2], [1.0, 2.0])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    found = session(model, tmp_path)
    assert batch_size.choose(found.interface, found, None, [np.zeros((3, 1), np.int64)])[0] in POWERS
    rows, why = batch_size.choose(found.interface, found, None, [np.full((3, 1), 9)])
    assert rows == batch_size.UNMEASURED
    assert why.startswith("max_batch_size 64: it could not be measured: the network cannot be run on these values")


def test_a_network_without_a_batch_is_not_measured(tmp_path: Path) -> None:
    found = session(elementwise("Neg", 1, 4), tmp_path)  # type: ignore[arg-type]
    assert batch_size.choose(found.interface, found, None, None) == (batch_size.UNMEASURED, "")


def test_batches_of_large_rows_stay_small(tmp_path: Path) -> None:
    # Rows of 4 MiB: no batch beyond 16 MiB is made up, whatever it would gain.
    found = session(elementwise("Neg", "batch", 1 << 20), tmp_path)  # type: ignore[arg-type]
    assert batch_size.choose(found.interface, found, None, None)[0] in (1, 2, 4)


@pytest.mark.parametrize(
    ("options", "toml", "expected"),
    [((), None, None), (("--max-batch-size", "24"), None, 24), (("--max-batch-size", "24"), 48, 48)],
    ids=["nobody", "the server", "the model"],
)
def test_the_server_says_what_it_chose(
    tmp_path: Path, digits_repository: Path, options: tuple[str, ...], toml: int | None, expected: int | None
) -> None:
    shutil.copytree(digits_repository / "digits" / "1", tmp_path / "digits" / "1")
    if toml is not None:
        (tmp_path / "digits" / "model.toml").write_text(f"max_batch_size = {toml}\n")
    with ServerProcess(tmp_path, *options) as server:
        line = next(line for line in server.lines if line.startswith("model digits"))
    said = re.search(r"batches of up to (\d+) rows", line)
    assert said is not None, line
    if expected is not None:
        assert int(said[1]) == expected and "measured" not in line
    else:
        assert int(said[1]) in POWERS
        assert f"max_batch_size {said[1]} measured: the least with 90% of the best throughput" in line
