"""What a client may get wrong, over a real channel to both transports: the status, its words, and nobody is harmed.

After every case the server says that it serves, nothing is left in its queues, and the next good answer has the bits of
the one before. A foreign client is imported in the same process, as users do.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import models
import numpy as np
import onnxruntime
import pytest
import tritonclient.grpc
from caller import Caller, Refused, open_files, outputs, packed, request, until

from forwardpass import protocol
from forwardpass.testing.server_process import ServerProcess

GOOD = request("chain", np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32))
INTERNALS = re.compile(r"protobuf|upb|Traceback|File \"|\.cc:|\.py|onnxruntime|0x[0-9a-f]{6}", re.IGNORECASE)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("repository")
    models.save(root, "chain", models.chain())
    models.save(root, "few", models.chain(), "max_batch_size = 4\nmax_request_rows = 10\n")
    models.save(root, "two", models.two_by_two())
    models.save(root, "text", models.echo(models.STRING))
    models.save(root, "any", models.relu_any_width())
    broken = models.save(root, "broken", models.chain())
    (broken / "model.onnx").write_bytes(b"\x08\x07 this is no network")
    return root


@pytest.fixture(scope="module", params=["direct", "grpcio"])
def caller(request: pytest.FixtureRequest, repository: Path) -> Iterator[Caller]:
    with ServerProcess(
        repository, "--transport", request.param, "--max-message-bytes", "100000", "--max-batch-size", "64"
    ) as server:
        made = Caller(server)
        yield made
        made.close()
        assert server.stop() == 0, server.tail()
        assert not [line for line in server.lines if "Traceback" in line]


@pytest.fixture(autouse=True)
def unharmed(caller: Caller) -> Iterator[None]:
    before, _ = caller.send(GOOD)
    yield
    assert caller.health() == "SERVING"
    until(caller.idle, "an idle server")
    assert caller.send(GOOD)[0] == before


def check(refused: Refused, code: str, *words: str) -> None:
    """The status, what its text must say, and what no text may say."""
    assert refused.code == code, refused
    for word in words:
        assert word in refused.text, refused
    assert refused.text.isprintable() and not INTERNALS.search(refused.text), refused


def changed(**changes: Any) -> Any:
    """The good request with fields of its only input set otherwise."""
    message = protocol.ModelInferRequest.FromString(GOOD.SerializeToString())
    tensor = message.inputs[0]
    for field, value in changes.items():
        if field == "shape":
            tensor.shape[:] = value
        elif field == "raw":
            message.raw_input_contents[:] = value
        else:
            setattr(tensor, field, value)
    return message


@pytest.mark.parametrize("path", ["/inference.GRPCInferenceService/Nothing", "/no.such.Service/ModelInfer", "/x"])
def test_an_unknown_method_or_service(caller: Caller, path: str) -> None:
    """Nothing is there to be called."""
    assert caller.refused(GOOD, path=path).code == "UNIMPLEMENTED"


@pytest.mark.parametrize(
    "data",
    [b"\xff\xff\xff", GOOD.SerializeToString()[:-1], GOOD.SerializeToString()[:20], b"\x0a\x02\xff\xfe", b"\x00" * 50],
    ids=["junk", "one byte short", "cut in a field", "name not UTF-8", "zeros"],
)
def test_a_malformed_or_truncated_message(caller: Caller, data: bytes) -> None:
    """What does not parse is the client's fault, and nothing of the parser shows."""
    check(caller.refused(data), "INVALID_ARGUMENT", "the message is not a ModelInferRequest")
    for name in ("ModelMetadata", "ModelReady", "RepositoryIndex"):
        method = protocol.METHODS[name]
        check(caller.refused(b"\xff\xff\xff", path=method.path), "INVALID_ARGUMENT", method.request.DESCRIPTOR.name)


def test_an_empty_message(caller: Caller) -> None:
    """A request that says nothing at all."""
    check(caller.refused(b""), "INVALID_ARGUMENT", "names no model")


def test_a_message_over_the_limit(caller: Caller) -> None:
    """Refused for its size, whatever is in it."""
    assert caller.refused(b"\xff" * 100_001).code == "RESOURCE_EXHAUSTED"
    check(caller.refused(b"\xff" * 99_000), "INVALID_ARGUMENT")


@pytest.mark.parametrize(
    ("name", "version", "words"),
    [("nobody", "", "no model 'nobody'; served are"), ("chain", "7", "'chain' has no version '7'; it has 1")],
)
def test_an_unknown_model_or_version(caller: Caller, name: str, version: str, words: str) -> None:
    """The text says what there is instead."""
    check(caller.refused(request(name, np.ones((1, 4), np.float32), model_version=version)), "NOT_FOUND", words)


