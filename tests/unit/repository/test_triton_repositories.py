"""What Triton's ONNX backend serves beside a plain model.onnx: optional inputs, folders, the .ort format, and more."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from tests.service import models
from tests.unit.repository.test_loader import answer

from forwardpass import protocol
from forwardpass.batching.admission import Admission
from forwardpass.errors import ConfigError, InvalidRequest, ModelError
from forwardpass.execution.cpu_budget import CpuBudget
from forwardpass.execution.onnx_runtime import ort
from forwardpass.inference.decoder import Decoder
from forwardpass.inference.worker import Worker
from forwardpass.repository.batch_invariance import Invariance
from forwardpass.repository.loader import LoadedModel, LoadRequest, load
from forwardpass.repository.model_folder import ModelFolder
from forwardpass.settings import Settings


def loaded(root: Path, pbtxt: str = "", **settings: Any) -> LoadedModel:
    """The model m in `root`, version 1, with the options of a config.pbtxt."""
    told = Settings(repository=root, max_batch_size=8, **settings)
    if pbtxt:
        (root / "m" / "config.pbtxt").write_text(pbtxt)
    folder = ModelFolder("m", root / "m", ignore_unsupported=told.ignore_unsupported)
    config = folder.config()
    (version,) = folder.chosen(config).values()
    return load(LoadRequest("m", "1", version, config, told, CpuBudget(1, "for a test"), Admission(100, 1 << 20)))


def scaled() -> onnx.ModelProto:
    """y = x * scale; `scale` is an input with an initializer, so that it may be left out: 3."""
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "scale"], ["y"])],
        "network",
        [
            helper.make_tensor_value_info("x", models.FLOAT, ["batch", 2]),
            helper.make_tensor_value_info("scale", models.FLOAT, [1]),
        ],
        [helper.make_tensor_value_info("y", models.FLOAT, ["batch", 2])],
        [numpy_helper.from_array(np.array([3], np.float32), "scale")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=models.IR_VERSION)


X = np.array([[1, 2], [3, 4]], np.float32)
OPTIONAL = """max_batch_size: 8
input { name: "x" data_type: TYPE_FP32 dims: 2 }
input { name: "scale" data_type: TYPE_FP32 dims: 1 optional: true }
output { name: "y" data_type: TYPE_FP32 dims: 2 }
dynamic_batching { }
"""


@pytest.mark.parametrize("pbtxt", ["", OPTIONAL])
def test_an_optional_input_is_left_out_and_its_default_counts(tmp_path: Path, pbtxt: str) -> None:
    models.save(tmp_path, "m", scaled())
    found = loaded(tmp_path, pbtxt)
    assert [t.name for t in found.worker.signature.inputs] == ["x"]
    assert found.batches
    assert answer(found, X).tolist() == (3 * X).tolist()


class OneModel:
    """The look-up of one model."""

    generation = 0

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def resolve(self, name: str, version: str) -> Worker:
        return self._worker


def test_an_optional_input_that_is_sent_is_refused_by_name(tmp_path: Path) -> None:
    models.save(tmp_path, "m", scaled())
    message = protocol.ModelInferRequest(model_name="m")
    for name, shape in (("x", [1, 2]), ("scale", [1])):
        message.inputs.add(name=name, datatype="FP32", shape=shape)
        message.raw_input_contents.append(np.ones(shape, np.float32).tobytes())
    with pytest.raises(InvalidRequest, match="input 'scale' cannot be sent: it is optional"):
        Decoder(OneModel(loaded(tmp_path).worker), 1 << 20).decode(message.SerializeToString())


def test_an_input_without_a_default_cannot_be_optional(tmp_path: Path) -> None:
    models.save(tmp_path, "m", models.echo())
    with pytest.raises(ConfigError, match=r"config.pbtxt:1: input 'x': expected an input that every request sends"):
        loaded(tmp_path, 'input { name: "x" optional: true dims: 2 }\nmax_batch_size: 4')


def test_a_network_may_be_in_a_folder_with_its_weights(tmp_path: Path) -> None:
    folder = tmp_path / "m" / "1" / "model.onnx"
    folder.mkdir(parents=True)
    network = models.chain((64, 32, 3))
    onnx.save(network, str(folder / "model.onnx"), save_as_external_data=True, location="weights", size_threshold=0)
    assert (folder / "weights").is_file()
    found = loaded(tmp_path)
    assert found.invariance.batches and "independent by construction" in found.why
    assert answer(found, np.ones((2, 64), np.float32)).shape == (2, 3)


def test_a_folder_without_its_network_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m" / "1" / "model.onnx").mkdir(parents=True)
    with pytest.raises(ModelError, match=r"there is no model.onnx/model.onnx"):
        loaded(tmp_path)


def test_a_network_in_onnx_runtimes_own_format_is_probed(tmp_path: Path) -> None:
    folder = models.save(tmp_path, "m", models.chain())
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(folder / "model.ort")
    options.add_session_config_entry("session.save_model_format", "ORT")
    ort.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    expected = loaded(tmp_path)
    x = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    wanted = answer(expected, x)
    (folder / "model.onnx").unlink()
    found = loaded(tmp_path, 'default_model_filename: "model.ort"')
    assert found.invariance in (Invariance.EXACT, Invariance.ROUNDING) and "by construction" not in found.why
    np.testing.assert_allclose(answer(found, x), wanted, rtol=1e-6)


ACCELERATED = """max_batch_size: 8
optimization { execution_accelerators {
  gpu_execution_accelerator: [ { name: "tensorrt" } ]
} }
response_cache { enable: true }
"""


def test_an_accelerator_is_refused_or_ignored_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    models.save(tmp_path, "m", models.chain())
    with pytest.raises(ConfigError, match="--ignore-unsupported serves the model without it"):
        loaded(tmp_path, ACCELERATED)
    with caplog.at_level(logging.WARNING):
        assert loaded(tmp_path, ACCELERATED, ignore_unsupported=True).worker.signature.batchable
    said = [record.getMessage() for record in caplog.records]
    assert any(
        "config.pbtxt:3: optimization.execution_accelerators.gpu_execution_accelerator is not" in s for s in said
    )
    assert any("config.pbtxt:5: response_cache" in s and "ignored" in s for s in said)


def test_what_changes_answers_is_not_ignored(tmp_path: Path) -> None:
    models.save(tmp_path, "m", models.chain())
    with pytest.raises(ConfigError, match="sequence_batching is not supported"):
        loaded(tmp_path, "sequence_batching { }", ignore_unsupported=True)


@pytest.mark.parametrize(
    ("pbtxt", "says"),
    [
        ('runtime: "libtriton_python.so"', "runtime: expected nothing or 'libtriton_onnxruntime.so', got"),
        ("model_metrics { metric_control { } }", "model_metrics.metric_control is not supported: the buckets"),
    ],
)
def test_the_newest_options_are_heard(tmp_path: Path, pbtxt: str, says: str) -> None:
    models.save(tmp_path, "m", models.chain())
    with pytest.raises(ConfigError, match=says):
        loaded(tmp_path, pbtxt)
    assert loaded(tmp_path, 'runtime: "libtriton_onnxruntime.so"').batches
