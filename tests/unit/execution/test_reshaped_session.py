"""Networks whose clients see other shapes than the network has: the same elements, in the same order."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper
from onnx.reference import ReferenceEvaluator
from tests.service import models
from tests.unit.repository.test_loader import answer, loaded

from forwardpass.batching.admission import Admission
from forwardpass.errors import ConfigError, RunFailed
from forwardpass.execution.cpu_budget import CpuBudget
from forwardpass.execution.ort_session import OrtSession
from forwardpass.execution.placement import Placement
from forwardpass.execution.reshaped_session import ReshapedSession
from forwardpass.model.options import ModelConfig
from forwardpass.repository.loader import LoadRequest, load
from forwardpass.settings import Settings

CPU = Placement("CPUExecutionProvider", 0, 1, "for a test")
SQUARE: dict[str, Any] = {
    "inputs": [{"name": "x", "dims": [2, 2], "reshape": [4]}],
    "outputs": [{"name": "y", "dims": [3, 1], "reshape": [3]}],
}


def plain(network: onnx.ModelProto, *arrays: np.ndarray) -> np.ndarray:
    inputs = {t.name: a for t, a in zip(network.graph.input, arrays, strict=True)}
    return np.asarray(ReferenceEvaluator(network).run(None, inputs)[0])


def test_rows_are_shown_in_another_shape_and_batched_all_the_same(tmp_path: Path) -> None:
    found = loaded(tmp_path, models.chain(), **SQUARE)
    assert found.batches and found.max_batch_size == 32
    x = np.random.default_rng(0).standard_normal((5, 2, 2)).astype(np.float32)
    want = plain(models.chain(), x.reshape(5, 4))
    for rows in (1, 5, 1):  # one row has a way of its own
        got = answer(found, x[:rows])
        assert got.shape == (rows, 3, 1)
        np.testing.assert_allclose(got[..., 0], want[:rows], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("network_shape", "dims", "sent"),
    [
        ((1, 3, 2, 2), [3, 2, 2], (3, 2, 2)),  # an image network whose batch is fixed at 1
        ((), [1], (1,)),  # a scalar
        ((2, "n", 2), [4, -1], (4, 3)),
        ((2, "n", 2), [-1, 4], (3, 4)),
        (("n", 2, 2), [-1, 4], (3, 4)),
        (("n", 3, 2, 2), [3, 2, 2], (3, 2, 2)),  # an axis of any size, of which clients send one row
    ],
)
def test_whole_tensors_are_shown_in_another_shape(
    tmp_path: Path, network_shape: tuple[Any, ...], dims: list[int], sent: tuple[int, ...]
) -> None:
    network = models.echo(shape=network_shape)
    reshape = [size if isinstance(size, int) else -1 for size in network_shape]
    if dims.count(-1) < reshape.count(-1):
        reshape[0] = 1
    tensors = [{"name": name, "dims": dims, "reshape": reshape} for name in "xy"]
    found = loaded(tmp_path, network, max_batch_size=0, inputs=tensors[:1], outputs=tensors[1:])
    x = np.arange(np.prod(sent), dtype=np.float32).reshape(sent)
    np.testing.assert_array_equal(answer(found, x), x)


def test_rows_of_any_width_and_one_number_a_row(tmp_path: Path) -> None:
    wide = {"dims": [1, -1], "reshape": [-1]}
    found = loaded(
        tmp_path / "a", models.relu_any_width(), inputs=[{"name": "x", **wide}], outputs=[{"name": "y", **wide}]
    )
    x = np.array([[[1, -2, 3]], [[-4, 5, 6]]], np.float32)
    np.testing.assert_array_equal(answer(found, x), np.maximum(x, 0))
    single = {"dims": [1], "reshape": []}
    numbers = loaded(
        tmp_path / "b", models.echo(shape=("n",)), inputs=[{"name": "x", **single}], outputs=[{"name": "y", **single}]
    )
    x = np.array([[1], [2], [3]], np.float32)
    np.testing.assert_array_equal(answer(numbers, x), x)


def test_a_shape_that_does_not_fit_is_told(tmp_path: Path) -> None:
    for dims, reshape, reason in (
        ([2, 2], [5], r"reshape: expected as many elements as in dims, \[2, 2\], .* got \[5\]"),
        ([2, -1], [4], r"reshape: expected as many elements as in dims, \[2, -1\]"),
        (None, [4], "reshape: expected as many elements as in dims, None"),
        ([6], [2, 3], r"input 'x': expected reshape \[4\] for one row, as the network's, got \[2, 3\]"),
    ):
        with pytest.raises((ConfigError, ValueError), match=reason):
            told = {"name": "x", "dims": dims, "reshape": reshape}
            loaded(tmp_path / str(told), models.chain(), inputs=[told])


def test_the_contract_is_in_the_networks_shapes(tmp_path: Path) -> None:
    folder = models.save(tmp_path, "m", models.chain())
    x = np.random.default_rng(1).standard_normal((4, 4)).astype(np.float32)
    models.add_contract(folder, {"x": x}, rows_independent=True)
    settings = Settings(repository=tmp_path, max_batch_size=8)
    cores, admission = CpuBudget(1, "for a test"), Admission(100, 1 << 20)
    found = load(LoadRequest("m", "1", folder, ModelConfig(**SQUARE), settings, cores, admission))
    assert "contract of 4 rows holds" in found.why
    assert answer(found, x.reshape(4, 2, 2)).shape == (4, 3, 1)
    one = ModelConfig(
        max_batch_size=0,
        inputs=[{"name": "x", "dims": [4], "reshape": [1, 4]}],  # type: ignore[list-item]
        outputs=[{"name": "y", "dims": [3], "reshape": [1, 3]}],  # type: ignore[list-item]
    )
    found = load(LoadRequest("m", "1", folder, one, settings, cores, admission))
    assert "contract of 4 rows holds" in found.why and answer(found, x[0]).shape == (3,)


def test_an_output_of_another_size_is_an_error_of_the_run(tmp_path: Path) -> None:
    network = models.network(
        [helper.make_node("Concat", ["x", "half"], ["y"], axis=2)],
        [("x", models.FLOAT, ["n", 2, 2])],
        [("y", models.FLOAT, ["n", 2, "wide"])],
        {"half": np.zeros((3, 2, 1), np.float32)},
    )
    session = OrtSession(models.save(tmp_path, "m", network) / "model.onnx", CPU)
    y = dataclasses.replace(session.signature.outputs[0], shape=(-1, 4), network_shape=(-1, 2, 2))
    shown = ReshapedSession(session, dataclasses.replace(session.signature, outputs=(y,)))
    with pytest.raises(RunFailed, match=r"output 'y' came in shape \[3, 2, 3\], which cannot be \[-1, 4\]"):
        shown.run([np.zeros((3, 2, 2), np.float32)], (0,))