def test_a_model_that_failed_to_load(caller: Caller) -> None:
    """Its reason is told to whoever asks for it; the index has it too."""
    refused = caller.refused(request("broken", np.ones((1, 4), np.float32)))
    check(refused, "FAILED_PRECONDITION", "version 1 of model 'broken' could not be loaded: model.onnx")
    client = tritonclient.grpc.InferenceServerClient(caller.server.address)
    assert not client.is_model_ready("broken") and client.is_model_ready("chain") and client.is_server_live()
    (entry,) = [m for m in client.get_model_repository_index().models if m.name == "broken"]
    assert entry.state == "UNAVAILABLE" and entry.reason.startswith("model.onnx")
    assert caller.health("broken") == "NOT_SERVING"
    client.close()


@pytest.mark.parametrize(
    "name",
    ["../chain", "chain/1", "/etc/passwd", "chain\0", "..", "a\nb\r\x1b[31m", "x" * 1024, "n" * 10_240, "é" * 100, ""],
    ids=["up", "below", "absolute", "NUL", "dots", "control", "1 kB", "10 kB", "accents", "empty"],
)
def test_a_name_that_is_none(caller: Caller, name: str) -> None:
    """No file is touched, and no text grows with the name."""
    refused = caller.refused(request(name, np.ones((1, 4), np.float32)))
    assert refused.code == ("INVALID_ARGUMENT" if not name or len(name) > 1024 else "NOT_FOUND")
    assert refused.text.isprintable() and len(refused.text) < 500


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (protocol.ModelInferRequest(model_name="chain"), "missing input 'x'"),
        (request("two", np.ones((1, 3), np.float32), names=["a"]), "missing input 'n'"),
        (changed(name="z\n"), "unexpected input 'z\\x0a'; expected x"),
        (request("chain", *[np.ones((1, 4), np.float32)] * 2, names=["x", "x"]), "input 'x' is given twice"),
    ],
    ids=["none", "one of two", "another", "twice"],
)  # fmt: skip
def test_a_missing_extra_or_duplicate_input(caller: Caller, message: Any, words: str) -> None:
    """The input is named."""
    check(caller.refused(message), "INVALID_ARGUMENT", words)


@pytest.mark.parametrize(
    ("message", "expected", "got"),
    [
        (changed(datatype="FP64"), "datatype FP32", "'FP64'"),
        (changed(datatype="float"), "datatype FP32", "'float'"),
        (changed(shape=[12]), "2 dimensions [-1,4]", "[12]"),
        (changed(shape=[3, 2, 2]), "2 dimensions [-1,4]", "[3,2,2]"),
        (changed(shape=[4, 3]), "shape [-1,4]", "[4,3]"),
    ],
)
def test_a_wrong_datatype_rank_or_size(caller: Caller, message: Any, expected: str, got: str) -> None:
    """What was expected and what came."""
    check(caller.refused(message), "INVALID_ARGUMENT", "input 'x'", f"expected {expected}", f"got {got}")


@pytest.mark.parametrize("shape", [[-1, 4], [1 << 62, 4], [(1 << 63) - 1, 4], [-(1 << 63), 4]])
def test_a_negative_or_overflowing_shape(caller: Caller, shape: list[int]) -> None:
    """Refused before anything of that size is thought of."""
    check(caller.refused(changed(shape=shape)), "INVALID_ARGUMENT", "input 'x'", str(shape[0]))
    check(caller.refused(changed(shape=shape, raw=[b""])), "INVALID_ARGUMENT", "input 'x'")


@pytest.mark.parametrize("size", [0, 47, 49, 44, 96])
def test_raw_bytes_that_are_not_the_shapes(caller: Caller, size: int) -> None:
    """To the byte."""
    check(caller.refused(changed(raw=[b"\0" * size])), "INVALID_ARGUMENT", "takes 48 bytes", f"got {size}")


