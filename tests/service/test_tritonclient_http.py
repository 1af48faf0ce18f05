"""Every method of tritonclient's HTTP clients, sync (geventhttpclient) and asyncio (aiohttp), against a real server.

As `test_tritonclient_grpc.py` has it for the gRPC clients; the table is that of docs/compatibility.md for HTTP.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
from caller import Caller, request, until
from certificates import Authority
from http_caller import HttpCaller
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

triton = pytest.importorskip("tritonclient.http", reason="tritonclient[http] is not installed")
triton_aio = pytest.importorskip("tritonclient.http.aio", reason="tritonclient[http] is not installed")

SURFACE = Surface("tritonclient over HTTP", triton, triton_aio)


class Client(triton.InferenceServerClient):  # type: ignore[misc]
    """The sync client, closed by its test alone: gevent forbids it in any other thread, such as the collector's."""

    def __del__(self) -> None:
        pass


KINDS = {"sync": Client, "aio": partial(AsyncioClient, triton_aio)}
backs = SURFACE.backs
key = pytest.fixture(shared_memory_key)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_models(tmp_path_factory.mktemp("surface"))


@pytest.fixture(scope="module")
def running(repository: Path) -> Iterator[ServerProcess]:
    # All are loaded at the start, and may be unloaded and loaded again.
    with ServerProcess(repository, "--model-control", "explicit", "--load-model", "*") as server:
        yield server
        assert server.stop() == 0, server.tail()


@pytest.fixture(params=KINDS)
def client(request: pytest.FixtureRequest, running: ServerProcess) -> Iterator[Any]:
    found = KINDS[request.param](address(running))
    yield found
    found.close()


def address(server: ServerProcess) -> str:
    return server.http_url.partition("://")[2]


def inputs(
    array: np.ndarray[Any, Any] = X, name: str = "x", datatype: str = "FP32", binary_data: bool = True
) -> list[Any]:
    tensor = triton.InferInput(name, list(array.shape), datatype)
    tensor.set_data_from_numpy(array, binary_data=binary_data)
    return [tensor]


