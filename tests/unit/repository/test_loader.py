"""From a folder to a worker: what the options, the settings and the network's own nature come to."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from tests.service import models
from tests.unit.made import Collector, read, request_for

from forwardpass.batching.admission import Admission
from forwardpass.batching.request import QueueTimeout
from forwardpass.errors import ConfigError, ModelError
from forwardpass.execution.cpu_budget import CpuBudget
from forwardpass.model.options import ModelConfig
from forwardpass.repository.batch_invariance import Invariance
from forwardpass.repository.loader import LoadedModel, LoadRequest, load
from forwardpass.settings import Settings


def loaded(root: Path, model: onnx.ModelProto, settings: Any = None, cores: int = 1, **options: Any) -> LoadedModel:
    folder = models.save(root, "m", model)
    told = Settings(repository=root, **{"max_batch_size": 32, **(settings or {})})
    return load(
        LoadRequest(
            "m", "1", folder, ModelConfig(**options), told, CpuBudget(cores, "for a test"), Admission(100, 1 << 20)
        )
    )


def answer(of: LoadedModel, x: np.ndarray) -> np.ndarray:
    """The first output for one request, run by this thread where that may be, else by the model's own."""
    sink = Collector()
    request = request_for(of.worker, [x], sink=sink)
    of.worker._admission.admit(1, request.nbytes)
    if not of.worker.try_run_now(request, 0.0):  # a run that may take as long as values say
        of.worker.start()
        of.worker.submit([request], 0.0)
        of.worker.run_pending()
    (reply,) = sink.wait([request])
    assert isinstance(reply, bytes)
    return np.asarray(read(reply)[1][0])


def test_options_come_before_the_servers_settings(tmp_path: Path) -> None:
    found = loaded(
        tmp_path,
        models.chain(),
        {"max_batch_size": 8, "instances": 3},
        max_queue_rows=7,
        max_queue_requests=6,
        max_queue_bytes=5000,
        max_request_rows=9,
        priority_levels=4,
        default_priority=2,
        default_timeout_us=1500,
        deadline_scheduling=False,
        instances=2,
    )
    options, limits = found.worker.options, found.worker.options.limits
    assert limits.max_batch_rows == 8
    assert (limits.rows, limits.requests, limits.nbytes, limits.deadlines) == (7, 6, 5000, False)
    assert (options.max_request_rows, options.instances) == (9, 2)
    assert (options.priority_levels, options.default_priority) == (4, 2)
    assert options.queue_timeouts == dict.fromkeys(range(1, 5), QueueTimeout(pytest.approx(0.0015)))
    assert loaded(tmp_path / "b", models.chain(), {"max_batch_size": 8}, max_batch_size=16).worker.run_rows == 16
    assert loaded(tmp_path / "c", models.chain(), {"instances": 3}).worker.options.instances == 3


