"""Every method of tritonclient's gRPC clients, sync and asyncio, against real servers behind both transports.

Each test says by `@backs` which rows of the table in docs/compatibility.md it stands for; the last tests hold the table
against the clients and against these tests, so that no row claims what nothing shows.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
from caller import Caller, request, until
from certificates import Authority
from tritonclient_surface import (
    LABELS,
    MODELS,
    SECONDS,
    AsyncioClient,
    Surface,
    X,
    elements,
    expected,
    same,
    save_models,
    shared_memory_key,
)

from forwardpass import __version__
from forwardpass.testing.server_process import ServerProcess

triton = pytest.importorskip("tritonclient.grpc", reason="tritonclient[grpc] is not installed")
triton_aio = pytest.importorskip("tritonclient.grpc.aio", reason="tritonclient[grpc] is not installed")

SURFACE = Surface("tritonclient", triton, triton_aio)
KINDS = {"sync": triton.InferenceServerClient, "aio": partial(AsyncioClient, triton_aio)}
backs = SURFACE.backs
key = pytest.fixture(shared_memory_key)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_models(tmp_path_factory.mktemp("surface"))


@pytest.fixture(scope="module", params=["direct", "grpcio"])
def running(request: pytest.FixtureRequest, repository: Path) -> Iterator[ServerProcess]:
    # All are loaded at the start, and may be unloaded and loaded again.
    explicit = ("--model-control", "explicit", "--load-model", "*")
    with ServerProcess(repository, "--transport", request.param, *explicit) as server:
        yield server
        assert server.stop() == 0, server.tail()


@pytest.fixture(params=KINDS)
def client(request: pytest.FixtureRequest, running: ServerProcess) -> Iterator[Any]:
    found = KINDS[request.param](running.address)
    yield found
    found.close()


def inputs(array: np.ndarray[Any, Any] = X, name: str = "x", datatype: str = "FP32") -> list[Any]:
    tensor = triton.InferInput(name, list(array.shape), datatype)
    tensor.set_data_from_numpy(array)
    return [tensor]


def fails(status: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """That a call fails with this status; its text."""
    with pytest.raises(triton.InferenceServerException) as caught:
        call(*args, **kwargs)
    assert caught.value.status() == f"StatusCode.{status}", caught.value
    return str(caught.value.message())


# -- state -------------------------------------------------------------------------------------------------------------


@backs("is_server_live", "is_server_ready", "is_model_ready")
def test_what_lives_and_what_is_ready(client: Any) -> None:
    assert client.is_server_live() is True
    assert client.is_server_ready(client_timeout=SECONDS) is True
    assert client.is_model_ready("chain") is True and client.is_model_ready("chain", "1") is True
    assert "nobody" in fails("NOT_FOUND", client.is_model_ready, "nobody")


@backs("get_server_metadata")
def test_the_server_says_who_it_is_and_what_works(client: Any) -> None:
    told = client.get_server_metadata()
    assert (told.name, told.version) == ("forwardpass", __version__)
    assert set(told.extensions) == {
        "binary_tensor_data",
        "classification",
        "logging",
        "model_configuration",
        "model_repository",
        "model_repository(unload_dependents)",
        "parameters",
        "schedule_policy",
        "statistics",
        "system_shared_memory",
    }
    assert client.get_server_metadata(as_json=True)["name"] == "forwardpass"


@backs("get_model_metadata")
def test_a_models_interface(client: Any) -> None:
    told = client.get_model_metadata("chain")
    assert (told.name, list(told.versions), told.platform) == ("chain", ["1"], "onnxruntime_onnx")
    assert [(t.name, t.datatype, list(t.shape)) for t in told.inputs] == [("x", "FP32", [-1, 4])]
    assert [(t.name, t.datatype, list(t.shape)) for t in told.outputs] == [("y", "FP32", [-1, 3])]
    assert client.get_model_metadata("chain", "1", as_json=True)["platform"] == "onnxruntime_onnx"


@backs("get_model_config")
def test_a_models_options(client: Any) -> None:
    told = client.get_model_config("chain").config
    assert (told.name, told.max_batch_size) == ("chain", 16)
    assert [(t.name, list(t.dims)) for t in told.input] == [("x", [4])]
    assert [(t.name, list(t.dims)) for t in told.output] == [("y", [3])]
    assert client.get_model_config("chain", "1", as_json=True)["config"]["name"] == "chain"


@backs("get_inference_statistics")
def test_what_was_counted(client: Any) -> None:
    def statistics() -> Any:
        (told,) = client.get_inference_statistics("chain").model_stats
        return told

    before = statistics()
    for _ in range(3):
        client.infer("chain", inputs())
    after = statistics()
    assert (after.name, after.version) == ("chain", "1")
    assert after.inference_count - before.inference_count == 3 * len(X)
    assert after.execution_count - before.execution_count == 3
    assert after.inference_stats.success.count - before.inference_stats.success.count == 3
    assert after.inference_stats.queue.count - before.inference_stats.queue.count == 3
    assert {s.batch_size for s in after.batch_stats} >= {len(X)}
    every = client.get_inference_statistics(as_json=True)["model_stats"]
    assert {m["name"] for m in every} == MODELS


# -- the repository ----------------------------------------------------------------------------------------------------


@backs("get_model_repository_index", "load_model", "unload_model")
def test_models_come_and_go(client: Any, repository: Path) -> None:
    def index() -> dict[str, str]:
        return {m.name: m.state for m in client.get_model_repository_index().models}

    assert index()["two"] == "READY"
    client.unload_model("two", unload_dependents=True)
    assert index()["two"] != "READY"
    assert "'two'" in fails("NOT_FOUND", client.infer, "two", inputs())
    client.load_model("two")
    assert index()["two"] == "READY" and client.is_model_ready("two")
    # With a configuration in place of the one on disk, and with a file in place of the folder.
    client.load_model("two", config='{"max_batch_size": 3}')
    assert client.get_model_config("two").config.max_batch_size == 3
    file = (repository / "chain" / "1" / "model.onnx").read_bytes()
    client.load_model("two", config='{"max_batch_size": 8}', files={"file:1/model.onnx": file})
    assert [t.name for t in client.get_model_metadata("two").inputs] == ["x"]
    client.load_model("two")
    assert [t.name for t in client.get_model_metadata("two").inputs] == ["a", "n"]
    assert client.get_model_repository_index(as_json=True)["models"]


# -- inference ---------------------------------------------------------------------------------------------------------


@backs("infer", "InferInput", "InferResult", "InferRequestedOutput")
def test_rows_in_and_rows_out(client: Any, repository: Path) -> None:
    (given,) = inputs()
    assert (given.name(), given.datatype(), given.shape()) == ("x", "FP32", [5, 4])
    wanted = triton.InferRequestedOutput("y")
    result = client.infer("chain", [given], "1", [wanted], request_id="mine", client_timeout=SECONDS)
    assert np.array_equal(result.as_numpy("y"), expected(repository))
    assert (result.get_output("y").name, result.get_response().id) == ("y", "mine")
    assert result.get_response(as_json=True)["model_version"] == "1"
    given.set_shape([5, 5])
    assert "expected shape [-1,4], got [5,5]" in fails("INVALID_ARGUMENT", client.infer, "chain", [given])


@backs("InferInput", "InferResult")
@pytest.mark.parametrize("datatype", models.ELEMENTS)
def test_every_datatype_comes_back_as_it_was(client: Any, datatype: str) -> None:
    given = elements(datatype)
    assert same(client.infer(f"echo_{datatype}", inputs(given, "x", datatype)).as_numpy("y"), given)


@backs("infer: class_count")
def test_the_largest_classes_with_their_labels(client: Any, repository: Path) -> None:
    logits = expected(repository)
    found = client.infer("chain", inputs(), outputs=[triton.InferRequestedOutput("y", class_count=2)]).as_numpy("y")
    for row, texts in zip(logits, found, strict=True):
        best = np.argsort(-row)[:2]
        assert [t.decode() for t in texts] == [f"{row[i]:f}:{i}:{LABELS[i]}" for i in best]


@backs("infer: parameters", "infer: headers")
def test_parameters_and_headers_of_ones_own_do_no_harm(client: Any, repository: Path) -> None:
    said = {"text": "yes", "count": 3, "flag": True}
    result = client.infer("chain", inputs(), parameters=said, headers={"x-mine": "yes"})
    assert np.array_equal(result.as_numpy("y"), expected(repository))


@backs("infer: priority", "infer: timeout")
def test_priority_and_timeout(client: Any) -> None:
    assert client.infer("chain", inputs(), priority=2, timeout=10_000_000).as_numpy("y").shape == (5, 3)
    assert "expected 1 to 2" in fails("INVALID_ARGUMENT", client.infer, "chain", inputs(), priority=3)


@backs("infer: timeout")
@pytest.mark.parametrize("kind", KINDS)
def test_a_timeout_bounds_the_wait_for_an_instance(repository: Path, kind: str) -> None:
    with ServerProcess(repository, "--inline-run-limit", "0", "--grace", "0.1") as server:
        caller, client = Caller(server), KINDS[kind](server.address)
        # Both instances are held until the server ends, so that the next request waits.
        holders = []
        for busy in (1, 2):  # one by one: together they would share a run
            holders.append(caller.start(request("hold", np.full((1, 1), 1e15, np.float32))))
            until(lambda busy=busy: caller.metric("forwardpass_running_requests") == busy)  # type: ignore[misc]
        said = fails("DEADLINE_EXCEEDED", client.infer, "hold", inputs(np.zeros((1, 1), np.float32)), timeout=1)
        assert "its queue timeout is 0.0 ms" in said
        assert not any(holder.done() for holder in holders)
        client.close()
        assert server.stop() == 0
        caller.close()


@backs("infer: client_timeout")
def test_a_call_ends_with_its_own_timeout(client: Any) -> None:
    long = np.full((1, 1), 3_000_000.0, np.float32)
    fails("DEADLINE_EXCEEDED", client.infer, "hold", inputs(long), client_timeout=0.2)


@backs("infer: compression_algorithm gzip")
def test_a_compressed_request(client: Any, repository: Path) -> None:
    result = client.infer("chain", inputs(), compression_algorithm="gzip")
    assert np.array_equal(result.as_numpy("y"), expected(repository))


@backs("infer: compression_algorithm deflate")
def test_a_request_compressed_the_other_way(client: Any, repository: Path) -> None:
    result = client.infer("chain", inputs(), compression_algorithm="deflate")
    assert np.array_equal(result.as_numpy("y"), expected(repository))


@backs("infer: sequence_id, sequence_start, sequence_end")
def test_a_sequence_is_refused_by_name(client: Any) -> None:
    said = fails("INVALID_ARGUMENT", client.infer, "chain", inputs(), sequence_id=7, sequence_start=True)
    assert "'sequence_" in said


@backs("async_infer")
def test_calls_that_come_back(running: ServerProcess, repository: Path) -> None:
    with triton.InferenceServerClient(running.address) as client:
        done, found = threading.Semaphore(0), []

        def back(result: Any, error: Any) -> None:
            found.append((result, error))
            done.release()

        for _ in range(8):
            client.async_infer("chain", inputs(), back, client_timeout=SECONDS)
        client.async_infer("nobody", inputs(), back)
        for _ in range(9):
            assert done.acquire(timeout=SECONDS)
    answers = [result.as_numpy("y") for result, error in found if error is None]
    (error,) = (error for _, error in found if error is not None)
    assert len(answers) == 8 and all(np.array_equal(a, expected(repository)) for a in answers)
    assert error.status() == "StatusCode.NOT_FOUND"


# -- streams -----------------------------------------------------------------------------------------------------------


@backs("start_stream", "async_stream_infer", "stop_stream")
def test_a_stream_with_callbacks(running: ServerProcess, repository: Path) -> None:
    found: list[tuple[Any, Any]] = []
    with triton.InferenceServerClient(running.address) as client:
        client.start_stream(lambda result, error: found.append((result, error)), compression_algorithm="gzip")
        for i in range(20):
            name = "nobody" if i == 7 else "chain"
            client.async_stream_infer(name, inputs(), request_id=str(i), enable_empty_final_response=i % 2 == 0)
        client.stop_stream()
        assert len(found) == 20
        assert "there is no model 'nobody'" in str(found[7][1])
        good = [result for result, _ in found if result is not None]
        assert [r.get_response().id for r in good] == [str(i) for i in range(20) if i != 7]
        assert all(np.array_equal(r.as_numpy("y"), expected(repository)) for r in good)
        assert all(r.get_response().parameters["triton_final_response"].bool_param for r in good)
        # A stream may be started anew, and given up.
        client.start_stream(lambda result, error: found.append((result, error)), stream_timeout=SECONDS)
        client.async_stream_infer("hold", inputs(np.full((1, 1), 1_000_000.0, np.float32)))
        client.stop_stream(cancel_requests=True)
    assert found[-1][1] is not None and found[-1][1].status() == "StatusCode.CANCELLED"


@backs("stream_infer")
def test_a_stream_with_iterators(running: ServerProcess, repository: Path) -> None:
    async def converse() -> list[tuple[Any, Any]]:
        async def ask() -> Any:
            for i in range(20):
                yield {"model_name": "nobody" if i == 7 else "chain", "inputs": inputs(), "request_id": str(i)}

        async with triton_aio.InferenceServerClient(running.address) as client:
            return [pair async for pair in client.stream_infer(ask(), stream_timeout=SECONDS)]

    found = asyncio.run(converse())
    assert len(found) == 20 and "there is no model 'nobody'" in str(found[7][1])
    good = [result for result, _ in found if result is not None]
    assert [r.get_response().id for r in good] == [str(i) for i in range(20) if i != 7]
    assert all(np.array_equal(r.as_numpy("y"), expected(repository)) for r in good)


# -- shared memory -----------------------------------------------------------------------------------------------------


@backs(
    "register_system_shared_memory", "get_system_shared_memory_status", "unregister_system_shared_memory",
    "InferInput.set_shared_memory", "InferRequestedOutput.set_shared_memory",
)  # fmt: skip
def test_tensors_in_shared_memory(client: Any, key: str, repository: Path) -> None:
    client.register_system_shared_memory("region", key, 4096, offset=0)
    try:
        (told,) = client.get_system_shared_memory_status().regions.values()
        assert (told.name, told.key, told.byte_size) == ("region", key, 4096)
        assert "region" in client.get_system_shared_memory_status("region", as_json=True)["regions"]
        given = triton.InferInput("x", list(X.shape), "FP32")
        given.set_shared_memory("region", X.nbytes)
        wanted = triton.InferRequestedOutput("y")
        wanted.set_shared_memory("region", 60, offset=1024)
        result = client.infer("chain", [given], outputs=[wanted])
        assert result.get_output("y").parameters["shared_memory_region"].string_param == "region"
        written = Path("/dev/shm" + key).read_bytes()[1024:][:60]
        assert np.array_equal(np.frombuffer(written, np.float32).reshape(5, 3), expected(repository))
        wanted.unset_shared_memory()
        assert np.array_equal(client.infer("chain", [given], outputs=[wanted]).as_numpy("y"), expected(repository))
    finally:
        client.unregister_system_shared_memory("region")
        client.unregister_system_shared_memory()
    assert not client.get_system_shared_memory_status().regions


@backs("register_cuda_shared_memory", "get_cuda_shared_memory_status", "unregister_cuda_shared_memory")
def test_cuda_shared_memory_is_said_not_to_be_there(client: Any) -> None:
    for call in (
        lambda: client.register_cuda_shared_memory("region", b"", 0, 64),
        client.get_cuda_shared_memory_status,
        lambda: client.unregister_cuda_shared_memory("region"),
    ):
        assert "CUDA shared memory is not offered" in fails("UNIMPLEMENTED", call)
    client.unregister_cuda_shared_memory()  # all of them: there are none


# -- settings ----------------------------------------------------------------------------------------------------------


@backs("get_trace_settings", "update_trace_settings")
def test_trace_settings_say_that_nothing_is_traced(client: Any) -> None:
    assert list(client.get_trace_settings().settings["trace_level"].value) == ["OFF"]
    assert client.get_trace_settings("chain", as_json=True)["settings"]["trace_level"]["value"] == ["OFF"]
    assert list(client.update_trace_settings(settings={"trace_level": ["OFF"]}).settings["trace_level"].value) == [
        "OFF"
    ]
    said = fails("UNIMPLEMENTED", client.update_trace_settings, settings={"trace_level": ["TIMESTAMPS"]})
    assert "trace_level stays OFF" in said and "--tracing" in said


@backs("get_log_settings", "update_log_settings")
def test_the_log_level_can_be_changed(client: Any) -> None:
    assert client.get_log_settings().settings["log_info"].bool_param is True
    try:
        assert client.update_log_settings({"log_info": False}).settings["log_info"].bool_param is False
        assert client.get_log_settings(as_json=True)["settings"]["log_warning"]["bool_param"] is True
    finally:
        client.update_log_settings({"log_info": True})
    assert client.get_log_settings().settings["log_info"].bool_param is True


# -- the client itself -------------------------------------------------------------------------------------------------


@backs("register_plugin", "unregister_plugin", "plugin")
def test_a_plugin_may_add_headers(client: Any) -> None:
    seen = []

    class Plugin(triton.InferenceServerClientPlugin):  # type: ignore[misc]
        def __call__(self, request: Any) -> None:
            seen.append(request.headers)
            request.headers["x-plugin"] = "yes"

    plugin = Plugin()
    client.register_plugin(plugin)
    assert client.plugin() is plugin
    assert client.is_server_live() is True and seen
    client.unregister_plugin()


@backs("ssl, root_certificates, private_key, certificate_chain", "KeepAliveOptions", "close")
@pytest.mark.parametrize("kind", KINDS)
def test_tls_with_a_clients_certificate(kind: str, repository: Path, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    server, own = authority.issue("server"), authority.issue("client")
    options = (
        *("--tls-certificate", str(server.certificate), "--tls-key", str(server.key)),
        *("--tls-client-ca", str(authority.certificate)),
    )
    with ServerProcess(repository, *options) as running:
        client = KINDS[kind](
            running.address,
            ssl=True,
            root_certificates=str(authority.certificate),
            private_key=str(own.key),
            certificate_chain=str(own.certificate),
            keepalive_options=triton.KeepAliveOptions(keepalive_time_ms=20_000, keepalive_permit_without_calls=True),
        )
        try:
            assert np.array_equal(client.infer("chain", inputs()).as_numpy("y"), expected(repository))
        finally:
            client.close()


# -- the table ---------------------------------------------------------------------------------------------------------


def test_the_table_has_every_method_and_option_of_both_clients() -> None:
    SURFACE.check_methods()
    SURFACE.check_options("model_name", "inputs", "model_version", "outputs", "request_id")


def test_every_row_is_backed_by_a_test_and_every_test_by_a_row() -> None:
    SURFACE.check_backed()
