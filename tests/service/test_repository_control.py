"""Repositories as Triton's users have them: config.pbtxt, versions, control by request and by polling, mounted volumes.

The clients are tritonclient's; what they are told is compared with what onnxruntime answers.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import tritonclient.grpc as triton
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tests.service.caller import Caller, until
from tests.service.models import INT64, centred, chain, hold, network, save, table, two_by_two

from forwardpass.errors import ForwardpassError
from forwardpass.testing.server_process import ServerProcess

Serve = Callable[..., ServerProcess]
Client = triton.InferenceServerClient
RNG = np.random.default_rng(0)
X = RNG.standard_normal((16, 4)).astype(np.float32)


def given(name: str, array: np.ndarray) -> triton.InferInput:
    tensor = triton.InferInput(name, list(array.shape), triton_type(array))
    tensor.set_data_from_numpy(array)
    return tensor


def triton_type(array: np.ndarray) -> str:
    return {"float32": "FP32", "int64": "INT64"}[array.dtype.name]


def ask(client: Client, model: str, x: np.ndarray = X, version: str = "", **more: Any) -> np.ndarray:
    return np.asarray(client.infer(model, [given("x", x)], model_version=version, **more).as_numpy("y"))


def expected(path: Path, x: np.ndarray = X) -> np.ndarray:
    return np.asarray(onnxruntime.InferenceSession(path).run(None, {"x": x})[0])


def together(client: Client, model: str, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The answers to requests that are all sent before the first answer is waited for."""
    found: dict[int, Any] = {}
    everything = threading.Event()

    def done(place: int) -> Callable[[Any, Any], None]:
        def keep(result: Any, error: Any) -> None:
            found[place] = error or result
            if len(found) == len(arrays):
                everything.set()

        return keep

    for i, array in enumerate(arrays):
        client.async_infer(model, [given("x", array)], done(i))
    assert everything.wait(60)
    return [found[i].as_numpy("y") for i in range(len(arrays))]


def runs(client: Client, model: str) -> dict[int, int]:
    """Rows of a run -> how many there were, as the statistics have it."""
    (stats,) = client.get_inference_statistics(model).model_stats
    return {b.batch_size: b.compute_infer.count for b in stats.batch_stats}


def configured(repository: Path, name: str, text: str, seed: int = 0) -> Path:
    """A small network with a config.pbtxt; the network's file."""
    folder = save(repository, name, chain(seed=seed))
    (repository / name / "config.pbtxt").write_text(text)
    return folder / "model.onnx"


TENSORS = """
input [ { name: "x" data_type: TYPE_FP32 dims: [ 4 ] } ]
output [ { name: "y" data_type: TYPE_FP32 dims: [ 3 ] } ]
"""
# Name -> config.pbtxt, the requests that are sent together, and the runs that must come of it.
BATCHING: dict[str, tuple[str, list[int], dict[int, int]]] = {
    # A delay gathers what comes one by one, up to the largest batch.
    "delayed": (
        'name: "delayed" platform: "onnxruntime_onnx" max_batch_size: 8'
        + TENSORS
        + "dynamic_batching { max_queue_delay_microseconds: 2000000 }",
        [1] * 16,
        {8: 2},
    ),
    # Preferred sizes end the wait; with 12 rows, three batches of four.
    "preferred": (
        "max_batch_size: 8" + TENSORS + "dynamic_batching { preferred_batch_size: [ 4 ] "
        "max_queue_delay_microseconds: 2000000 }",
        [1] * 12,
        {4: 3},
    ),
    # Requests of several rows count by their rows.
    "several_rows": (
        "max_batch_size: 6" + TENSORS + "dynamic_batching { max_queue_delay_microseconds: 2000000 }",
        [3, 3, 3, 3],
        {6: 2},
    ),
    # Without dynamic_batching every request is a run of its own.
    "alone": ("max_batch_size: 8" + TENSORS, [1, 3, 8, 1], {1: 2, 3: 1, 8: 1}),
    # max_batch_size 0: shapes are whole, and a run is a request.
    "unbatched": (
        'input { name: "x" data_type: TYPE_FP32 dims: [ -1, 4 ] }'
        'output { name: "y" data_type: TYPE_FP32 dims: [ -1, 3 ] }',
        [2, 2, 5],
        {1: 3},
    ),
}