@pytest.mark.parametrize(
    ("model", "verdict", "rows"),
    [
        (models.chain(), Invariance.EXACT, 32),
        (models.centred(), Invariance.DEPENDENT, 1),
        (models.quantised(), Invariance.DEPENDENT, 1),
        (models.running_sum(), Invariance.DEPENDENT, 1),
        (models.twice_the_rows(), Invariance.NONE, 1),
        (models.echo(shape=(4, 2)), Invariance.NONE, 1),
    ],
    ids=["chain", "mean", "quantised", "cumulative", "twice the rows", "fixed"],
)
def test_only_independent_rows_share_a_run(
    tmp_path: Path, model: onnx.ModelProto, verdict: Invariance, rows: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        found = loaded(tmp_path, model, max_queue_delay_us=1000)
    assert found.invariance is verdict
    limits = found.worker.options.limits
    assert (limits.max_batch_rows, limits.delay) == (rows, pytest.approx(0.001 if rows > 1 else 0.0))
    assert ("served one request at a time" in caplog.text) == (verdict is Invariance.DEPENDENT)


def test_what_has_no_batch_axis_is_served_as_it_is(tmp_path: Path) -> None:
    found = loaded(tmp_path, models.twice_the_rows())
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert not found.worker.signature.batchable
    assert np.array_equal(answer(found, x), np.concatenate([x, x]))


def test_zero_asks_for_no_batches_at_all(tmp_path: Path) -> None:
    found = loaded(tmp_path, models.chain(), max_batch_size=0)
    assert found.invariance is Invariance.NONE and found.worker.options.limits.max_batch_rows == 1
    x = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
    assert np.array_equal(answer(found, x), found.worker.session.run([x], (0,))[0])


@pytest.mark.parametrize(("told", "verdict"), [(True, Invariance.ASSERTED), (False, Invariance.DEPENDENT)])
def test_an_assertion_is_not_probed_and_is_printed_as_one(tmp_path: Path, told: bool, verdict: Invariance) -> None:
    found = loaded(tmp_path, models.centred() if told else models.chain(), batch_invariance=told)
    assert found.invariance is verdict
    assert f"batch_invariance = {str(told).lower()} in the model's options, not probed" in found.why


@pytest.mark.parametrize(
    ("contract", "told", "verdict", "reservation"),
    [
        (False, None, Invariance.DEPENDENT, "served one request at a time: rows_independent = false in its contract"),
        (False, False, Invariance.DEPENDENT, "served one request at a time: batch_invariance = false"),
        (False, True, Invariance.ASSERTED, "answers may depend on the requests that share a run: batch_invariance = "
         "true in the model's options, not probed, against rows_independent = false in its contract"),
        (None, None, Invariance.EXACT, ""),  # not measured: the probe decides
        (True, None, Invariance.EXACT, ""),
        (True, False, Invariance.DEPENDENT, "served one request at a time: batch_invariance = false"),
    ],
)  # fmt: skip
def test_the_contracts_verdict_binds_unless_the_operator_overrules_it(
    tmp_path: Path,
    contract: bool | None,
    told: bool | None,
    verdict: Invariance,
    reservation: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = models.save(tmp_path, "m", models.chain())
    models.add_contract(folder, {"x": np.ones((2, 4), np.float32)}, contract)
    options, settings = ModelConfig(batch_invariance=told), Settings(repository=tmp_path, max_batch_size=32)
    found = load(LoadRequest("m", "1", folder, options, settings, CpuBudget(1, "for a test"), Admission(100, 1 << 20)))
    assert found.invariance is verdict
    assert found.worker.options.limits.max_batch_rows == (32 if verdict.batches else 1)
    assert found.reservation.startswith(reservation) and bool(found.reservation) == bool(reservation)
    assert found.reservation in caplog.text


def test_a_large_network_gets_an_instance_for_each_core(tmp_path: Path) -> None:
    assert loaded(tmp_path / "small", models.chain(), cores=3).worker.options.instances == 1
    wide = models.chain((64, 3000, 3000, 10))
    found = loaded(tmp_path / "large", wide, {"max_batch_size": 64}, cores=3, batch_invariance=True)
    assert found.worker.options.instances == 3
    assert "an instance for each core" in found.placement.why


def test_the_run_time_model_has_seen_every_size(tmp_path: Path) -> None:
    found = loaded(tmp_path, models.chain((64, 512, 512, 10)), {"max_batch_size": 64})
    run_time = found.worker.queue.run_time
    assert run_time.b > 0 and run_time.predict(64) > run_time.predict(1) > 0


def test_one_pool_for_all_models_admits_no_other(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="expected 4 or nothing, got 2"):
        loaded(tmp_path, models.chain(), {"intra_op_threads": 4}, intra_op_threads=2)


def test_a_folder_without_a_network_is_refused(tmp_path: Path) -> None:
    folder = models.save(tmp_path, "m", models.chain())
    (folder / "model.onnx").unlink()
    with pytest.raises(ModelError, match=r"there is no model\.onnx"):
        load(LoadRequest("m", "1", folder, ModelConfig(), Settings(), CpuBudget(1, ""), Admission(1, 1)))


def test_made_up_values_that_the_network_rejects_do_not_stop_it(tmp_path: Path) -> None:
    """Indices into a table of one row: half of what the warm-up makes up is out of range."""
    found = loaded(tmp_path, models.table(1))
    assert found.invariance is Invariance.ROUNDING
    assert "independent by construction; not compared, since it could not be run" in found.why
    assert answer(found, np.array([[0]])).tolist() == [[0.0]]


def test_a_file_that_squeezes_one_row_away_is_served_one_request_at_a_time(tmp_path: Path) -> None:
    model = models.network(
        [helper.make_node("ReduceSum", ["x", "a"], ["s"], keepdims=1), helper.make_node("Squeeze", ["s"], ["y"])],
        [("x", TensorProto.FLOAT, ["batch", 4])],
        [("y", TensorProto.FLOAT, ["batch"])],
        {"a": np.array([1])},
    )
    found = loaded(tmp_path, model)
    assert found.invariance is Invariance.NONE
    assert "output 'y' has shape [] for one row: axis 0 is not the batch" in found.why
    assert answer(found, np.ones((3, 4), np.float32)).tolist() == [4.0] * 3
    assert answer(found, np.ones((1, 4), np.float32)).tolist() == 4.0


def test_a_label_that_is_declared_to_be_one_is_a_batch_where_a_run_says_so(tmp_path: Path) -> None:
    model = models.network(
        [helper.make_node("ArgMax", ["x"], ["y"], axis=1, keepdims=0)],
        [("x", TensorProto.FLOAT, ["batch", 4])],
        [("y", TensorProto.INT64, [1])],
    )
    found = loaded(tmp_path, model)
    assert found.invariance.batches and found.worker.signature.outputs[0].shape == (-1,)
    assert answer(found, np.eye(4, dtype=np.float32)[[2, 0, 3]]).tolist() == [2, 0, 3]


def test_an_image_of_any_size_is_probed_at_one_that_the_network_takes(tmp_path: Path) -> None:
    model = models.network(
        [helper.make_node("Conv", ["x", "w"], ["c"]), helper.make_node("GlobalAveragePool", ["c"], ["p"]),
         helper.make_node("Flatten", ["p"], ["y"])],
        [("x", TensorProto.FLOAT, ["batch", 1, "height", "width"])],
        [("y", TensorProto.FLOAT, ["batch", 2])],
        {"w": np.ones((2, 1, 20, 20), np.float32)},
    )  # fmt: skip
    found = loaded(tmp_path, model)
    assert found.invariance.batches and "not compared" not in found.why, found.why


def zipped() -> onnx.ModelProto:
    """A table's label and its probabilities as a map for each row, as scikit-learn's converters make them."""
    graph = helper.make_graph(
        [
            helper.make_node("ArgMax", ["x"], ["label"], axis=1, keepdims=0),
            helper.make_node("ZipMap", ["x"], ["probability"], domain="ai.onnx.ml", classlabels_int64s=[0, 1, 2]),
        ],
        "zipped",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3])],
        [
            helper.make_tensor_value_info("label", TensorProto.INT64, ["batch"]),
            helper.make_value_info(
                "probability",
                helper.make_sequence_type_proto(
                    helper.make_map_type_proto(TensorProto.INT64, helper.make_tensor_type_proto(TensorProto.FLOAT, []))
                ),
            ),
        ],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("ai.onnx.ml", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


def test_an_output_that_cannot_be_sent_is_explained_and_may_be_left_out(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'probability' is of type seq\(map\(.*zipmap': False"):
        loaded(tmp_path / "a", zipped())
    found = loaded(tmp_path / "b", zipped(), outputs=[{"name": "label"}])
    assert found.invariance.batches
    assert answer(found, np.eye(3, dtype=np.float32)).tolist() == [0, 1, 2]
    with pytest.raises(ConfigError, match=r"leave it out by naming the other outputs in model\.toml"):
        loaded(tmp_path / "c", zipped(), outputs=[{"name": "label"}, {"name": "probability"}])


@pytest.mark.parametrize(
    ("options", "kept"), [({}, True), ({"shrink_memory_arena": True}, False), ({"memory_arena": False}, False)]
)
def test_the_memory_of_a_large_run_is_kept_as_told(tmp_path: Path, options: dict[str, Any], kept: bool) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    found = loaded(tmp_path, models.allocate(), **options)
    answer(found, np.array([[1000]], np.int64))
    before = resident()
    assert answer(found, np.array([[25_000_000]], np.int64)).shape == (1, 1)  # 200 MB
    assert (resident() - before > 100e6) is kept
