"""A model from its folder to its answers on devices that are ordinary memory: graphs, failures, one queue for all."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from tests.service import models
from tests.unit.batching.bench import rows, wait_until
from tests.unit.fake_device import ILLEGAL_ADDRESS, FakeDriver, FakeRuntime, cuda_failure
from tests.unit.made import Collector, ids, read, request_for, session

from forwardpass.api.model_config import describe
from forwardpass.batching.admission import Admission
from forwardpass.errors import (
    ConfigError,
    ContractError,
    DeviceLost,
    InvalidRequest,
    ModelError,
    SettingsError,
    TooLarge,
)
from forwardpass.execution.cpu_budget import CpuBudget
from forwardpass.execution.cuda.session import CudaSession
from forwardpass.execution.ort_session import OrtSession
from forwardpass.execution.placement import Devices, Placement
from forwardpass.inference import batch_runner
from forwardpass.inference.request import AnyRequest
from forwardpass.model.options import ModelConfig
from forwardpass.observability.catalogue import GPU_BATCHES_TOTAL, GPU_STAGE_SECONDS, Metric
from forwardpass.repository.batch_invariance import Invariance
from forwardpass.repository.loader import LoadedModel, LoadRequest, load
from forwardpass.settings import Settings


class Machinery:
    """A machine with some devices, and the models that were loaded on it."""

    def __init__(self, root: Path, devices: int = 2) -> None:
        self.root = root
        self.driver = FakeDriver(devices)
        self.runtime = FakeRuntime(self.driver)
        self.sessions: list[CudaSession] = []
        self.loaded: list[LoadedModel] = []
        self.lost: list[str] = []

    def _opens(
        self, path: Path, where: Placement, optimizations: str, name: str, _opening: Any
    ) -> OrtSession | CudaSession:
        if not where.devices:
            return OrtSession(path, where, optimizations)
        self.sessions.append(
            CudaSession(path, where, optimizations, driver=self.driver, opener=self.runtime, name=name)
        )
        return self.sessions[-1]

    def load(self, model: onnx.ModelProto, settings: Any = None, **options: Any) -> LoadedModel:
        folder = models.save(self.root, f"m{next(ids)}", model)
        told = Settings(repository=self.root, **{"max_batch_size": 8, "provider": "cuda", **(settings or {})})
        self.loaded.append(
            load(LoadRequest(
                "m", "1", folder, ModelConfig(**options), told, CpuBudget(4, "for a test"), Admission(1000, 1 << 24),
                lost=self.lost.append, opens=self._opens, look=lambda: Devices(self.driver.count),
            ))
        )  # fmt: skip
        self.runtime.ways.clear()
        self.driver.calls.clear()
        return self.loaded[-1]

    def end(self) -> None:
        for one in self.loaded:
            assert one.worker.close(10.0), "a thread is left"
        for each in self.sessions:
            assert each.close()


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machinery]:
    made = Machinery(tmp_path)
    yield made
    made.driver.sticky = ""
    made.end()
    assert not made.driver.blocks and not made.driver.streams


def submit(of: LoadedModel, *requests: AnyRequest) -> tuple[AnyRequest, ...]:
    worker = of.worker
    assert worker._admission.admit(len(requests), sum(r.nbytes for r in requests)) is None
    worker.submit(requests, time.monotonic())
    while worker.run_pending():
        pass
    return requests


def asked(of: LoadedModel, sink: Collector, *arrays: NDArray[Any], **more: Any) -> AnyRequest:
    return request_for(of.worker, arrays, sink=sink, arrival=time.monotonic(), **more)


# -- from the folder --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "options", "label", "threads"),
    [
        ("cuda", {}, "cuda:0", [0]),
        ("cuda:1", {}, "cuda:1", [1]),
        ("cuda", {"instances": 2}, "cuda:0", [0, 0]),
        ("cuda:0,1", {}, "cuda:0,1", [0, 1]),
        ("cuda:0,1", {"instances": 2}, "cuda:0,1", [0, 1, 0, 1]),
        ("cpu", {"provider": "cuda:1"}, "cuda:1", [1]),
        ("auto", {}, "cuda:0", [0]),
    ],
)
def test_every_instance_on_every_device_has_a_session(
    machine: Machinery, wanted: str, options: dict[str, Any], label: str, threads: list[int]
) -> None:
    found = machine.load(models.chain(), {"provider": wanted}, **options)
    assert found.placement.label == label and found.worker.options.instances == len(threads)
    assert [s.placement.device for s in machine.sessions] == threads
    assert all(s.graph_sizes == (1, 2, 4, 8) for s in machine.sessions)
    assert "CUDA graphs for batches of 1, 2, 4, 8 rows" in found.placement.why
    assert found.invariance is Invariance.EXACT and found.max_batch_size == 8
    assert len({s._ident for s in machine.sessions}) == len(threads)
    group = describe(found).instance_group[0]
    assert list(group.gpus) == sorted(set(threads)) and group.count == len(threads) // len(set(threads))


def test_clients_may_see_other_shapes_than_the_device(machine: Machinery) -> None:
    tensors = {
        "inputs": [{"name": "x", "dims": [2, 2], "reshape": [4]}],
        "outputs": [{"name": "y", "dims": [1, 3], "reshape": [3]}],
    }
    found, plain = machine.load(models.chain(), **tensors), machine.load(models.chain())
    assert "CUDA graphs" in found.placement.why
    sink = Collector()
    x = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    for worker in (found.worker, plain.worker):
        worker.start()
    shown = submit(found, *(asked(found, sink, row.reshape(1, 2, 2)) for row in x))
    usual = submit(plain, *(asked(plain, sink, row.reshape(1, 4)) for row in x))
    got = [read(reply)[1][0] for reply in sink.wait(shown) if isinstance(reply, bytes)]
    want = [read(reply)[1][0] for reply in sink.wait(usual) if isinstance(reply, bytes)]
    assert len(got) == 3 and [a.shape for a in got] == [(1, 1, 3)] * 3
    np.testing.assert_allclose(np.concatenate(got)[:, 0], np.concatenate(want), rtol=1e-6)


def test_another_shape_costs_no_copy(machine: Machinery, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was stacked into the device's buffers is known again as what lies in them."""
    tensors = {"inputs": [{"name": "x", "dims": [2, 2], "reshape": [4]}]}
    found = machine.load(models.chain(), **tensors)
    found.worker.start()
    copied: list[Any] = []
    monkeypatch.setattr(CudaSession, "_fits", lambda _, arrays: copied.append(arrays))
    sink = Collector()
    x = np.random.default_rng(0).standard_normal((3, 1, 2, 2)).astype(np.float32)
    assert all(isinstance(reply, bytes) for reply in sink.wait(submit(found, *(asked(found, sink, row) for row in x))))
    assert not copied