def test_contents_in_both_places_or_of_another_count(caller: Caller) -> None:
    """Either raw or typed, and one for each input."""
    both = changed()
    both.inputs[0].contents.fp32_contents.extend([1.0] * 12)
    check(caller.refused(both), "INVALID_ARGUMENT", "input 'x': expected contents or raw_input_contents, got both")
    check(caller.refused(changed(raw=[b"\0" * 48] * 2)), "INVALID_ARGUMENT", "2 raw_input_contents for 1 inputs")
    typed = changed(raw=[])
    typed.inputs[0].contents.fp32_contents.extend([1.0] * 11)
    check(caller.refused(typed), "INVALID_ARGUMENT", "has 12 elements, got 11")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\x0e\0\0\0abcd" + packed(["x"]), "element 0 claims 14 bytes, 9 are left"),
        (struct.pack("<I", 0xFFFFFFFF) + b"abcd", "claims 4294967295 bytes"),
        (packed(["ab", "cd"])[:-1], "element 1 claims 2 bytes, 1 are left"),
        (packed(["ab"]) + b"\1\0", "element 1 has 2 bytes of its 4-byte length"),
        (packed(["ab"]), "expected 2 elements, got 1"),
        (packed(["a", "b", "c"]), "expected 2 elements, got more than 2"),
        (b"\2\0\0\0\xc3\x28" + packed(["b"]), "element 0 is not UTF-8"),
    ],
)
def test_text_with_a_bad_length(caller: Caller, data: bytes, words: str) -> None:
    """Also after a good one of the same size, which must not vouch for it."""
    good = request("text", np.array([["a" * (len(data) - 8), ""]], object))
    message = protocol.ModelInferRequest.FromString(good.SerializeToString())
    message.raw_input_contents[:] = [data]
    for _ in range(2):
        check(caller.refused(message), "INVALID_ARGUMENT", "input 'x'", words)
        assert caller.send(good)


def test_more_rows_than_a_model_takes(caller: Caller, repository: Path) -> None:
    """Up to the bound in slices, with the same bits; beyond it refused."""
    x = np.random.default_rng(1).standard_normal((10, 4)).astype(np.float32)
    session = onnxruntime.InferenceSession(str(repository / "few/1/model.onnx"))
    assert caller.infer("few", x)[0].tobytes() == session.run(None, {"x": x})[0].tobytes()
    refused = caller.refused(request("few", np.ones((11, 4), np.float32)))
    check(refused, "INVALID_ARGUMENT", "11 rows", "'few' takes at most 10")


@pytest.mark.parametrize(("model", "width"), [("chain", 4), ("any", 5), ("few", 4)])
def test_zero_rows(caller: Caller, model: str, width: int) -> None:
    """An answer of zero rows."""
    (y,) = caller.infer(model, np.zeros((0, width), np.float32))
    assert y.shape == (0, 5 if model == "any" else 3)


def test_special_numbers(caller: Caller, repository: Path) -> None:
    """NaN, infinities, denormals and zeros of both signs are served, to the bit."""
    special = [np.nan, -np.nan, np.inf, -np.inf, 1e-45, -1e-40, 0.0, -0.0, 3.4e38, -3.4e38, 1.0, -1.0]
    for model, width in (("chain", 4), ("any", 6)):
        x = np.resize(np.array(special, np.float32), (9, width))
        session = onnxruntime.InferenceSession(str(repository / model / "1/model.onnx"))
        expected = session.run(None, {"x": x})[0]
        assert caller.infer(model, x)[0].tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("asked", "words"),
    [(["y", "z\t"], "unknown output 'z\\x09'; the outputs are y"), (["y", "y"], "output 'y' is requested twice")],
)
def test_an_unknown_or_duplicate_output(caller: Caller, asked: list[str], words: str) -> None:
    """The output is named."""
    message = changed()
    for name in asked:
        message.outputs.add(name=name)
    check(caller.refused(message), "INVALID_ARGUMENT", words)


def test_names_with_control_characters_stay_on_one_line(caller: Caller) -> None:
    """Neither the log nor the metrics grow or break with what clients call things."""
    lines = len(caller.server.lines)
    labels = caller.server.metrics().count('model="')
    for i in range(30):
        evil = f"evil{i}\n2026-01-01 ERROR forged\r\x1b[2J\0"
        caller.refused(request(evil, np.ones((1, 4), np.float32)), metadata=(("forwardpass-timings", "\tx"),))
        caller.refused(changed(name=evil))
    assert not [line for line in caller.server.lines[lines:] if "forged" in line or "\x1b" in line]
    assert "evil" not in caller.server.metrics()
    assert caller.server.metrics().count('model="') <= labels + 4  # codes and reasons seen for the first time


def test_files_are_closed_again(caller: Caller) -> None:
    """Connections that came and went leave nothing behind."""
    before = open_files(caller.server.pid)
    for _ in range(5):
        other = Caller(caller.server)
        assert outputs(other.send(GOOD)[0])
        other.close()
    until(lambda: open_files(caller.server.pid) <= before, "the end of five connections")
