"""Versions that are swapped while clients call: no call fails, no answer is a mixture, no memory is kept.

The clients are tritonclient's, which try nothing again: a call that fails would be seen.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import tritonclient.grpc as triton
from tests.service.models import chain, save

from forwardpass.testing.server_process import ServerProcess

SIZES = (16, 64, 64, 8)
CLIENTS = 8
X = np.random.default_rng(0).standard_normal((40, SIZES[0])).astype(np.float32)


def rows_of(path: Path) -> list[bytes]:
    """What a network answers to each row of X, alone."""
    session = onnxruntime.InferenceSession(path)
    return [session.run(None, {"x": X[i : i + 1]})[0].tobytes() for i in range(len(X))]


def memory(server: ServerProcess) -> int:
    """Bytes of the server's process that are in memory."""
    status = Path(f"/proc/{server.pid}/status").read_text()
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmRSS"))


class Callers:
    """Clients that call as fast as they can and keep what came back: how often each answer did, and what was wrong."""

    def __init__(self, address: str, known: dict[str, list[bytes]], by_version: bool) -> None:
        self.seen: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._address = address
        self._known = known
        self._by_version = by_version
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._call, args=(seed,)) for seed in range(CLIENTS)]

    def __enter__(self) -> Callers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _call(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        seen: Counter[str] = Counter()
        with triton.InferenceServerClient(self._address) as client:
            while not self._stop.is_set():
                start, count = int(rng.integers(0, 32)), int(rng.integers(1, 9))
                given = triton.InferInput("x", [count, SIZES[0]], "FP32")
                given.set_data_from_numpy(X[start : start + count])
                try:
                    answer = client.infer("m", [given])
                except triton.InferenceServerException as error:
                    self.wrong.append(str(error))
                    continue
                got = [row.tobytes() for row in answer.as_numpy("y")]
                whose = [name for name, rows in self._known.items() if got == rows[start : start + count]]
                version = answer.get_response().model_version
                if len(whose) != 1 or (self._by_version and whose != [version]):
                    self.wrong.append(f"version {version} answered rows of {whose or 'none, or of several'}")
                seen.update(whose)
        self.seen += seen


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    for version in (1, 2):
        save(tmp_path / "repository", "m", chain(SIZES, seed=version), version=version)
    return tmp_path / "repository"


@pytest.fixture(params=["direct", "grpcio"])
def serve(request: pytest.FixtureRequest) -> Iterator[Callable[[Path], ServerProcess]]:
    """A server with explicit control behind each transport."""
    running: list[ServerProcess] = []

    def start(repository: Path) -> ServerProcess:
        options = ("--model-control", "explicit", "--load-model", "*", "--transport", request.param)
        running.append(ServerProcess(repository, *options))
        return running[-1]

    yield start
    for server in running:
        assert server.stop() == 0, server.tail()


def swap(
    server: ServerProcess, times: int, change: Callable[[triton.InferenceServerClient, int], None], callers: Callers
) -> None:
    with triton.InferenceServerClient(server.address) as control, callers:
        for i in range(times):
            change(control, i)
            time.sleep(0.01)  # so that each version gets to answer
    assert not callers.wrong, f"{len(callers.wrong)} of {sum(callers.seen.values())}: {callers.wrong[:3]}"
    assert min(callers.seen[name] for name in ("1", "2")) > times, callers.seen


@pytest.mark.slow
def test_two_hundred_swaps_between_versions_fail_no_call_and_mix_no_answer(
    repository: Path, serve: Callable[[Path], ServerProcess], record_property: Callable[[str, object], None]
) -> None:
    known = {v: rows_of(repository / "m" / v / "model.onnx") for v in ("1", "2")}
    server = serve(repository)

    def change(control: triton.InferenceServerClient, i: int) -> None:
        policy = {"version_policy": {"specific": {"versions": [1 + i % 2]}}}
        control.load_model("m", config=json.dumps(policy))
        if i in (50, 199):
            resident.append(memory(server))

    resident: list[int] = []
    callers = Callers(server.address, known, by_version=True)
    swap(server, 200, change, callers)
    record_property("calls", sum(callers.seen.values()))
    record_property("resident", resident)
    print(f"\n200 swaps, {sum(callers.seen.values())} calls, resident {[r / 1e6 for r in resident]} MB")
    assert resident[1] - resident[0] < 8e6, "memory grew with the number of swaps"


@pytest.mark.parametrize("times", [8, pytest.param(40, marks=pytest.mark.slow)])
def test_a_file_that_is_replaced_takes_over_at_once(
    repository: Path, serve: Callable[[Path], ServerProcess], tmp_path: Path, times: int
) -> None:
    networks = {v: repository / "m" / v / "model.onnx" for v in ("1", "2")}
    known = {v: rows_of(path) for v, path in networks.items()}
    for v, path in networks.items():
        shutil.copy(path, tmp_path / f"{v}.onnx")
    shutil.rmtree(repository / "m" / "2")
    server = serve(repository)

    def change(control: triton.InferenceServerClient, i: int) -> None:
        shutil.copy(tmp_path / f"{2 - i % 2}.onnx", tmp_path / "next.onnx")
        (tmp_path / "next.onnx").replace(networks["1"])
        control.load_model("m")

    swap(server, times, change, Callers(server.address, known, by_version=False))


def test_unloading_answers_what_was_accepted(repository: Path, serve: Callable[[Path], ServerProcess]) -> None:
    server = serve(repository)
    given = triton.InferInput("x", [4, SIZES[0]], "FP32")
    given.set_data_from_numpy(X[:4])
    answers: list[object] = []
    with triton.InferenceServerClient(server.address) as client:
        everything = threading.Event()

        def done(result: object, error: object) -> None:
            answers.append(error or result)
            if len(answers) == 500:
                everything.set()

        for _ in range(500):
            client.async_infer("m", [given], done)
        client.unload_model("m")
        assert everything.wait(60)
        refused = [a for a in answers if isinstance(a, triton.InferenceServerException)]
        # Those that came after it was unloaded are told so; nobody hears that something went wrong.
        assert all("is not loaded" in str(e) and "NOT_FOUND" in str(e.status()) for e in refused)
        assert not client.is_model_ready("m")
        client.load_model("m")
        assert client.is_model_ready("m")
        assert client.infer("m", [given]).as_numpy("y").shape == (4, SIZES[-1])


@pytest.mark.parametrize("bad", ["garbage", "empty", "cut", "contract", "options", "gone"])
def test_a_bad_reload_leaves_what_serves_and_says_why(
    repository: Path, serve: Callable[[Path], ServerProcess], bad: str
) -> None:
    server = serve(repository)
    version = repository / "m" / "2"
    given = triton.InferInput("x", [1, SIZES[0]], "FP32")
    given.set_data_from_numpy(X[:1])
    with triton.InferenceServerClient(server.address) as client:
        before = client.infer("m", [given])
        reason = {
            "garbage": "is not an ONNX file",
            "empty": "is empty",
            "cut": "was cut short",
            "contract": "is not JSON",
            "options": "config.pbtxt:2: sequence_batching is not supported",
            "gone": "there is no version",
        }[bad]
        network = onnx.load(version / "model.onnx").SerializeToString()
        match bad:
            case "garbage" | "empty" | "cut":
                data = {"garbage": b"no network", "empty": b"", "cut": network[:-7]}[bad]
                (version / "model.onnx").write_bytes(data)
            case "contract":
                (version / "contract.json").write_text("{")
            case "options":
                (repository / "m" / "config.pbtxt").write_text("max_batch_size: 4\nsequence_batching { }\n")
            case "gone":
                for folder in ("1", "2"):
                    shutil.rmtree(repository / "m" / folder)
        with pytest.raises(triton.InferenceServerException, match=reason):
            client.load_model("m")
        (entry,) = client.get_model_repository_index().models
        assert (entry.name, entry.version, entry.state) == ("m", "2", "READY")
        assert reason in entry.reason and "serves as it was" in entry.reason
        assert client.infer("m", [given]).as_numpy("y").tobytes() == before.as_numpy("y").tobytes()
        # Put right, it is loaded, and nothing is left of the complaint.
        (repository / "m" / "config.pbtxt").unlink(missing_ok=True)
        (version / "contract.json").unlink(missing_ok=True)
        version.mkdir(parents=True, exist_ok=True)
        onnx.save(chain(SIZES, seed=7), str(version / "model.onnx"))
        client.load_model("m")
        (entry,) = client.get_model_repository_index().models
        assert (entry.version, entry.state, entry.reason) == ("2", "READY", "")
        assert client.infer("m", [given]).as_numpy("y").tobytes() != before.as_numpy("y").tobytes()