def test_on_the_processor_nothing_of_it_shows(machine: Machinery) -> None:
    found = machine.load(models.chain(), {"provider": "auto"}, provider="cpu")
    assert found.placement.label == "cpu" and not machine.sessions and "graph" not in found.placement.why
    assert isinstance(found.worker.session, OrtSession)
    found.worker.start()


def test_what_was_not_asked_for_and_is_not_there_is_said(machine: Machinery) -> None:
    machine.driver.count = 0
    found = machine.load(models.chain(), {"provider": "auto"})
    assert found.placement.label == "cpu" and found.placement.why.startswith("auto: cpu, because")
    found.worker.start()
    with pytest.raises(SettingsError, match="provider: cuda cannot be had"):
        machine.load(models.chain())
    with pytest.raises(ConfigError, match=r"model\.toml: provider: cuda:1 cannot be had"):
        machine.load(models.chain((3, 2)), {"provider": "cpu"}, provider="cuda:1")


@pytest.mark.parametrize(
    ("server", "model", "tf32"), [(False, None, "0"), (True, None, "1"), (True, False, "0"), (False, True, "1")]
)
def test_a_models_word_on_tf32_comes_before_the_servers(
    machine: Machinery, server: bool, model: bool | None, tf32: str
) -> None:
    machine.load(models.chain(), {"allow_tf32": server, "gpu_mem_limit": 77}, allow_tf32=model)
    assert {(o["use_tf32"], o["gpu_mem_limit"]) for o in machine.runtime.opened} == {(tf32, "77")}