@pytest.mark.parametrize("transport", ["direct", "grpcio"])
def test_a_configured_repository_answers_as_onnxruntime_and_batches_as_it_is_told(
    tmp_path: Path, serve: Serve, transport: str
) -> None:
    networks = {name: configured(tmp_path, name, text, i) for i, (name, (text, _, _)) in enumerate(BATCHING.items())}
    server = serve(tmp_path, "--transport", transport)
    with Client(server.address) as client:
        for name, (_, sizes, wanted) in BATCHING.items():
            rows = [X[:n] + i for i, n in enumerate(sizes)]
            for got, x in zip(together(client, name, rows), rows, strict=True):
                assert got.tobytes() == expected(networks[name], x).tobytes(), name
            assert runs(client, name) == wanted, name
            (stats,) = client.get_inference_statistics(name).model_stats
            assert stats.inference_stats.success.count == len(sizes)
            assert stats.inference_stats.queue.count == len(sizes)
            in_rows = name != "unbatched"
            assert stats.inference_count == (sum(sizes) if in_rows else len(sizes))


def test_every_kind_of_option_is_acted_on(tmp_path: Path, serve: Serve) -> None:
    path = configured(
        tmp_path,
        "m",
        """
        name: "m" backend: "onnxruntime" max_batch_size: 8 default_model_filename: "net.onnx"
        input { name: "x" data_type: TYPE_FP32 dims: 4 format: FORMAT_NONE }
        output { name: "y" data_type: TYPE_FP32 dims: 3 label_filename: "labels.txt" }
        version_policy { all { } }
        dynamic_batching {
          preserve_ordering: true priority_levels: 3 default_priority_level: 2
          default_queue_policy { default_timeout_microseconds: 5000000 allow_timeout_override: true max_queue_size: 64 }
        }
        instance_group { count: 2 kind: KIND_CPU }
        optimization { graph { level: 1 } }
        parameters { key: "owner" value { string_value: "the team" } }
        model_warmup {
          name: "first" batch_size: 8 count: 3
          inputs { key: "x" value { data_type: TYPE_FP32 dims: 4 input_data_file: "x.raw" } }
        }
        """,
    )
    path.rename(path.with_name("net.onnx"))
    (tmp_path / "m" / "2").mkdir()
    onnx.save(chain(seed=2), str(tmp_path / "m" / "2" / "net.onnx"))
    (tmp_path / "m" / "labels.txt").write_text("low\nmiddle\nhigh\n")
    (tmp_path / "m" / "warmup").mkdir()
    (tmp_path / "m" / "warmup" / "x.raw").write_bytes(X[:1].tobytes())
    server = serve(tmp_path)
    with Client(server.address) as client:
        for version in ("1", "2"):
            got = ask(client, "m", version=version)
            assert got.tobytes() == expected(tmp_path / "m" / version / "net.onnx").tobytes()
        config = client.get_model_config("m").config
        assert (config.name, config.max_batch_size, config.default_model_filename) == ("m", 8, "net.onnx")
        assert (config.input[0].dims, config.output[0].label_filename) == ([4], "labels.txt")
        assert config.version_policy.WhichOneof("policy_choice") == "all"
        batching = config.dynamic_batching
        assert batching.preserve_ordering and (batching.priority_levels, batching.default_priority_level) == (3, 2)
        assert batching.default_queue_policy.default_timeout_microseconds == 5_000_000
        assert [g.count for g in config.instance_group] == [1]  # one, so that the order is kept
        assert config.optimization.graph.level == 1 and config.parameters["owner"].string_value == "the team"
        assert config.model_warmup[0].inputs["x"].input_data_file == "x.raw"
        # Nothing of what was run beforehand is counted.
        (stats,) = client.get_inference_statistics("m", "1").model_stats
        assert stats.execution_count == stats.inference_stats.success.count * 2  # sixteen rows, eight at a time
        top = triton.InferRequestedOutput("y", class_count=1)
        answer = client.infer("m", [given("x", X[:1])], outputs=[top], model_version="1").as_numpy("y")
        best = int(np.argmax(expected(tmp_path / "m" / "1" / "net.onnx", X[:1])))
        assert answer[0, 0].decode().endswith(f":{best}:{('low', 'middle', 'high')[best]}")
        with pytest.raises(triton.InferenceServerException, match="'priority': expected 1 to 3, or 0"):
            ask(client, "m", priority=4)


