"""What the server is for, over both transports, by a foreign client: answers are ONNX Runtime's, bit for bit."""

from __future__ import annotations

import random
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import models
import numpy as np
import onnxruntime
import pytest
import tritonclient.grpc as triton
from caller import Caller, outputs, request, threads, until
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException

from forwardpass import protocol
from forwardpass.testing.server_process import ServerProcess

DIGITS = Path(__file__).parents[2] / "models" / "digits" / "data.py"


@pytest.fixture(scope="module")
def held_out() -> NDArray[np.float32]:
    """The digits that the network was never trained on: x [360, 64]."""
    x, _ = runpy.run_path(str(DIGITS))["held_out"]()
    return np.asarray(x, np.float32)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory, digits_repository: Path) -> Path:
    """The trained digits, and a network for everything else that the protocol can say."""
    root = tmp_path_factory.mktemp("repository")
    (root / "digits").symlink_to(digits_repository / "digits")
    models.save(root, "two", models.two_by_two(), "priority_levels = 3\n")
    models.save(root, "large", models.chain((64, 4096, 4096, 10)), "instances = 1\nmax_batch_size = 64\n")
    models.save(root, "mean", models.centred())
    models.save(root, "double", models.twice_the_rows())
    for name, element in models.ELEMENTS.items():
        models.save(root, f"echo_{name}", models.echo(element))
    return root


@pytest.fixture(scope="module", params=["direct", "grpcio"])
def caller(request: pytest.FixtureRequest, repository: Path) -> Iterator[Caller]:
    with ServerProcess(repository, "--transport", request.param, "--max-batch-size", "64") as server:
        made = Caller(server)
        yield made
        until(made.idle)
        made.close()
        assert server.stop() == 0, server.tail()