def test_order_can_be_kept_on_one_device_only(machine: Machinery) -> None:
    assert machine.load(models.chain(), preserve_ordering=True, instances=3).worker.options.instances == 1
    with pytest.raises(ConfigError, match=r"preserve_ordering: expected one device with it, got cuda:0,1"):
        machine.load(models.chain((3, 2)), {"provider": "cuda:0,1"}, preserve_ordering=True)


@pytest.mark.parametrize(
    ("model", "said", "graph_sizes"),
    [
        (models.centred(), "CUDA graphs for batches of 1 rows", (1,)),
        (models.twice_the_rows(), "plain runs, without fixed buffers or CUDA graphs, since axis 0 is no batch", ()),
        (models.relu_any_width(), "plain runs, without fixed buffers or CUDA graphs, because a row of input 'x'", ()),
    ],
    ids=["dependent", "no batch", "any width"],
)
def test_how_batches_are_run_is_in_the_report(
    machine: Machinery, model: onnx.ModelProto, said: str, graph_sizes: tuple[int, ...]
) -> None:
    found = machine.load(model)
    assert said in found.placement.why and machine.sessions[0].graph_sizes == graph_sizes
    sink, cpu = Collector(), session(model, machine.root)
    found.worker.start()
    for count in (1, 3):
        x = rows(count, count, 3)
        (answer,) = sink.wait(submit(found, asked(found, sink, x)))
        assert isinstance(answer, bytes)
        np.testing.assert_allclose(read(answer)[1][0], cpu.run([x], (0,))[0], atol=1e-6)


def test_a_load_that_fails_leaves_nothing_on_the_device(machine: Machinery) -> None:
    machine.driver.capacity = 2000
    with pytest.raises(ModelError, match="cuda:0 has no room for batches of 4096 rows"):
        machine.load(models.chain(), max_batch_size=4096)
    assert not machine.driver.blocks and not machine.driver.streams
    machine.sessions.clear()


def test_a_contract_is_held_against_the_graphs(machine: Machinery, digits_repository: Path) -> None:
    folder = digits_repository / "digits" / "1"

    def load_digits() -> LoadedModel:
        return load(LoadRequest(
            "digits", "1", folder, ModelConfig(), Settings(repository=digits_repository, provider="cuda"),
            CpuBudget(1, ""), Admission(10, 1 << 20), opens=machine._opens, look=lambda: Devices(1),
        ))  # fmt: skip

    found = load_digits()
    machine.loaded.append(found)
    assert "contract of" in found.why and machine.runtime.ways["graph"] > 0
    # A device whose graphs answer wrongly from the second use on, after they were checked.
    replayed = machine.runtime.ways["graph"]
    assert replayed
    machine.runtime.before = lambda: (_ for _ in ()).throw(cuda_failure(9, "invalid configuration argument"))
    with pytest.raises((ContractError, ModelError)):
        load_digits()
    machine.runtime.before = lambda: None


# -- serving ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("provider", ["cuda", "cuda:0,1"])
@pytest.mark.parametrize("instances", [1, 2])
def test_every_answer_is_what_the_network_says_of_those_rows(machine: Machinery, provider: str, instances: int) -> None:
    found = machine.load(models.chain(), {"provider": provider}, instances=instances)
    found.worker.start()
    sink, cpu = Collector(), session(models.chain(), machine.root)
    sent: list[tuple[AnyRequest, NDArray[Any]]] = []

    def client(seed: int) -> None:
        for i in range(25):
            xs = [rows((1, 2, 5, 0, 8, 13)[(seed + i + j) % 6], 1000 * seed + 10 * i + j) for j in range(3)]
            requests = [asked(found, sink, x) for x in xs]
            sent.extend(zip(requests, xs, strict=True))
            submit(found, *requests)

    clients = [threading.Thread(target=client, args=(i,)) for i in range(4)]
    for one in clients:
        one.start()
    for one in clients:
        one.join()
    for answer, (_, x) in zip(sink.wait([r for r, _ in sent]), sent, strict=True):
        assert isinstance(answer, bytes)
        np.testing.assert_allclose(read(answer)[1][0], cpu.run([x], (0,))[0], rtol=1e-5, atol=1e-6)
    assert set(machine.runtime.ways) == {"graph"}
    assert machine.driver.calls["device_memory"] == 0  # all of it was there before