@pytest.mark.parametrize("transport", ["direct", "grpcio"])
def test_queue_timeouts_bound_the_wait_and_not_the_run(tmp_path: Path, serve: Serve, transport: str) -> None:
    save(tmp_path, "m", hold())
    (tmp_path / "m" / "config.pbtxt").write_text("""
    max_batch_size: 1
    dynamic_batching {
      priority_levels: 2 default_priority_level: 2
      default_queue_policy { default_timeout_microseconds: 1 }
      priority_queue_policy { key: 1 value { default_timeout_microseconds: 900000000 allow_timeout_override: true } }
    }
    """)
    server = serve(tmp_path, "--transport", transport, "--inline-run-limit", "0", "--instances", "1", "--grace", "0.1")
    caller = Caller(server)
    one, endless = np.zeros((1, 1), np.float32), np.full((1, 1), 1e15, np.float32)
    with Client(server.address) as client:
        for turns in (0.0, 1e5, 0.0, 1e5):  # a tenth of a second: a microsecond bounds the wait, and there is none
            assert ask(client, "m", one + np.float32(turns)).tolist() == [[turns]]
        client.async_infer("m", [given("x", endless)], lambda *_: None)
        until(lambda: caller.metric("forwardpass_running_requests") == 1)
        for more in (
            {},
            {"timeout": 900_000_000},  # may not be overridden
            {"priority": 1, "timeout": 1},  # may be
        ):
            with pytest.raises(
                triton.InferenceServerException, match="ms for an instance and its queue timeout"
            ) as got:
                ask(client, "m", one, **more)  # type: ignore[arg-type]
            assert got.value.status() == "StatusCode.DEADLINE_EXCEEDED"
        assert caller.metric("forwardpass_refused_total", reason="queue_timeout") == 3
        assert caller.metric("forwardpass_running_requests") == 1
    caller.close()


WRONG = [
    ("max_batch_size: 8\n\nresponse_cache { enable: true }", "config.pbtxt:3: response_cache.enable is not supported"),
    ('max_batch_size: 8\ninput { name: "x" dims: [ 5 ] }', "config.pbtxt:2: input 'x': expected dims [4] for one row"),
    ('max_batch_size: 8\noutput {\n name: "z" }', "config.pbtxt:2: output 'z': the network has no such output"),
    ('max_batch_size: 8\ninput { name: "x" data_type: TYPE_FP16 }', ":2: input 'x': expected datatype FP32"),
    ("instance_group {\n gpus: [ 99 ] }", "config.pbtxt:1: instance_group: cuda:99 cannot be had: "),
    ('name: "other"', "config.pbtxt:1: name: expected 'bad', as the folder is called, got 'other'"),
    (
        'model_warmup {\n inputs { key: "x" value { data_type: TYPE_FP32 dims: 9 zero_data: true } } }',
        "config.pbtxt:1: model_warmup: request '': input 'x': expected dims [4], got [9]",
    ),
]


def test_what_cannot_be_served_is_told_by_name_and_line_and_the_rest_serves(tmp_path: Path, serve: Serve) -> None:
    configured(tmp_path, "good", "max_batch_size: 4")
    for i, (text, _) in enumerate(WRONG):
        configured(tmp_path, f"bad{i}", text.replace("'bad'", f"'bad{i}'"))
    server = serve(tmp_path)
    with Client(server.address) as client:
        index = {m.name: m for m in client.get_model_repository_index().models}
        assert index.pop("good").state == "READY"
        for i, (_, reason) in enumerate(WRONG):
            assert index[f"bad{i}"].state == "UNAVAILABLE"
            assert reason.replace("'bad'", f"'bad{i}'") in index[f"bad{i}"].reason
            with pytest.raises(triton.InferenceServerException) as refused:
                ask(client, f"bad{i}")
            assert refused.value.status() == "StatusCode.FAILED_PRECONDITION"
            assert not client.is_model_ready(f"bad{i}")
        assert ask(client, "good").shape == (16, 3)


