"""Sessions on a device: the CPU's answers for every batch size, by graphs, without a byte more memory."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnx
import pytest
from benchmarks import gpu_memory
from numpy.typing import NDArray
from tests.gpu.libcuda import used_memory
from tests.service import models

from forwardpass.execution.cuda.session import CudaSession
from forwardpass.execution.ort_session import OrtSession
from forwardpass.execution.providers import place
from forwardpass.model.contract import CONTRACT_FILE, MODEL_FILE, Contract, Tolerance, compare
from forwardpass.observability.gpu import GpuBatchRecord

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]
FLOAT32 = Tolerance(rtol=1e-4, atol=1e-5)  # what a contract allows
LARGEST = 64
SIZES = (1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 31, 32, 33, 63, 64)

Array = NDArray[Any]
T = TypeVar("T")


@pytest.fixture
def cuda() -> Iterator[Callable[[Path], CudaSession]]:
    """`cuda(path)`: a session on device 0, which is closed when the test ends."""
    opened: list[CudaSession] = []

    def open_session(path: Path) -> CudaSession:
        opened.append(CudaSession(path, place("cuda:0", 1, "for a test")))
        return opened[-1]

    yield open_session
    for session in opened:
        assert session.close(), "a session's thread did not end"


def on_cpu(path: Path, x: Array) -> Array:
    session = OrtSession(path, place("cpu", 1, "for a test"))
    return np.asarray(session.run([x], tuple(range(len(session.signature.outputs))))[0])


def held_out(name: str) -> Array:
    spec = importlib.util.spec_from_file_location(f"{name}_data", ROOT / "models" / name / "data.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return np.asarray(module.held_out()[0])


def agree(got: Array, expected: Array, tolerance: Tolerance = FLOAT32) -> None:
    failure = compare({"y": got}, {"y": expected.astype(np.float64)}, tolerance).failure
    assert failure is None, failure


def saved(folder: Path, model: onnx.ModelProto) -> Path:
    return models.save(folder, "m", model) / MODEL_FILE


def inside(session: CudaSession, job: Callable[[], T]) -> T:
    """What `job` gives on the session's own thread, where a server runs its batches."""
    found: list[T] = []
    long_task = session.long_task(lambda: found.append(job()))
    long_task.start()
    long_task.join(600.0)
    assert found, "the job failed; the log says why"
    return found[0]


# -- answers ----------------------------------------------------------------------------------------------------------


def test_a_recipe_answers_as_on_the_cpu_in_batches_of_every_size(
    recipe: Path, cuda: Callable[[Path], CudaSession]
) -> None:
    path = recipe / "1" / MODEL_FILE
    contract = Contract.load(recipe / "1" / CONTRACT_FILE)
    x = held_out(recipe.name)
    x = np.resize(x, (max(len(x), 2 * LARGEST), x.shape[1]))
    expected = on_cpu(path, x)
    session = cuda(path)
    agree(session.run([x[:9]], (0,))[0], expected[:9], contract.tolerance)  # before any graph
    session.prepare(LARGEST, True, [x[:8]])
    notes: list[GpuBatchRecord] = []
    session.ran = notes.append
    for size in (*SIZES, LARGEST + 1, 2 * LARGEST):
        for start in (0, len(x) - size):
            (answers,) = session.run([x[start : start + size]], (0,))
            agree(answers, expected[start : start + size], contract.tolerance)
    assert [note.way for note in notes] == ["graph"] * (2 * len(SIZES)) + ["plain"] * 4
    contract.check({"logits": session.run([contract.input_arrays()["x"]], (0,))[0]})