def digits_session(repository: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(str(repository / "digits/1/model.onnx"), providers=["CPUExecutionProvider"])


def test_tritonclient_gets_onnxruntimes_bits(caller: Caller, repository: Path, held_out: NDArray[np.float32]) -> None:
    """Eight clients at once, 1 to 40 rows a request, every held-out digit by each of them."""
    session = digits_session(repository)

    def work(seed: int) -> None:
        rng = random.Random(seed)
        client = triton.InferenceServerClient(caller.server.address)
        start = 0
        while start < len(held_out):
            x = held_out[start : start + rng.randint(1, 40)]
            tensor = triton.InferInput("x", x.shape, "FP32")
            tensor.set_data_from_numpy(x)
            logits = client.infer("digits", [tensor]).as_numpy("logits")
            assert logits.tobytes() == session.run(None, {"x": x})[0].tobytes()
            start += len(x)
        client.close()

    with threads(8, work):
        pass
    assert caller.metric("forwardpass_rows_total", model="digits") >= 8 * len(held_out)


def test_requests_of_many_clients_share_a_run(caller: Caller, repository: Path) -> None:
    """64 calls in flight, a row each, of a network that takes longer than its transport: more than four rows a run."""
    session = onnxruntime.InferenceSession(str(repository / "large/1/model.onnx"))
    before = [caller.metric(f"forwardpass_batch_rows_{what}", model="large") for what in ("sum", "count")]
    rng = np.random.default_rng(0)
    for _ in range(3):
        rows = [rng.standard_normal((1, 64)).astype(np.float32) for _ in range(64)]
        for answer, x in zip(caller.all([request("large", x) for x in rows]), rows, strict=True):
            assert np.allclose(outputs(answer)[0], session.run(None, {"x": x})[0], rtol=1e-4, atol=1e-4)
    after = [caller.metric(f"forwardpass_batch_rows_{what}", model="large") for what in ("sum", "count")]
    rows_run, runs = (a - b for a, b in zip(after, before, strict=True))
    assert rows_run == 3 * 64
    assert rows_run / runs > 4


def example(name: str, rows: int = 3) -> NDArray[Any]:
    """Every pattern of bits that fits; text of several lengths."""
    dtype = protocol.DATATYPES[name].numpy
    if dtype is None:
        return np.array([["", "é"], ["x" * 300, "\0"], ["日本", "b"]][:rows], object)
    if name == "BOOL":
        return np.array([[True, False]] * rows)
    bits = np.random.default_rng(0).integers(0, 256, 2 * rows * dtype.itemsize, dtype=np.uint8)
    array = np.frombuffer(bits.tobytes(), dtype).reshape(rows, 2)
    return np.where(np.isfinite(array), array, 1).astype(dtype) if dtype.kind == "f" else array


@pytest.mark.parametrize("name", models.ELEMENTS)
def test_every_datatype_comes_back_as_it_went(caller: Caller, name: str) -> None:
    """Raw, and typed where the protocol has a field for it; answers are raw in both cases."""
    x = example(name)
    message = request(f"echo_{name}", x)
    message.inputs[0].datatype = name  # BF16 travels in an array of another dtype
    answer, _ = caller.send(message)
    response = protocol.ModelInferResponse.FromString(answer)
    assert list(response.raw_output_contents) == list(message.raw_input_contents)
    assert (response.outputs[0].datatype, list(response.outputs[0].shape)) == (name, [3, 2])
    if protocol.DATATYPES[name].contents is not None:
        assert caller.send(request(f"echo_{name}", x, typed=True))[0] == answer


@pytest.mark.parametrize("name", [n for n in models.ELEMENTS if n != "BF16"])
def test_tritonclient_reads_every_datatype(caller: Caller, name: str) -> None:
    """As its users see them, numpy to numpy."""
    x = example(name)
    client = triton.InferenceServerClient(caller.server.address)
    tensor = triton.InferInput("x", x.shape, name)
    tensor.set_data_from_numpy(x)
    y = client.infer(f"echo_{name}", [tensor]).as_numpy("y")
    if name == "BYTES":
        assert [e.decode() for e in y.ravel()] == x.ravel().tolist()
    else:
        assert y.dtype == x.dtype and y.tobytes() == x.tobytes()
    client.close()


def test_an_id_comes_back_and_only_the_outputs_asked_for(caller: Caller) -> None:
    """In the order asked; with none asked for, all of them in the model's order."""
    a, n = np.array([[1, 2, 3], [4, 5, 6]], np.float32), np.array([[10], [20]])
    for asked in ([], ["n_out", "sum"], ["most"]):
        message = request("two", a, n, names=["a", "n"], id="число-7")
        for name in asked:
            message.outputs.add(name=name)
        response = protocol.ModelInferResponse.FromString(caller.send(message)[0])
        assert (response.id, response.model_name, response.model_version) == ("число-7", "two", "1")
        assert [o.name for o in response.outputs] == (asked or ["sum", "most", "n_out"])
    assert [o.tolist() for o in outputs(caller.send(request("two", a, n, names=["a", "n"]))[0])] == [
        [[11, 12, 13], [24, 25, 26]],
        [3, 6],
        [[10], [20]],
    ]
    swapped = request("two", n, a, names=["n", "a"])
    assert outputs(caller.send(swapped)[0])[1].tolist() == [3, 6]


def test_tritonclient_sees_the_server_and_its_models(caller: Caller) -> None:
    client = triton.InferenceServerClient(caller.server.address)
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("digits")
    metadata = client.get_model_metadata("two")
    assert [(t.name, t.datatype, list(t.shape)) for t in metadata.inputs] == [
        ("a", "FP32", [-1, 3]),
        ("n", "INT64", [-1, 1]),
    ]
    assert [(t.name, list(t.shape)) for t in metadata.outputs] == [("sum", [-1, 3]), ("most", [-1]), ("n_out", [-1, 1])]
    assert {m.state for m in client.get_model_repository_index().models} == {"READY"}
    with pytest.raises(InferenceServerException, match="no model 'nobody'") as caught:
        client.get_model_metadata("nobody")
    assert caught.value.status() == "StatusCode.NOT_FOUND"
    client.close()


def test_priority_and_timeout_of_tritonclient_are_understood(caller: Caller) -> None:
    client = triton.InferenceServerClient(caller.server.address)
    tensors = [triton.InferInput("a", (1, 3), "FP32"), triton.InferInput("n", (1, 1), "INT64")]
    for tensor, array in zip(tensors, (np.ones((1, 3), np.float32), np.ones((1, 1), np.int64)), strict=True):
        tensor.set_data_from_numpy(array)
    assert client.infer("two", tensors, priority=2, timeout=10_000_000, request_id="1").as_numpy("sum").tolist() == [
        [2, 2, 2]
    ]
    with pytest.raises(InferenceServerException, match="'priority': expected 1 to 3"):
        client.infer("two", tensors, priority=4)
    client.close()


def test_a_model_whose_rows_depend_on_each_other_is_not_batched(caller: Caller) -> None:
    """Each request is answered from its own rows alone, however many come at once."""
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((1 + i % 4, 3)).astype(np.float32) for i in range(40)]
    for answer, x in zip(caller.all([request("mean", x) for x in arrays]), arrays, strict=True):
        assert np.allclose(outputs(answer)[0], x - x.mean(axis=0), atol=1e-6)
    assert caller.metric("forwardpass_model_info", model="mean", batch_invariance="dependent") == 1
    assert any("WARNING" in line and "mean" in line and "one request at a time" in line for line in caller.server.lines)


def test_a_model_without_a_batch_axis_is_served_too(caller: Caller) -> None:
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert np.array_equal(caller.infer("double", x)[0], np.concatenate([x, x]))
    assert caller.metric("forwardpass_model_info", model="double", batch_invariance="none") == 1


def test_timings_come_to_those_who_ask(caller: Caller) -> None:
    """In whole microseconds, in the trailing metadata; and to nobody else."""
    message = request("digits", np.ones((5, 64), np.float32))
    _, trailers = caller.send(message, metadata=(("forwardpass-timings", "1"),))
    names = [f"forwardpass-{what}" for what in ("queue-us", "run-us", "total-us", "batch-rows")]
    assert sorted(trailers) == sorted(names)
    queue, run, total, rows = (int(trailers[name]) for name in names)
    assert rows == 5 and queue >= 0 and run > 0 and total >= queue + run - 2  # each is rounded
    for nothing in ((), (("forwardpass-timings", "0"),)):
        assert not caller.send(message, metadata=nothing)[1]