def test_several_devices_take_from_one_queue(machine: Machinery) -> None:
    found = machine.load(models.chain(), {"provider": "cuda:0,1"}, max_batch_size=1)
    sink, at_once = Collector(), threading.Barrier(2, timeout=60.0)
    machine.runtime.before = at_once.wait  # no run ends before another is under way
    found.worker.start()
    sent = [asked(found, sink, rows(1, i)) for i in range(10)]
    submit(found, *sent)
    assert all(isinstance(answer, bytes) for answer in sink.wait(sent))
    machine.runtime.before = lambda: None
    counted: dict[Any, float] = {}

    class Kept:
        def add(self, metric: Metric, labels: Any, value: float) -> None:
            assert metric is GPU_BATCHES_TOTAL
            counted[labels] = value

        def add_histogram(self, metric: Metric, *_: Any) -> None:
            assert metric is GPU_STAGE_SECONDS

    found.worker.metrics.gpu.snapshot(("m", "1"), Kept())  # type: ignore[arg-type]
    assert counted == {("m", "1", "cuda:0", "graph"): 5, ("m", "1", "cuda:1", "graph"): 5}


def test_nobody_runs_a_batch_but_the_devices_own_threads(machine: Machinery) -> None:
    found = machine.load(models.chain(), {"inline_run_limit": 10.0})
    sink = Collector()
    one = asked(found, sink, rows(1))
    assert found.worker._admission.admit(1, one.nbytes) is None
    assert not found.worker.try_run_now(one, time.monotonic())
    found.worker.submit([one], time.monotonic())
    assert not found.worker.run_pending()
    assert one.call not in sink.answers  # until the threads are started
    found.worker.start()
    sink.wait([one])