def fails(status: int, call: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """That a call fails with this status; its text."""
    with pytest.raises(triton.InferenceServerException) as caught:
        call(*args, **kwargs)
    assert caught.value.status() == str(status), caught.value
    return str(caught.value.message())


# -- state -------------------------------------------------------------------------------------------------------------


@backs("is_server_live", "is_server_ready", "is_model_ready")
def test_what_lives_and_what_is_ready(client: Any) -> None:
    assert client.is_server_live() is True and client.is_server_ready() is True
    assert client.is_model_ready("chain") is True and client.is_model_ready("chain", "1") is True
    assert client.is_model_ready("chain", "2") is False and client.is_model_ready("nobody") is False


@backs("get_server_metadata")
def test_the_server_says_who_it_is_and_what_works(client: Any) -> None:
    told = client.get_server_metadata()
    assert (told["name"], told["version"]) == ("forwardpass", __version__)
    assert {"binary_tensor_data", "statistics", "system_shared_memory"} <= set(told["extensions"])


@backs("get_model_metadata")
def test_a_models_interface(client: Any) -> None:
    told = client.get_model_metadata("chain")
    assert (told["name"], told["versions"], told["platform"]) == ("chain", ["1"], "onnxruntime_onnx")
    assert [(t["name"], t["datatype"], t["shape"]) for t in told["inputs"]] == [("x", "FP32", [-1, 4])]
    assert [(t["name"], t["datatype"], t["shape"]) for t in told["outputs"]] == [("y", "FP32", [-1, 3])]
    assert client.get_model_metadata("chain", "1") == told
    assert "there is no model 'nobody'" in fails(404, client.get_model_metadata, "nobody")


@backs("get_model_config")
def test_a_models_options(client: Any) -> None:
    told = client.get_model_config("chain")
    assert (told["name"], told["max_batch_size"]) == ("chain", 16)
    assert [(t["name"], t["data_type"], t["dims"]) for t in told["input"]] == [("x", "TYPE_FP32", [4])]
    assert [(t["name"], t["data_type"], t["dims"]) for t in told["output"]] == [("y", "TYPE_FP32", [3])]
    assert client.get_model_config("chain", "1") == told


@backs("get_inference_statistics")
def test_what_was_counted(client: Any) -> None:
    def statistics() -> Any:
        (told,) = client.get_inference_statistics("chain", "1")["model_stats"]
        return told

    before = statistics()
    for _ in range(3):
        client.infer("chain", inputs())
    after = statistics()
    assert (after["name"], after["version"]) == ("chain", "1")
    assert after["inference_count"] - before["inference_count"] == 3 * len(X)
    assert after["execution_count"] - before["execution_count"] == 3
    success = [told["inference_stats"]["success"] for told in (before, after)]
    assert success[1]["count"] - success[0]["count"] == 3 and success[1]["ns"] > success[0]["ns"]
    assert {told["batch_size"] for told in after["batch_stats"]} >= {len(X)}
    assert {told["name"] for told in client.get_inference_statistics()["model_stats"]} == MODELS


# -- the repository ----------------------------------------------------------------------------------------------------


@backs("get_model_repository_index", "load_model", "unload_model")
def test_models_come_and_go(client: Any, repository: Path) -> None:
    def index() -> dict[str, str]:
        return {told["name"]: told["state"] for told in client.get_model_repository_index()}

    assert index()["two"] == "READY"
    client.unload_model("two", unload_dependents=True)
    assert index()["two"] != "READY" and client.is_model_ready("two") is False
    assert "'two'" in fails(404, client.infer, "two", inputs())
    client.load_model("two")
    assert index()["two"] == "READY" and client.is_model_ready("two") is True
    # With a configuration in place of the one on disk, and with a file in place of the folder.
    client.load_model("two", config='{"max_batch_size": 3}')
    assert client.get_model_config("two")["max_batch_size"] == 3
    given = {"file:1/model.onnx": (repository / "chain" / "1" / "model.onnx").read_bytes()}
    if isinstance(client, AsyncioClient):
        with pytest.raises(NameError, match="name 'base64' is not defined"):
            client.load_model("two", config='{"max_batch_size": 8}', files=given)
    else:
        client.load_model("two", config='{"max_batch_size": 8}', files=given)
        assert [told["name"] for told in client.get_model_metadata("two")["inputs"]] == ["x"]
    client.load_model("two")
    assert [told["name"] for told in client.get_model_metadata("two")["inputs"]] == ["a", "n"]
    assert "'nobody'" in fails(404, client.load_model, "nobody")


# -- inference ---------------------------------------------------------------------------------------------------------


@backs("infer", "InferInput", "InferResult", "InferRequestedOutput")
@pytest.mark.parametrize("binary", [True, False], ids=["binary", "json"])
def test_rows_in_and_rows_out(client: Any, repository: Path, binary: bool) -> None:
    (given,) = inputs(binary_data=binary)
    assert (given.name(), given.datatype(), given.shape()) == ("x", "FP32", [5, 4])
    wanted = triton.InferRequestedOutput("y", binary_data=binary)
    result = client.infer("chain", [given], "1", [wanted], request_id="mine")
    assert np.array_equal(result.as_numpy("y"), expected(repository))
    assert (result.get_output("y")["name"], result.get_response()["id"]) == ("y", "mine")
    assert ("data" in result.get_output("y")) is not binary
    assert result.get_response()["model_version"] == "1"
    assert np.array_equal(client.infer("chain", [given]).as_numpy("y"), expected(repository))
    given.set_shape([4, 4])
    assert "'x'" in fails(400, client.infer, "chain", [given])
    assert "'z'" in fails(400, client.infer, "chain", inputs(), outputs=[triton.InferRequestedOutput("z")])


@backs("InferInput", "InferResult")
@pytest.mark.parametrize("binary", [True, False], ids=["binary", "json"])
@pytest.mark.parametrize("datatype", models.ELEMENTS)
def test_every_datatype_comes_back_as_it_was(client: Any, datatype: str, binary: bool) -> None:
    array = elements(datatype)
    # The client writes BF16 as binary data alone; as JSON it is read.
    given = inputs(array, "x", datatype, binary or datatype == "BF16")
    wanted = [triton.InferRequestedOutput("y", binary_data=binary)]
    assert same(client.infer(f"echo_{datatype}", given, outputs=wanted).as_numpy("y"), array)


@backs("InferInput", "InferRequestedOutput")
def test_binary_and_json_tensors_in_one_request(client: Any) -> None:
    a, n = np.array([[1, 2, 3]], np.float32), np.array([[4]], np.int64)
    given = inputs(a, "a") + inputs(n, "n", "INT64", binary_data=False)
    wanted = [triton.InferRequestedOutput(name, binary_data=name == "sum") for name in ("n_out", "sum")]
    result = client.infer("two", given, outputs=wanted)
    assert result.as_numpy("sum").tolist() == [[5, 6, 7]] and result.as_numpy("n_out").tolist() == [[4]]


@backs("infer: class_count")
@pytest.mark.parametrize("binary", [True, False], ids=["binary", "json"])
def test_the_largest_classes_with_their_labels(client: Any, repository: Path, binary: bool) -> None:
    logits = expected(repository)
    wanted = triton.InferRequestedOutput("y", binary_data=binary, class_count=2)
    found = client.infer("chain", inputs(), outputs=[wanted]).as_numpy("y")
    rows = [[f"{row[i]:f}:{i}:{LABELS[i]}" for i in np.argsort(-row)[:2]] for row in logits]
    assert same(found, np.array(rows, object))


@backs("infer: parameters", "infer: headers", "infer: query_params")
def test_parameters_headers_and_queries_of_ones_own_do_no_harm(client: Any, repository: Path) -> None:
    said = {"text": "yes", "count": 3, "flag": True, "share": 0.5}
    result = client.infer(
        "chain", inputs(), parameters=said, headers={"x-mine": "yes"}, query_params={"mine": "yes", "more": [1, 2]}
    )
    assert np.array_equal(result.as_numpy("y"), expected(repository))
    assert client.get_server_metadata(headers={"x-mine": "yes"}, query_params={"mine": 1})["name"] == "forwardpass"


@backs("infer: priority", "infer: timeout")
def test_priority_and_timeout(client: Any) -> None:
    assert client.infer("chain", inputs(), priority=2, timeout=10_000_000).as_numpy("y").shape == (5, 3)
    assert "expected 1 to 2" in fails(400, client.infer, "chain", inputs(), priority=3)


@backs("infer: timeout", "infer: X-Request-Timeout in headers", "network_timeout, conn_timeout")
@pytest.mark.parametrize("kind", KINDS)
def test_timeouts_bound_the_wait_for_an_instance(repository: Path, kind: str) -> None:
    patience = {"sync": {"network_timeout": 0.5}, "aio": {"conn_timeout": 0.5}}[kind]
    with ServerProcess(repository, "--inline-run-limit", "0", "--grace", "0.1") as server:
        caller, client = Caller(server), KINDS[kind](address(server))
        # Both instances are held until the server ends, so that the next request waits.
        holders = []
        for busy in (1, 2):  # one by one: together they would share a run
            holders.append(caller.start(request("hold", np.full((1, 1), 1e15, np.float32))))
            until(lambda busy=busy: caller.metric("forwardpass_running_requests") == busy)  # type: ignore[misc]
        said = fails(504, client.infer, "hold", inputs(np.zeros((1, 1), np.float32)), timeout=1)
        assert "its queue timeout is 0.0 ms" in said
        fails(504, client.infer, "hold", inputs(X[:1, :1]), headers={"X-Request-Timeout": "0.2"})
        # A client that gives up by itself hangs up, which cancels its request.
        hasty = KINDS[kind](address(server), **patience)
        with pytest.raises(TimeoutError):
            hasty.infer("hold", inputs(X[:1, :1]))
        hasty.close()
        until(lambda: caller.metric("forwardpass_queue_requests") == 0)
        assert not any(holder.done() for holder in holders)
        client.close()
        assert server.stop() == 0
        caller.close()


@backs("infer: request_compression_algorithm", "infer: response_compression_algorithm")
@pytest.mark.parametrize("binary", [True, False], ids=["binary", "json"])
@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_compressed_both_ways(client: Any, coding: str, binary: bool) -> None:
    rows = np.zeros((200, 2), np.float32)
    wanted = [triton.InferRequestedOutput("y", binary_data=binary)]

    def found(**options: Any) -> Any:
        result = client.infer("echo_FP32", inputs(rows, binary_data=binary), outputs=wanted, **options)
        return result.as_numpy("y")

    if isinstance(client, AsyncioClient):
        with pytest.raises(NameError, match=r"name '(gzip|zlib)' is not defined"):
            found(request_compression_algorithm=coding)
    else:
        assert np.array_equal(found(request_compression_algorithm=coding), rows)
    assert np.array_equal(found(response_compression_algorithm=coding), rows)


@backs("infer: sequence_id, sequence_start, sequence_end")
def test_a_sequence_is_refused_by_name(client: Any) -> None:
    said = fails(400, client.infer, "chain", inputs(), sequence_id=7, sequence_start=True)
    assert "'sequence_" in said


@backs("async_infer", "InferAsyncRequest", "concurrency, max_greenlets, conn_limit")
def test_calls_side_by_side(running: ServerProcess, repository: Path) -> None:
    with Client(address(running), concurrency=8, max_greenlets=8) as client:
        pending = [client.async_infer("chain", inputs(), request_id=str(i)) for i in range(32)]
        failing = client.async_infer("nobody", inputs())
        results = [call.get_result(timeout=SECONDS) for call in pending]
        assert [result.get_response()["id"] for result in results] == [str(i) for i in range(32)]
        assert all(np.array_equal(result.as_numpy("y"), expected(repository)) for result in results)
        assert "there is no model 'nobody'" in fails(404, failing.get_result)


@backs("concurrency, max_greenlets, conn_limit")
def test_coroutines_side_by_side(running: ServerProcess, repository: Path) -> None:
    client = AsyncioClient(triton_aio, address(running), conn_limit=8)

    async def many() -> list[Any]:
        return await asyncio.gather(*(client.client.infer("chain", inputs(), request_id=str(i)) for i in range(64)))

    results = client.run(many())
    assert [result.get_response()["id"] for result in results] == [str(i) for i in range(64)]
    assert all(np.array_equal(result.as_numpy("y"), expected(repository)) for result in results)
    client.close()


@backs("generate_request_body", "parse_response_body")
@pytest.mark.parametrize("binary", [True, False], ids=["binary", "json"])
def test_bodies_made_and_read_apart_from_a_client(running: ServerProcess, repository: Path, binary: bool) -> None:
    kind = Client
    wanted = [triton.InferRequestedOutput("y", binary_data=binary)]
    body, length = kind.generate_request_body(inputs(binary_data=binary), outputs=wanted, request_id="mine")
    assert (length is None) is not binary
    caller = HttpCaller(running.http_url)
    answer = caller.infer("chain", body, **({"inference_header_content_length": str(length)} if binary else {}))
    caller.close()
    size = answer.headers.get("inference-header-content-length")
    result = kind.parse_response_body(answer.body, header_length=None if size is None else int(size))
    assert result.get_response()["id"] == "mine"
    assert np.array_equal(result.as_numpy("y"), expected(repository))


# -- shared memory -----------------------------------------------------------------------------------------------------


@backs(
    "register_system_shared_memory", "get_system_shared_memory_status", "unregister_system_shared_memory",
    "InferInput.set_shared_memory", "InferRequestedOutput.set_shared_memory",
)  # fmt: skip
def test_tensors_in_shared_memory(client: Any, key: str, repository: Path) -> None:
    client.register_system_shared_memory("my region", key, 4096, offset=0)
    try:
        (told,) = client.get_system_shared_memory_status()
        assert (told["name"], told["key"], told["byte_size"], told["offset"]) == ("my region", key, 4096, 0)
        assert client.get_system_shared_memory_status("my region") == [told]
        assert "'nobody'" in fails(404, client.get_system_shared_memory_status, "nobody")
        given = triton.InferInput("x", list(X.shape), "FP32")
        given.set_shared_memory("my region", X.nbytes)
        wanted = triton.InferRequestedOutput("y")
        wanted.set_shared_memory("my region", 60, offset=1024)
        result = client.infer("chain", [given], outputs=[wanted])
        assert result.get_output("y") == {"name": "y", "datatype": "FP32", "shape": [5, 3]}
        written = Path("/dev/shm" + key).read_bytes()[1024:][:60]
        assert np.array_equal(np.frombuffer(written, np.float32).reshape(5, 3), expected(repository))
        wanted.unset_shared_memory()
        assert np.array_equal(client.infer("chain", [given], outputs=[wanted]).as_numpy("y"), expected(repository))
    finally:
        client.unregister_system_shared_memory("my region")
        client.unregister_system_shared_memory()
    assert client.get_system_shared_memory_status() == []


@backs("register_cuda_shared_memory", "get_cuda_shared_memory_status", "unregister_cuda_shared_memory")
def test_cuda_shared_memory_is_said_not_to_be_there(client: Any) -> None:
    for call in (
        lambda: client.register_cuda_shared_memory("region", "aGFuZGxl", 0, 64),
        client.get_cuda_shared_memory_status,
        lambda: client.unregister_cuda_shared_memory("region"),
    ):
        assert "CUDA shared memory is not offered" in fails(501, call)
    client.unregister_cuda_shared_memory()  # all of them: there are none


# -- settings ----------------------------------------------------------------------------------------------------------


@backs("get_trace_settings", "update_trace_settings")
def test_trace_settings_say_that_nothing_is_traced(client: Any) -> None:
    assert client.get_trace_settings()["trace_level"] == ["OFF"]
    assert client.get_trace_settings("chain")["trace_level"] == ["OFF"]
    assert client.update_trace_settings(settings={"trace_level": ["OFF"]})["trace_level"] == ["OFF"]
    said = fails(501, client.update_trace_settings, "chain", settings={"trace_level": ["TIMESTAMPS"]})
    assert "trace_level stays OFF" in said and "--tracing" in said


@backs("get_log_settings", "update_log_settings")
def test_the_log_level_can_be_changed(client: Any) -> None:
    assert client.get_log_settings()["log_info"] is True
    try:
        assert client.update_log_settings({"log_info": False})["log_info"] is False
        assert client.get_log_settings()["log_warning"] is True
    finally:
        client.update_log_settings({"log_info": True})
    assert client.get_log_settings()["log_info"] is True


# -- the client itself -------------------------------------------------------------------------------------------------


@backs("register_plugin", "unregister_plugin", "plugin", "infer: headers")
@pytest.mark.parametrize("kind", KINDS)
def test_a_token_by_header_or_by_plugin(kind: str, repository: Path, tmp_path: Path) -> None:
    class Plugin(triton.InferenceServerClientPlugin):  # type: ignore[misc]
        def __call__(self, request: Any) -> None:
            request.headers["authorization"] = "Bearer infer-infer-infer"

    tokens = tmp_path / "tokens"
    tokens.write_text("infer infer-infer-infer\nadmin admin-admin-admin\n")
    with ServerProcess(repository, "--tokens", str(tokens)) as server:
        client, plugin = KINDS[kind](address(server)), Plugin()
        assert "Bearer TOKEN" in fails(401, client.infer, "chain", inputs())
        result = client.infer("chain", inputs(), headers={"Authorization": "Bearer infer-infer-infer"})
        assert np.array_equal(result.as_numpy("y"), expected(repository))
        client.register_plugin(plugin)
        assert client.plugin() is plugin
        assert np.array_equal(client.infer("chain", inputs()).as_numpy("y"), expected(repository))
        assert "admin" in fails(403, client.update_log_settings, {"log_info": True})
        client.unregister_plugin()
        assert client.is_server_live() is True
        fails(401, client.infer, "chain", inputs())
        client.close()


@pytest.mark.filterwarnings("ignore:ssl:DeprecationWarning")  # geventhttpclient's
@backs("ssl, ssl_options, ssl_context_factory, insecure, ssl_context", "close")
@pytest.mark.parametrize("way", ["ssl_options", "ssl_context_factory", "ssl_context"])
def test_tls_with_a_clients_certificate(way: str, repository: Path, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    server, own = authority.issue("server"), authority.issue("client")

    def context(kind: Any) -> Any:
        found = kind(ssl.PROTOCOL_TLS_CLIENT)
        found.load_verify_locations(str(authority.certificate))
        found.load_cert_chain(str(own.certificate), str(own.key))
        return found

    options = (
        *("--tls-certificate", str(server.certificate), "--tls-key", str(server.key)),
        *("--tls-client-ca", str(authority.certificate)),
    )
    with ServerProcess(repository, *options) as running:
        client: Any
        if way == "ssl_context":
            client = AsyncioClient(triton_aio, address(running), ssl=True, ssl_context=context(ssl.SSLContext))
        elif way == "ssl_context_factory":
            import gevent.ssl

            factory = partial(context, gevent.ssl.SSLContext)
            client = Client(address(running), ssl=True, ssl_context_factory=factory)
        else:
            files = {"keyfile": str(own.key), "certfile": str(own.certificate), "ca_certs": str(authority.certificate)}
            client = Client(address(running), ssl=True, ssl_options=files, insecure=True)
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