def test_a_recipe_in_half_precision_holds_the_tolerance_that_was_measured_without_a_device(
    recipe: Path, tmp_path: Path, cuda: Callable[[Path], CudaSession]
) -> None:
    torch = pytest.importorskip("torch", reason="the export needs torch, which is not installed")
    from forwardpass.export import export

    spec = importlib.util.spec_from_file_location(recipe.name, ROOT / "models" / recipe.name / "network.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (made,) = (v for v in vars(module).values() if isinstance(v, type) and v.__module__ == recipe.name)
    network = made()
    network.load_state_dict(torch.load(ROOT / "models" / recipe.name / "weights.pt", weights_only=True))
    x = held_out(recipe.name)
    exported = export(network, [f"x:float32[batch,{x.shape[1]}]"], "half", tmp_path, samples={"x": x}, precision="fp16")
    with torch.no_grad():
        expected = network.double().eval()(torch.from_numpy(x).double()).numpy()
    session = cuda(exported.path / MODEL_FILE)
    session.prepare(LARGEST, True, [x[:8]], half=True)
    assert session.graph_sizes, session.how
    for size in SIZES:
        rows = min(size, len(x))
        agree(session.run([x[:rows]], (0,))[0], expected[:rows], exported.contract.tolerance)


def test_there_is_a_graph_for_each_bucket_and_its_answers_are_those_of_a_plain_run(
    tmp_path: Path, cuda: Callable[[Path], CudaSession]
) -> None:
    path = saved(tmp_path, models.chain((64, 256, 256, 10)))
    x = np.random.default_rng(0).standard_normal((100, 64)).astype(np.float32)
    session = cuda(path)
    plain = {size: session.run([x[:size]], (0,))[0] for size in SIZES}
    session.prepare(100, True, [x[:8]])
    assert session.graph_sizes == (1, 2, 4, 8, 16, 32, 64, 100)
    before = session.graph_replays  # each graph was checked when it was captured
    for size in SIZES:
        agree(session.run([x[:size]], (0,))[0], plain[size], Tolerance(rtol=1e-5, atol=1e-6))
    assert session.graph_replays - before == len(SIZES)


def test_rows_that_are_not_independent_use_a_graph_at_its_own_size_alone(
    tmp_path: Path, cuda: Callable[[Path], CudaSession]
) -> None:
    path = saved(tmp_path, models.centred())
    x = np.random.default_rng(0).standard_normal((8, 3)).astype(np.float32)
    session = cuda(path)
    session.prepare(8, False, [x])
    for size in range(1, 9):
        agree(session.run([x[:size]], (0,))[0], x[:size] - x[:size].mean(0))


def test_a_network_that_cannot_be_captured_runs_without_graphs_and_says_so(
    tmp_path: Path, cuda: Callable[[Path], CudaSession]
) -> None:
    session = cuda(saved(tmp_path, models.hold()))
    x = np.array([[3.0], [1.0], [2.0]], np.float32)
    session.prepare(8, True, [x])
    assert session.graph_sizes == ()
    assert "without CUDA graphs" in session.how or "without fixed buffers" in session.how
    np.testing.assert_array_equal(session.run([x], (0,))[0], x)
    assert session.graph_replays == 0


def test_special_values_come_through(tmp_path: Path, cuda: Callable[[Path], CudaSession]) -> None:
    x = np.array([[np.nan, 1.0], [np.inf, -np.inf], [1e-42, -0.0]], np.float32)
    session = cuda(saved(tmp_path, models.echo()))
    session.prepare(4, True, [x[2:]])
    np.testing.assert_array_equal(session.run([x], (0,))[0].view(np.uint32)[1:], x.view(np.uint32)[1:])
    assert np.isnan(session.run([x], (0,))[0][0, 0])


# -- memory -----------------------------------------------------------------------------------------------------------


def test_memory_is_flat_over_a_hundred_thousand_mixed_batches(
    tmp_path: Path, cuda: Callable[[Path], CudaSession]
) -> None:
    path = saved(tmp_path, models.chain((64, 256, 256, 10)))
    x = np.random.default_rng(0).standard_normal((4096, 64)).astype(np.float32)
    expected = on_cpu(path, x)
    session = cuda(path)
    session.prepare(LARGEST, True, [x[:8]])
    before = session.graph_replays

    def run(rows: Array) -> Array:
        room = session.room(len(rows))
        assert room is not None
        np.copyto(room[0], rows)
        return np.asarray(session.run(room, (0,))[0])

    found = inside(
        session,
        lambda: gpu_memory.mixed(run, x, expected, LARGEST, 100_000, used_memory, FLOAT32.rtol, FLOAT32.atol),
    )
    assert found.wrong == 0, f"{found.wrong} batches are off, by up to {found.difference}"
    assert found.growth <= 2 << 20, found.used
    assert session.graph_replays - before == 100_000


def test_a_closed_session_gives_its_memory_back(tmp_path: Path) -> None:
    path = saved(tmp_path, models.chain((64, 4096, 10)))
    x = np.zeros((8, 64), np.float32)
    taken = []
    for _ in range(6):
        session = CudaSession(path, place("cuda:0", 1, "for a test"))
        session.prepare(1024, True, [x])
        session.run([x], (0,))
        assert session.close()
        del session
        taken.append(used_memory())
    assert taken[-1] - taken[1] <= 4 << 20, taken


# -- several devices --------------------------------------------------------------------------------------------------


def test_sessions_on_two_devices_give_the_same_answers(tmp_path: Path, devices: int) -> None:
    if devices < 2:
        pytest.skip("there is one CUDA device here, and this needs two")
    path = saved(tmp_path, models.chain((64, 256, 10)))
    x = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    expected = on_cpu(path, x)
    for device in range(2):
        session = CudaSession(path, place(f"cuda:{device}", 1, "for a test"))
        session.prepare(64, True, [x[:8]])
        for size in SIZES:
            agree(session.run([x[:size]], (0,))[0], expected[:size])
        assert session.close()