def test_the_clients_whole_control_surface(tmp_path: Path, serve: Serve) -> None:
    for version in (1, 2):
        save(tmp_path, "m", chain(seed=version), version=version)
    save(tmp_path, "other", table())
    server = serve(tmp_path, "--model-control", "explicit", "--load-model", "m")
    with Client(server.address) as client:
        index = client.get_model_repository_index(as_json=True)["models"]
        assert index == [
            {"name": "m", "version": "2", "state": "READY"},
            {"name": "other", "state": "UNAVAILABLE", "reason": "not loaded"},
        ]
        assert not client.is_model_ready("other")
        client.load_model("other")
        assert client.is_model_ready("other") and client.is_model_ready("other", "1")
        assert client.get_model_metadata("m", as_json=True)["versions"] == ["2"]
        client.load_model("m", config=json.dumps({"version_policy": {"all": {}}, "max_batch_size": 2}))
        assert client.get_model_metadata("m", as_json=True)["versions"] == ["1", "2"]
        assert client.get_model_config("m", as_json=True)["config"]["max_batch_size"] == 2
        for version in ("1", "2"):
            assert (
                ask(client, "m", version=version).tobytes()
                == expected(tmp_path / "m" / version / "model.onnx").tobytes()
            )
        stats = client.get_inference_statistics(as_json=True)["model_stats"]
        assert [(s["name"], s["version"]) for s in stats] == [("m", "1"), ("m", "2"), ("other", "1")]
        client.load_model("m", config="{}", files={"file:7/model.onnx": chain(seed=7).SerializeToString()})
        assert client.get_model_metadata("m", as_json=True)["versions"] == ["7"]
        client.unload_model("other", unload_dependents=True)
        assert not client.is_model_ready("other")
        for call in (client.get_model_config, client.get_model_metadata, client.get_inference_statistics):
            with pytest.raises(triton.InferenceServerException, match="other' is not loaded") as refused:
                call("other")
            assert refused.value.status() == "StatusCode.NOT_FOUND"
        for change in (client.load_model, client.unload_model):
            with pytest.raises(triton.InferenceServerException, match="there is no model 'nothing'"):
                change("nothing")


def test_health_follows_what_is_loaded(tmp_path: Path, serve: Serve) -> None:
    import grpc

    save(tmp_path, "m", chain())
    server = serve(tmp_path, "--model-control", "explicit", "--load-model", "*")
    with grpc.insecure_channel(server.address) as channel, Client(server.address) as client:
        health = health_pb2_grpc.HealthStub(channel)
        watch = health.Watch(health_pb2.HealthCheckRequest(service="m"), timeout=60)
        seen = [next(watch).status]
        client.unload_model("m")
        seen.append(next(watch).status)
        client.load_model("m")
        seen.append(next(watch).status)
        kinds = health_pb2.HealthCheckResponse
        assert seen == [kinds.SERVING, kinds.NOT_SERVING, kinds.SERVING]
        assert health.Check(health_pb2.HealthCheckRequest()).status == kinds.SERVING


def eventually(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come about"
        time.sleep(0.05)


def test_polling_follows_the_folder(tmp_path: Path, serve: Serve) -> None:
    save(tmp_path, "m", chain(seed=1))
    server = serve(tmp_path, "--model-control", "poll", "--poll-seconds", "0.1")
    with Client(server.address) as client:

        def states() -> dict[tuple[str, str], str]:
            return {(m.name, m.version): m.state for m in client.get_model_repository_index().models}

        assert states() == {("m", "1"): "READY"}
        save(tmp_path, "new", table())
        save(tmp_path, "m", chain(seed=2), version=2)
        eventually(lambda: states() == {("m", "2"): "READY", ("new", "1"): "READY"}, "both of them")
        assert ask(client, "m").tobytes() == expected(tmp_path / "m" / "2" / "model.onnx").tobytes()
        (tmp_path / "m" / "config.pbtxt").write_text("max_batch_size: 4 ensemble_scheduling { }")
        eventually(lambda: "is not supported" in str(client.get_model_repository_index()), "the complaint")
        assert ask(client, "m").shape == (16, 3)
        shutil.rmtree(tmp_path / "new")
        eventually(lambda: ("new", "1") not in states(), "its end")
        with pytest.raises(triton.InferenceServerException, match="by request with --model-control explicit"):
            client.load_model("m")


def test_a_server_may_start_with_nothing_where_models_come_later(tmp_path: Path, serve: Serve) -> None:
    (tmp_path / "models").mkdir()
    server = serve(tmp_path / "models", "--model-control", "poll", "--poll-seconds", "0.1")
    with Client(server.address) as client:
        assert client.is_server_ready() and not client.get_model_repository_index().models
        save(tmp_path / "models", "m", chain())
        eventually(lambda: bool(client.get_model_repository_index().models), "the model")
        eventually(lambda: client.is_model_ready("m"), "its readiness")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ForwardpassError, match="no models in"):
        ServerProcess(tmp_path / "empty", "--model-control", "none")


