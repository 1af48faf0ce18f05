"""A network on a device that is ordinary memory: its graphs, its buffers, and what happens when the device fails."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.service import models
from tests.unit.fake_device import (
    ILLEGAL_ADDRESS,
    FakeDriver,
    FakeRuntime,
    cuda_failure,
    short_of_memory,
)
from tests.unit.made import ids, session

from forwardpass import protocol
from forwardpass.errors import DeviceLost, InvalidRequest, ModelError, RunFailed, TooLarge
from forwardpass.execution.cuda.driver import CudaError
from forwardpass.execution.cuda.session import TIMED_EVERY, CudaSession
from forwardpass.execution.ort_session import new_run_options
from forwardpass.execution.placement import CUDA, Placement
from forwardpass.model.example_inputs import example
from forwardpass.observability.gpu import GpuBatchRecord

Make = Callable[..., CudaSession]


class Lab:
    """A device, and the sessions that were opened on it."""

    def __init__(self, folder: Path, devices: int = 1) -> None:
        self.folder = folder
        self.driver = FakeDriver(devices)
        self.runtime = FakeRuntime(self.driver)
        self.sessions: list[CudaSession] = []
        self.ran: list[GpuBatchRecord] = []

    def open(self, model: onnx.ModelProto, rows: int = 0, pads: bool = True, **more: Any) -> CudaSession:
        """Opened, and, with `rows`, prepared."""
        path = self.folder / f"{next(ids)}.onnx"
        onnx.save(model, str(path))
        where = Placement(CUDA, more.pop("device", 0), 1, "for a test", devices=(0,), **more)
        found = CudaSession(path, where, driver=self.driver, opener=self.runtime, name="device")
        self.sessions.append(found)
        if rows:
            rng = np.random.default_rng(1)
            found.prepare(rows, pads, [example(tensor, 8, rng) for tensor in found.signature.inputs])
        found.ran = self.ran.append
        self.runtime.ways.clear()
        return found

    def ways(self) -> dict[str, int]:
        return {way: self.runtime.ways[way] for way in ("graph", "bound", "plain") if self.runtime.ways[way]}


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    made = Lab(tmp_path)
    yield made
    made.driver.sticky = ""
    for one in made.sessions:
        assert one.close(), "a thread is left"
    made.sessions.clear()
    assert not made.driver.blocks and not made.driver.streams, "memory or a stream is left"


def rows_of(count: int, seed: int = 0, width: int = 4) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32)


# -- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("largest", [1, 2, 6, 8])
def test_a_graph_answers_as_the_cpu_does_for_every_number_of_rows(lab: Lab, largest: int) -> None:
    model = models.chain()
    cpu, found = session(model, lab.folder), lab.open(model, largest)
    for rows in range(1, largest + 1):
        x = rows_of(rows, rows)
        (y,) = found.run([x], (0,))
        np.testing.assert_allclose(y, cpu.run([x], (0,))[0], rtol=1e-5, atol=1e-6)
        assert y.shape == (rows, 3)
    assert lab.ways() == {"graph": largest}
    assert [r.way for r in lab.ran] == ["graph"] * largest
    assert found.graph_replays >= largest


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.booleans(), st.booleans())
def test_no_row_of_another_batch_is_ever_seen(lab: Lab, batches: list[int], pads: bool, staged: bool) -> None:
    """Batches one after the other over the same buffers, in any order of sizes: each answer is of its own rows."""
    if not lab.sessions:
        for each in (True, False):
            lab.open(models.two_by_two(), 8, each)
    found, cpu = lab.sessions[0 if pads else 1], session(models.two_by_two(), lab.folder)
    for i, rows in enumerate(batches):
        a, n = rows_of(rows, 100 * i + rows, 3), np.full((rows, 1), 1000 * i + rows)
        wanted = cpu.run([a, n], (0, 1, 2))
        outputs = ((0, 1, 2), (2,), (2, 0))[i % 3]
        if staged and 0 < rows <= 8:

            def serve(a: Any = a, n: Any = n, rows: int = rows, outputs: Any = outputs) -> list[NDArray[Any]]:
                room = found.room(rows)
                assert room is not None and [r.shape for r in room] == [(rows, 3), (rows, 1)]
                for array, values in zip(room, (a, n), strict=True):
                    array[:] = values
                return [answer.copy() for answer in found.run(room, outputs)]

            answers = found._thread.call(serve)
        else:
            answers = found.run([a, n], outputs)
        for place, answer in zip(outputs, answers, strict=True):
            np.testing.assert_array_equal(answer, wanted[place])


def test_what_lies_beyond_a_batch_stays_of_the_same_tensor(lab: Lab) -> None:
    # An index out of the table's range in the rows that a graph runs for nothing would fail the run here, and on a
    # device read beyond the table.
    found = lab.open(models.table(), 8)
    for rows in (8, 3, 1, 5, 2, 7):
        x = np.arange(rows, dtype=np.int64).reshape(-1, 1)
        np.testing.assert_array_equal(found.run([x], (0,))[0], 10.0 * x)
    assert lab.ways() == {"graph": 6}


@pytest.mark.parametrize("name", [n for n in models.ELEMENTS if n != "BYTES"])
def test_every_datatype_goes_through_the_buffers_unchanged(lab: Lab, name: str) -> None:
    found = lab.open(models.echo(models.ELEMENTS[name]), 4)
    datatype = protocol.DATATYPES[name]
    for rows in (1, 3, 4):
        x = np.frombuffer(bytes(range(1, 1 + 2 * rows * datatype.itemsize)), datatype.numpy).reshape(rows, 2)
        if name == "BOOL":
            x = x.view(np.uint8) % 2 == 1
        (y,) = found.run([x], (0,))
        assert y.dtype == x.dtype and y.tobytes() == x.tobytes()
    assert lab.ways() == {"graph": 3}


def test_answers_of_arrays_of_ones_own_are_ones_own(lab: Lab) -> None:
    found = lab.open(models.chain(), 4)
    first = found.run([rows_of(2, 1)], (0,))
    kept = first[0].copy()
    found.run([rows_of(2, 2)], (0,))
    assert np.array_equal(first[0], kept)


def test_no_rows_are_no_run(lab: Lab) -> None:
    found = lab.open(models.two_by_two(), 4)
    total, most = found.run([np.empty((0, 3), np.float32), np.empty((0, 1), np.int64)], (0, 1))
    assert (total.shape, most.shape) == ((0, 3), (0,)) and not lab.ways()


def test_rows_that_depend_on_each_other_are_never_padded(lab: Lab) -> None:
    found = lab.open(models.centred(), 1, pads=False)
    assert found.graph_sizes == (1,)
    x = rows_of(3, width=3)
    np.testing.assert_allclose(found.run([x], (0,))[0], x - x.mean(axis=0), atol=1e-6)
    assert lab.ways() == {"plain": 1}
    assert not np.any(found.run([x[:1]], (0,))[0])
    assert lab.ways() == {"plain": 1, "graph": 1}


# -- what is captured -------------------------------------------------------------------------------------------------


def test_graphs_are_captured_once_by_the_thread_that_serves_and_largest_first(lab: Lab) -> None:
    found = lab.open(models.chain(), 6)
    assert lab.runtime.captures == [(found._ident, size) for size in ("6", "4", "2", "1")]
    for rows in (1, 2, 3, 4, 5, 6):
        found.run([rows_of(rows)], (0,))
    assert len(lab.runtime.captures) == 4 and lab.driver.calls["bound run"] > 4
    assert found.how == "CUDA graphs for batches of 1, 2, 4, 6 rows" and found.graph_sizes == (1, 2, 4, 6)


def test_memory_stays_what_it_was_whatever_the_batches(lab: Lab) -> None:
    found = lab.open(models.chain(), 16)
    before, made = lab.driver.taken(), lab.driver.calls["device_memory"]
    for i in range(300):
        found.run([rows_of(1 + (7 * i) % 16)], (0,))
    assert lab.driver.taken() == before and lab.driver.calls["device_memory"] == made == 2
    assert len(lab.driver.blocks) == 4  # inputs and outputs, on the host and on the device


def test_a_batch_is_a_copy_in_a_replay_a_copy_out_and_one_wait(lab: Lab) -> None:
    found = lab.open(models.chain(), 8)
    lab.driver.calls.clear()
    found.run([rows_of(5)], (0,))
    assert lab.driver.calls == {"copy_in": 1, "bound run": 1, "copy_out": 1, "wait": 1}


def test_one_batch_in_so_many_is_timed(lab: Lab) -> None:
    found = lab.open(models.chain(), 2)
    lab.ran.clear()
    for _ in range(3 * TIMED_EVERY):
        found.run([rows_of(2)], (0,))
    timed = [r for r in lab.ran if r.run is not None]
    assert len(timed) == 3 and len(lab.ran) == 3 * TIMED_EVERY
    for note in timed:
        assert (note.device, note.way) == (0, "graph")
        assert note.copy_in is not None and note.copy_out is not None
        assert min(note.copy_in, note.run, note.copy_out) > 0


@pytest.mark.parametrize("tf32", [False, True])
def test_the_provider_is_told_everything_that_matters(lab: Lab, tf32: bool) -> None:
    found = lab.open(models.chain(), allow_tf32=tf32, memory_limit=1 << 20)
    (told,) = lab.runtime.opened
    assert told == {
        "device_id": "0",
        "user_compute_stream": str(found._network.stream),
        "enable_cuda_graph": "1",
        "use_tf32": str(int(tf32)),
        "arena_extend_strategy": "kSameAsRequested",
        "cudnn_conv_algo_search": "HEURISTIC",
        "gpu_mem_limit": str(1 << 20),
    }


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (models.relu_any_width(), "because a row of input 'x' is of any size"),
        (models.echo(models.STRING), "because input 'x' is text"),
        (models.echo(shape=(4, 2)), "because axis 0 is not a batch of any size"),
    ],
    ids=["any width", "text", "no batch"],
)
def test_a_network_without_fixed_buffers_runs_plainly_and_says_so(lab: Lab, model: onnx.ModelProto, why: str) -> None:
    found = lab.open(model, 4)
    assert found.how == f"plain runs, without fixed buffers or CUDA graphs, {why}" and not found.graph_sizes
    x = np.array([["a", "b"]] * 4, object) if "text" in why else rows_of(4, width=2)
    assert found.run([x], (0,))[0].shape == (4, 2)
    assert lab.ways() == {"plain": 1} and lab.ran[-1] == GpuBatchRecord(0, "plain")
    assert found._thread.call(lambda: found.room(1)) is None


def test_a_network_that_cannot_be_captured_runs_in_its_buffers_and_says_so(lab: Lab) -> None:
    lab.runtime.refuses = True
    found = lab.open(models.chain(), 4)
    assert found.how.startswith("fixed buffers without CUDA graphs, because This session cannot use the graph capture")
    assert [o["enable_cuda_graph"] for o in lab.runtime.opened] == ["1", "0"]
    cpu = session(models.chain(), lab.folder)
    for rows in (1, 3, 4, 3):
        x = rows_of(rows, rows)
        np.testing.assert_allclose(found.run([x], (0,))[0], cpu.run([x], (0,))[0], rtol=1e-5, atol=1e-6)
    assert lab.ways() == {"bound": 4} and not lab.runtime.captures
    assert found.run([rows_of(9)], (0,))[0].shape == (9, 3)  # beyond the buffers
    assert lab.ways() == {"bound": 4, "plain": 1}


def test_a_capture_that_fails_ends_graphs_not_the_model(lab: Lab) -> None:
    lab.runtime.capture_fails = True
    found = lab.open(models.chain(), 4)
    assert found.how == (
        "fixed buffers without CUDA graphs, because Error in execution: CUDA failure 900: operation not permitted when "
        "stream is capturing"
    )
    assert not lab.driver.capturing and not found.graph_sizes
    assert found.run([rows_of(3)], (0,))[0].shape == (3, 3) and lab.ways() == {"bound": 1}


def test_a_graph_that_answers_something_else_is_not_used(lab: Lab) -> None:
    lab.runtime.bakes = True
    found = lab.open(models.chain(), 4)
    assert found.how.startswith("fixed buffers without CUDA graphs, because the graph for 1 rows gives another 'y'")
    cpu, x = session(models.chain(), lab.folder), rows_of(3)
    np.testing.assert_allclose(found.run([x], (0,))[0], cpu.run([x], (0,))[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("rounds", "half", "graphs"), [(1e-3, False, False), (1e-3, True, True), (0.05, True, False), (1e-5, False, True)]
)
def test_a_graph_may_round_as_its_precision_does_and_no_more(lab: Lab, rounds: float, half: bool, graphs: bool) -> None:
    lab.runtime.rounds = rounds
    found = lab.open(models.chain())
    found.prepare(4, True, [rows_of(4)], half)
    assert bool(found.graph_sizes) == graphs, found.how


@pytest.mark.parametrize("refuses", [False, True], ids=["captured", "refused"])
def test_inputs_that_are_copied_when_they_are_bound_are_not_taken_for_new_ones(lab: Lab, refuses: bool) -> None:
    lab.runtime.copies_inputs, lab.runtime.refuses = True, refuses
    found = lab.open(models.chain(), 4)
    assert found.how.startswith("plain runs, without fixed buffers or CUDA graphs, because ")
    assert found.how.endswith("; and a run of 1 rows in fixed buffers gives another 'y' than a plain run")
    cpu = session(models.chain(), lab.folder)
    for seed in range(3):
        x = rows_of(3, seed)
        np.testing.assert_allclose(found.run([x], (0,))[0], cpu.run([x], (0,))[0], rtol=1e-5, atol=1e-6)
    assert lab.ways() == {"plain": 3} and not lab.driver.blocks


def test_a_network_whose_rows_are_not_independent_fails_the_check_of_padding(lab: Lab) -> None:
    # Asserted to be independent in its options, say: the rows beyond the batch would change its answers.
    found = lab.open(models.centred(), 4, pads=True)
    assert "another 'y' than a plain run" in found.how and not found.graph_sizes


def test_before_it_is_prepared_every_run_is_plain(lab: Lab) -> None:
    found = lab.open(models.chain())
    assert found.run([rows_of(3)], (0,))[0].shape == (3, 3)
    assert lab.ways() == {"plain": 1} and not lab.driver.blocks


# -- threads ----------------------------------------------------------------------------------------------------------


def test_any_thread_may_ask_and_one_does_it(lab: Lab) -> None:
    found = lab.open(models.chain(), 8)
    cpu = session(models.chain(), lab.folder)
    wrong: list[int] = []

    def client(seed: int) -> None:
        for i in range(30):
            x = rows_of(1 + (seed + i) % 8, 100 * seed + i)
            if not np.allclose(found.run([x], (0,))[0], cpu.run([x], (0,))[0], rtol=1e-5, atol=1e-6):
                wrong.append(seed)

    clients = [threading.Thread(target=client, args=(i,)) for i in range(4)]
    for one in clients:
        one.start()
    for one in clients:
        one.join()
    assert not wrong and lab.ways() == {"graph": 120}
    assert {ident for ident, _ in lab.runtime.captures} == {found._ident}


def test_only_its_own_thread_gets_room(lab: Lab) -> None:
    found = lab.open(models.chain(), 8)
    assert found.room(3) is None
    inside = [found._thread.call(lambda rows=rows: found.room(rows)) for rows in (0, 1, 8, 9)]
    assert [None if room is None else len(room[0]) for room in inside] == [None, 1, 8, None]


def test_room_is_given_for_one_run(lab: Lab) -> None:
    found = lab.open(models.chain(), 4)

    def twice() -> tuple[NDArray[Any], NDArray[Any]]:
        room = found.room(2)
        assert room is not None
        room[0][:] = rows_of(2)
        (view,) = found.run(room, (0,))
        first = view.copy()
        (second,) = found.run(room, (0,))  # as arrays like any other now
        return first, second

    first, second = found._thread.call(twice)
    assert np.array_equal(first, second)


def test_a_session_that_nobody_has_any_more_gives_everything_back(lab: Lab) -> None:
    found = lab.open(models.chain(), 4)
    thread, seen = found._thread, weakref.ref(found)
    lab.sessions.clear()
    del found
    gc.collect()
    assert seen() is None
    assert thread.join(60.0)
    assert not lab.driver.blocks and not lab.driver.streams


# -- when it fails ----------------------------------------------------------------------------------------------------


def once(error: Exception) -> Callable[[], None]:
    left = [error]

    def before() -> None:
        if left:
            raise left.pop()

    return before


@pytest.mark.parametrize(
    "error",
    [
        cuda_failure(2, "out of memory"),
        RuntimeError("Error in execution: Available memory of 512 is smaller than requested bytes of 1073741824"),
        RuntimeError("Error in execution: CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED ; GPU=0 ; hostname=h ; file=f"),
        short_of_memory(),
    ],
    ids=["cuda", "limit", "cublas", "driver"],
)  # fmt: skip
@pytest.mark.parametrize("rows", [2, 9], ids=["graph", "plain"])
def test_out_of_memory_is_too_large_and_the_next_is_served(lab: Lab, error: Exception, rows: int) -> None:
    found = lab.open(models.chain(), 4)
    lab.runtime.before = once(error)
    with pytest.raises(TooLarge, match="not enough memory") as caught:
        found.run([rows_of(rows)], (0,))
    assert caught.value.reason == "out_of_memory"
    assert found.run([rows_of(rows)], (0,))[0].shape == (rows, 3)


def test_a_copy_that_finds_no_memory_is_too_large(lab: Lab) -> None:
    found = lab.open(models.chain(), 4)
    lab.driver.fails["copy_in"] = short_of_memory()
    with pytest.raises(TooLarge):
        found.run([rows_of(2)], (0,))
    assert found.run([rows_of(2)], (0,))[0].shape == (2, 3)


@pytest.mark.parametrize("rows", [2, 9], ids=["graph", "plain"])
def test_an_error_that_leaves_no_trace_fails_its_batch_alone(lab: Lab, rows: int) -> None:
    found = lab.open(models.chain(), 4)
    lab.runtime.before = once(cuda_failure(9, "invalid configuration argument"))
    with pytest.raises(RunFailed) as caught:
        found.run([rows_of(rows)], (0,))
    assert not isinstance(caught.value, DeviceLost)
    assert str(caught.value).endswith("CUDA failure 9: invalid configuration argument")  # no host, file or line
    assert found.run([rows_of(rows)], (0,))[0].shape == (rows, 3)


def test_values_that_the_network_rejects_are_the_clients_fault_here_too(lab: Lab) -> None:
    found = lab.open(models.table(), 4)
    with pytest.raises(InvalidRequest, match="idx=99"):
        found.run([np.array([[99]])], (0,))
    assert found.run([np.array([[1]])], (0,))[0].tolist() == [[10]]


def breaks(driver: FakeDriver) -> Callable[[], None]:
    def before() -> None:
        driver.sticky = ILLEGAL_ADDRESS
        raise cuda_failure(700, "an illegal memory access was encountered")

    return before


@pytest.mark.parametrize("rows", [2, 9], ids=["graph", "plain"])
def test_a_sticky_error_loses_the_device(lab: Lab, rows: int) -> None:
    found = lab.open(models.chain(), 4)
    lab.runtime.before = breaks(lab.driver)
    for _ in range(2):  # and it stays lost
        with pytest.raises(DeviceLost) as caught:
            found.run([rows_of(rows)], (0,))
        assert str(caught.value) == f"cuda:0 is lost: {ILLEGAL_ADDRESS}"
        assert caught.value.status.name == "INTERNAL" and caught.value.reason == "device_lost"


def test_an_error_that_shows_when_the_stream_is_waited_for_loses_the_device(lab: Lab) -> None:
    found = lab.open(models.chain(), 4)

    def before() -> None:
        lab.driver.fails["wait"] = CudaError(719, "cudaErrorLaunchFailure", "unspecified launch failure")
        lab.driver.sticky = ""
        lab.runtime.before = lambda: None

    lab.runtime.before = before
    with pytest.raises(RunFailed):  # nothing is left of it: that batch alone
        found.run([rows_of(2)], (0,))
    assert found.run([rows_of(2)], (0,))[0].shape == (2, 3)
    lab.driver.fails["wait"] = CudaError(719, "cudaErrorLaunchFailure", "unspecified launch failure")
    original = lab.driver.broken
    lab.driver.broken = lambda stream: original(stream) or "unspecified launch failure"  # type: ignore[method-assign]
    with pytest.raises(DeviceLost, match="cuda:0 is lost: unspecified launch failure"):
        found.run([rows_of(2)], (0,))
    lab.driver.broken = original  # type: ignore[method-assign]


def test_a_lost_device_does_not_keep_a_session_from_ending(lab: Lab) -> None:
    found = lab.open(models.chain(), 4)
    lab.driver.sticky = ILLEGAL_ADDRESS
    assert found.close()
    lab.driver.blocks.clear()  # all of it is gone with the process
    lab.driver.streams.clear()
    lab.sessions.clear()


def test_a_device_lost_while_it_is_prepared_is_said_to_be(lab: Lab) -> None:
    found = lab.open(models.chain())
    lab.runtime.before = breaks(lab.driver)
    with pytest.raises(DeviceLost):
        found.prepare(4, True, [rows_of(4)])
    lab.driver.sticky = ""


def test_buffers_that_do_not_fit_are_an_error_that_names_the_rows(lab: Lab) -> None:
    lab.driver.capacity = 4096
    found = lab.open(models.chain())
    with pytest.raises(ModelError, match=r"cuda:0 has no room for batches of 4096 rows: out of memory"):
        found.prepare(4096, True, [rows_of(4)])
    assert not lab.driver.blocks
    found.prepare(8, True, [rows_of(4)])
    assert found.run([rows_of(8)], (0,))[0].shape == (8, 3)


def test_a_network_that_cannot_be_opened_leaves_nothing(lab: Lab) -> None:
    lab.runtime.before = once(cuda_failure(2, "out of memory"))
    with pytest.raises(ModelError, match=r"onnx cannot be opened on cuda:0: .*CUDA failure 2: out of memory$"):
        lab.open(models.chain())
    assert not lab.driver.streams


def test_onnxruntime_going_on_without_the_device_is_an_error(lab: Lab) -> None:
    lab.runtime.provider = "CPUExecutionProvider"
    with pytest.raises(ModelError, match="asked for CUDAExecutionProvider; ONNX Runtime offers only CPU"):
        lab.open(models.chain())
    assert not lab.driver.streams


def test_a_device_that_cannot_be_used_is_an_error(lab: Lab) -> None:
    lab.driver.fails["use"] = CudaError(46, "cudaErrorDevicesUnavailable", "all CUDA-capable devices are busy")
    with pytest.raises(ModelError, match="cuda:0 cannot be used: all CUDA-capable devices are busy"):
        lab.open(models.chain())


def test_a_run_without_a_graph_can_be_ended_and_one_with_cannot(lab: Lab) -> None:
    lab.runtime.refuses = True
    bound = lab.open(models.chain(), 4)
    lab.runtime.refuses = False
    graph = lab.open(models.chain(), 4)
    options = new_run_options()
    options.terminate = True
    with pytest.raises(RunFailed):
        bound.run([rows_of(2)], (0,), options)
    assert graph.run([rows_of(2)], (0,), options)[0].shape == (2, 3)


def test_slices_of_one_request_share_their_options(lab: Lab) -> None:
    lab.runtime.refuses = True
    found = lab.open(models.chain(), 4)
    options = new_run_options()
    for rows in (4, 4, 9, 2):  # 9 rows run plainly, and must be waited for
        assert found.run([rows_of(rows)], (0,), options)[0].shape == (rows, 3)
    assert lab.ways() == {"bound": 3, "plain": 1}


def test_control_flow_is_no_matter_here(lab: Lab) -> None:
    # ONNX Runtime refuses to capture it; then it runs as any other.
    lab.runtime.refuses = True
    found = lab.open(models.hold(), 2)
    assert found.run([np.array([[3.0]], np.float32)], (0,))[0].tolist() == [[3.0]]