def test_rows_are_stacked_where_the_device_copies_them_from(
    machine: Machinery, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = machine.load(models.two_by_two())
    monkeypatch.delattr(batch_runner, "stack")  # which makes a matrix of its own
    found.worker.start()
    sink = Collector()
    sent = [asked(found, sink, rows(2, i, 3), np.full((2, 1), i)) for i in range(4)]
    submit(found, *sent)
    assert all(isinstance(answer, bytes) for answer in sink.wait(sent))
    batches = machine.runtime.ways["graph"]
    assert batches and machine.driver.calls["copy_in"] == 2 * batches and machine.driver.calls["wait"] == batches


def test_what_comes_to_a_model_that_was_replaced_is_answered(machine: Machinery) -> None:
    found = machine.load(models.chain(), {"provider": "cuda:0,1"})
    worker, sink = found.worker, Collector()
    worker.start()
    assert worker.retire(10.0)
    late = submit(found, *(asked(found, sink, rows(2, i)) for i in range(5)))
    assert all(isinstance(answer, bytes) for answer in sink.wait(late))


def test_a_request_that_comes_as_a_model_begins_to_go_waits_for_nobody_who_waits_for_it(machine: Machinery) -> None:
    found = machine.load(models.chain())
    worker, sink = found.worker, Collector()
    worker.start()
    wait_until(lambda: worker._wake._waiters)  # type: ignore[attr-defined]  # the device's thread has nothing to do
    with worker._lock:
        worker._ending = True  # as `retire` begins; the thread has not seen it yet
    sent = [asked(found, sink, rows(1, i)) for i in range(2)]
    clients = [threading.Thread(target=submit, args=(found, one), daemon=True) for one in sent]
    for one in clients:
        one.start()
    assert all(isinstance(answer, bytes) for answer in sink.wait(sent))


def test_a_model_can_be_replaced_at_any_moment(machine: Machinery) -> None:
    found = machine.load(models.chain())
    worker, sink = found.worker, Collector()
    worker.start()
    sent: list[AnyRequest] = []
    over = threading.Event()

    def client() -> None:
        while not over.is_set():
            (request,) = submit(found, asked(found, sink, rows(1)))
            sink.wait([request])
            sent.append(request)

    clients = [threading.Thread(target=client) for _ in range(3)]
    for one in clients:
        one.start()
    wait_until(lambda: len(sent) > 30)
    assert worker.retire(10.0)
    so_far = len(sent)
    wait_until(lambda: len(sent) > so_far + 10)
    over.set()
    for one in clients:
        one.join()
    assert all(isinstance(answer, bytes) for answer in sink.wait(sent))


def test_one_bad_request_does_not_fail_its_neighbours(machine: Machinery) -> None:
    found = machine.load(models.table())
    sink = Collector()
    sent = [asked(found, sink, np.array([[99 if i == 3 else i]])) for i in range(8)]
    assert found.worker._admission.admit(8, sum(r.nbytes for r in sent)) is None
    found.worker.submit(sent, time.monotonic())
    found.worker.start()
    for i, answer in enumerate(sink.wait(sent)):
        if i == 3:
            assert isinstance(answer, InvalidRequest)
        else:
            assert isinstance(answer, bytes) and read(answer)[1][0].tolist() == [[10.0 * i]]


def test_out_of_memory_is_told_and_the_next_request_is_served(machine: Machinery) -> None:
    found = machine.load(models.relu_any_width())
    found.worker.start()
    sink = Collector()
    short = [cuda_failure(2, "out of memory")]

    def before() -> None:
        if short:
            raise short.pop()

    machine.runtime.before = before
    (first,) = sink.wait(submit(found, asked(found, sink, rows(1))))
    assert isinstance(first, TooLarge) and first.status.name == "RESOURCE_EXHAUSTED"
    (second,) = sink.wait(submit(found, asked(found, sink, rows(1))))
    assert isinstance(second, bytes) and not machine.lost


def breaks(machine: Machinery) -> Callable[[], None]:
    def before() -> None:
        machine.driver.sticky = ILLEGAL_ADDRESS
        raise cuda_failure(700, "an illegal memory access was encountered")

    return before


def test_a_sticky_error_fails_its_batch_at_once_and_is_reported(machine: Machinery) -> None:
    found = machine.load(models.chain())
    sink = Collector()
    machine.runtime.before = breaks(machine)
    sent = [asked(found, sink, rows(1)) for _ in range(8)]
    assert found.worker._admission.admit(8, sum(r.nbytes for r in sent)) is None
    found.worker.submit(sent, time.monotonic())
    found.worker.start()
    for answer in sink.wait(sent):
        assert isinstance(answer, DeviceLost) and answer.status.name == "INTERNAL"
        assert str(answer) == f"cuda:0 is lost: {ILLEGAL_ADDRESS}"
    assert machine.lost == [f"cuda:0 is lost: {ILLEGAL_ADDRESS}"]
    assert found.worker.metrics.isolated == 0  # nobody of them is to blame


def test_a_device_lost_while_a_model_is_loaded_is_no_matter_of_the_model(machine: Machinery) -> None:
    captured = partial(len, machine.runtime.captures)

    def before() -> None:
        if captured():
            breaks(machine)()

    machine.runtime.before = before
    with pytest.raises(DeviceLost, match="cuda:0 is lost"):
        machine.load(models.chain())
    machine.driver.sticky = ""
    machine.driver.blocks.clear()
    machine.driver.streams.clear()
    machine.sessions.clear()


def test_what_tf32_rounds_keeps_no_model_from_graphs_and_batches(machine: Machinery) -> None:
    machine.runtime.rounds = 1e-3  # as one kernel rounds and another does not
    exact = machine.load(models.chain())
    assert "gives another 'y' than a plain run" in exact.placement.why
    coarse = machine.load(models.chain(), allow_tf32=True)
    assert "CUDA graphs for batches of 1, 2, 4, 8 rows" in coarse.placement.why
    assert coarse.invariance.batches