@pytest.mark.parametrize("layout", ["versions", "flat", "kubernetes"])
def test_one_models_folder_is_a_repository(tmp_path: Path, serve: Serve, layout: str) -> None:
    """As KServe mounts at /mnt/models."""
    mounted = tmp_path / "models"
    onnx_file = save(tmp_path, "source", chain(seed=3)) / "model.onnx"
    config = 'name: "scores" max_batch_size: 4 dynamic_batching { }'
    if layout == "kubernetes":
        (mounted / "..2024" / "1").mkdir(parents=True)
        shutil.copy(onnx_file, mounted / "..2024" / "1")
        (mounted / "..2024" / "config.pbtxt").write_text(config)
        (mounted / "..data").symlink_to("..2024")
        for name in ("1", "config.pbtxt"):
            (mounted / name).symlink_to(f"..data/{name}")
    else:
        folder = mounted / "1" if layout == "versions" else mounted
        folder.mkdir(parents=True)
        shutil.copy(onnx_file, folder)
        (mounted / "config.pbtxt").write_text(config)
    with Client(serve(mounted).address) as client:
        assert ask(client, "scores").tobytes() == expected(onnx_file).tobytes()
        assert client.get_model_config("scores").config.max_batch_size == 4
    with Client(serve(mounted, "--model-name", "told").address) as client:
        assert ask(client, "told", version="1").tobytes() == expected(onnx_file).tobytes()


def test_weights_in_files_of_their_own_are_served_from_within_the_folder_alone(tmp_path: Path, serve: Serve) -> None:
    for name in ("inside", "outside"):
        folder = tmp_path / "models" / name / "1"
        folder.mkdir(parents=True)
        onnx.save(
            chain((4, 64, 3), seed=4),
            str(folder / "model.onnx"),
            save_as_external_data=True,
            location="weights.bin",
            size_threshold=0,
        )
    (folder / "weights.bin").rename(tmp_path / "secret.bin")
    (folder / "weights.bin").symlink_to(tmp_path / "secret.bin")
    whole = save(tmp_path, "whole", chain((4, 64, 3), seed=4)) / "model.onnx"
    with Client(serve(tmp_path / "models").address) as client:
        assert ask(client, "inside").tobytes() == expected(whole).tobytes()
        index = {m.name: m for m in client.get_model_repository_index().models}
        assert "'weights.bin', a link out of the model's folder" in index["outside"].reason


def test_networks_of_several_tensors_and_of_fixed_shape(tmp_path: Path, serve: Serve) -> None:
    save(tmp_path, "several", two_by_two())
    (tmp_path / "several" / "config.pbtxt").write_text(
        """
        max_batch_size: 4
        input [ { name: "n" data_type: TYPE_INT64 dims: 1 }, { name: "a" data_type: TYPE_FP32 dims: 3 } ]
        output { name: "sum" data_type: TYPE_FP32 dims: 3 }
        dynamic_batching { }
        """
    )
    fixed = network([onnx.helper.make_node("Neg", ["x"], ["y"])], [("x", INT64, [2, 3])], [("y", INT64, [2, 3])])
    save(tmp_path, "fixed", fixed)
    (tmp_path / "fixed" / "config.pbtxt").write_text('input { name: "x" data_type: TYPE_INT64 dims: [ 2, 3 ] }')
    save(tmp_path, "dependent", centred())
    (tmp_path / "dependent" / "config.pbtxt").write_text("max_batch_size: 8 dynamic_batching { }")
    a, n = X[:2, :3], np.array([[1], [2]], np.int64)
    with Client(serve(tmp_path).address) as client:
        answer = client.infer("several", [given("a", a), given("n", n)])
        assert [o.name for o in answer.get_response().outputs] == ["sum"]  # the others for those who ask
        assert np.array_equal(answer.as_numpy("sum"), a + n.astype(np.float32))
        most = client.infer("several", [given("a", a), given("n", n)], outputs=[triton.InferRequestedOutput("most")])
        assert np.array_equal(most.as_numpy("most"), a.max(axis=1))
        x = np.arange(6).reshape(2, 3)
        assert np.array_equal(ask(client, "fixed", x), -x)
        with pytest.raises(triton.InferenceServerException, match=r"expected shape \[2,3\], got \[1,3\]"):
            ask(client, "fixed", x[:1])
        assert client.get_model_config("fixed").config.max_batch_size == 0
        # Its rows depend on each other, so nobody's are put together, whatever it asks for.
        config = client.get_model_config("dependent").config
        assert config.max_batch_size == 8 and not config.HasField("dynamic_batching")
        got = together(client, "dependent", [a, a + 1, a * 2])
        assert [np.allclose(g, r - r.mean(axis=0)) for g, r in zip(got, (a, a + 1, a * 2), strict=True)] == [True] * 3
        assert runs(client, "dependent") == {2: 3}
