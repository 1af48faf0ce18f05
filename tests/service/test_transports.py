"""Two transports, one server behind them: whichever answers, a client sees equal bytes, codes, words and metadata."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
import tritonclient.grpc as triton
from caller import Caller, Refused, outputs, packed, request, threads, until

from forwardpass import protocol
from forwardpass.testing.server_process import ServerProcess

TIMINGS = (("forwardpass-timings", "1"),)
X = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("repository")
    models.save(root, "chain", models.chain(), "priority_levels = 2\n")
    models.save(root, "two", models.two_by_two())
    models.save(root, "text", models.echo(models.STRING))
    models.save(root, "table", models.table())
    models.save(root, "allocate", models.allocate())
    models.save(root, "double", models.twice_the_rows())
    models.save(root, "busy", models.chain((4, 1500, 1500, 3)), "instances = 1\n")
    (models.save(root, "broken", models.chain()) / "model.onnx").write_bytes(b"junk")
    return root


@pytest.fixture(scope="module")
def sinks(repository: Path) -> Iterator[tuple[Caller, Caller]]:
    """The same repository behind the direct transport and behind the other."""
    options = ["--max-message-bytes", "1000000", "--max-batch-size", "64"]
    with (
        ServerProcess(repository, "--transport", "direct", *options) as direct,
        ServerProcess(repository, "--transport", "grpcio", *options) as grpcio,
    ):
        made = Caller(direct), Caller(grpcio)
        yield made
        for caller in made:
            until(caller.idle)
            caller.close()


def asked(message: Any, **parameters: int) -> Any:
    for key, value in parameters.items():
        message.parameters[key].int64_param = value
    return message


def wanting(message: Any, *names: str) -> Any:
    for name in names:
        message.outputs.add(name=name)
    return message


def bad_text() -> Any:
    message = request("text", np.array([["a", "b"]], object))
    message.raw_input_contents[:] = [packed(["a", "b"])[:-1] + b"\xff"]
    return message


MESSAGES: dict[str, Any] = {
    "plain": request("chain", X),
    "again": request("chain", X + 1),
    "typed": request("chain", X, typed=True),
    "with an id": request("chain", X, id="é 1"),
    "with a version": request("chain", X, model_version="1"),
    "no rows": request("chain", X[:0]),
    "many rows": request("chain", np.resize(X, (500, 4))),
    "two inputs": request("two", X[:, :3], np.ones((3, 1), np.int64), names=["a", "n"]),
    "two outputs": wanting(request("two", X[:, :3], np.ones((3, 1), np.int64), names=["a", "n"]), "most", "sum"),
    "text": request("text", np.array([["", "日本"]], object)),
    "no batch axis": request("double", X[:, :3]),
    "priority": asked(request("chain", X), priority=2, timeout=10_000_000),
    "empty": b"",
    "junk": b"\xff\x00\xff",
    "no model": request("nobody\n\x1b é", X),
    "no version": request("chain", X, model_version="9"),
    "failed model": request("broken", X),
    "long name": request("n" * 5000, X),
    "wrong input": request("chain", X, names=["é\n"]),
    "wrong datatype": request("chain", X.astype(np.float64)),
    "wrong shape": request("chain", X[:, :2]),
    "wrong output": wanting(request("chain", X), "z"),
    "wrong priority": asked(request("chain", X), priority=3),
    "bad text": bad_text(),
    "poison": request("table", np.array([[77]])),
    "no memory": request("allocate", np.array([[1 << 47]])),
    "no time": asked(request("chain", X), timeout=1),
    "too many rows": request("chain", np.zeros((65537, 1), np.float32)),
}


@pytest.mark.parametrize("case", MESSAGES)
@pytest.mark.parametrize("metadata", [(), TIMINGS], ids=["", "timings"])
def test_both_doors_say_the_same(sinks: tuple[Caller, Caller], case: str, metadata: Any) -> None:
    """Answers to the byte, refusals to the word, and what comes along by name; figures aside."""
    found = []
    for caller in sinks:
        try:
            answer, trailers = caller.send(MESSAGES[case], metadata=metadata)
            found.append(("OK", answer, sorted(trailers)))
        except Refused as refused:
            found.append((refused.code, without_figures(refused.text), sorted(refused.trailers)))
    assert found[0] == found[1]
    assert bool(found[0][2]) == (found[0][0] == "OK" and metadata == TIMINGS)


def without_figures(text: str) -> str:
    """A time that was left or missed, or memory that is left, is another at each call."""
    varies = "deadline" in text or "not enough memory" in text
    return "".join("#" if c.isdigit() else c for c in text) if varies else text


@pytest.mark.parametrize("method", sorted(set(protocol.METHODS) - {"ModelInfer", "ModelStreamInfer"}))
@pytest.mark.parametrize("data", [b"", b"\xff\xff"], ids=["empty", "junk"])
def test_all_other_methods_are_the_same_by_way_of_the_direct_door(
    sinks: tuple[Caller, Caller], method: str, data: bytes
) -> None:
    """They are passed on to the other transport; names of services and of models included."""
    named = {"ModelMetadata", "ModelConfig", "ModelStatistics", "ModelReady"}
    if not data and method in named:
        data = protocol.METHODS[method].request(name="chain").SerializeToString()
    found = []
    for caller in sinks:
        try:
            answer, _ = caller.send(data, path=protocol.METHODS[method].path)
            # As messages: protobuf writes maps in any order. What was counted, and when, differs.
            response = protocol.METHODS[method].response.FromString(answer)
            found.append("OK" if method == "ModelStatistics" else response)
        except Refused as refused:
            found.append(f"{refused.code}: {refused.text}")
    assert found[0] == found[1]


def test_both_doors_of_one_server_feed_one_queue(sinks: tuple[Caller, Caller]) -> None:
    """Unary calls come in by the direct transport, streamed ones by the other: they share runs, and nobody's answer is
    another's."""
    direct = sinks[0]
    rng = np.random.default_rng(1)
    streamed = [rng.standard_normal((1, 4)).astype(np.float32) for _ in range(60)]
    expected = {str(i): outputs(direct.send(request("busy", x))[0])[0] for i, x in enumerate(streamed)}
    runs, answered = direct.metric("forwardpass_batches_total", model="busy"), []
    done = threading.Event()

    def heard(result: Any, error: Any) -> None:
        assert error is None, error
        response = result.get_response()
        answered.append((response.id, result.as_numpy("y")))
        if len(answered) == len(streamed):
            done.set()

    def unary(seed: int) -> None:
        mine = np.random.default_rng(100 + seed)
        for _ in range(15):
            x = mine.standard_normal((2, 4)).astype(np.float32)
            (y,) = direct.infer("busy", x)
            sent[seed].append((x, y))

    sent: list[list[Any]] = [[] for _ in range(4)]
    client = triton.InferenceServerClient(direct.server.address)
    client.start_stream(callback=heard)
    with threads(4, unary):
        for i, x in enumerate(streamed):
            tensor = triton.InferInput("x", x.shape, "FP32")
            tensor.set_data_from_numpy(x)
            client.async_stream_infer("busy", [tensor], request_id=str(i))
        assert done.wait(60)
    client.stop_stream()
    client.close()
    assert direct.metric("forwardpass_batches_total", model="busy") - runs < 120  # requests that were sent
    assert sorted(int(i) for i, _ in answered) == list(range(60))
    assert all(np.allclose(y, expected[i], atol=1e-4) for i, y in answered)
    assert all(np.allclose(y, direct.infer("busy", x)[0], atol=1e-4) for pairs in sent for x, y in pairs)
