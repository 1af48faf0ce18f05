"""Large requests, compressed or slow to decode, beside small ones: each is answered, in order on a stream, and others
are served meanwhile, whatever becomes of the calls.
"""

from __future__ import annotations

import contextlib
import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import http2_frames as http2
import models
import numpy as np
import pytest
from caller import INFER, Caller, outputs, request, until
from raw_client import RawClient, data_frames
from test_unread_answers import memory

from forwardpass import protocol
from forwardpass.testing.server_process import ServerProcess

MIB = 1 << 20
STREAM = protocol.METHODS["ModelStreamInfer"].path
WORDS = np.array([["", "a", "grün", "x" * 9][i % 4] for i in range(40_000)], object)[:, np.newaxis]
WIDE = np.abs(np.random.default_rng(0).standard_normal((1, 3 * MIB // 4))).astype(np.float32)
SMALL = request("chain", np.ones((1, 4), np.float32))


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("repository")
    models.save(root, "chain", models.chain())
    models.save(root, "any", models.relu_any_width())
    models.save(root, "words", models.echo(models.STRING, ("batch", 1)), "max_queue_rows = 1000000\n")
    models.save(root, "small", models.echo(models.ELEMENTS["INT8"], ("batch", "width")))
    return root


class TransportCaller(Caller):
    """A caller of a server that speaks by `transport`."""

    def __init__(self, server: ServerProcess, transport: str) -> None:
        super().__init__(server)
        self.transport = transport


@pytest.fixture(scope="module", params=["direct", "grpcio"])
def caller(request: pytest.FixtureRequest, repository: Path) -> Iterator[TransportCaller]:
    with ServerProcess(repository, "--transport", request.param, "--max-bytes", str(96 * MIB)) as server:
        made = TransportCaller(server, request.param)
        yield made
        until(made.idle, "an idle server")
        made.close()
        assert server.stop() == 0, server.tail()
        if request.param == "direct":
            assert not [line for line in server.lines if "Traceback" in line], server.tail()


def large() -> dict[str, tuple[Any, bytes]]:
    """By name, a request and the raw bytes of its only output."""
    numbers = np.random.default_rng(1).integers(-128, 128, (1, 200_000)).astype(np.int8)
    words = request("words", WORDS)
    return {
        "floats": (request("any", WIDE), WIDE.tobytes()),
        "texts": (words, words.raw_input_contents[0]),
        "typed texts": (request("words", WORDS, typed=True), words.raw_input_contents[0]),
        "typed numbers": (request("small", numbers, typed=True), numbers.tobytes()),
    }


LARGE = large()


@pytest.mark.parametrize(
    "compression", [grpc.Compression.NoCompression, grpc.Compression.Gzip, grpc.Compression.Deflate]
)
@pytest.mark.parametrize("name", LARGE)
def test_every_kind_is_answered(caller: Caller, name: str, compression: Any) -> None:
    message, expected = LARGE[name]
    for _ in range(3):  # the first one is unknown
        answer = caller.channel.unary_unary(INFER)(message.SerializeToString(), timeout=60, compression=compression)
        assert raw_of(answer) == expected


def raw_of(answer: bytes) -> bytes:
    (data,) = protocol.ModelInferResponse.FromString(answer).raw_output_contents
    return bytes(data)


@pytest.mark.parametrize("compression", [grpc.Compression.NoCompression, grpc.Compression.Gzip])
def test_a_stream_is_answered_in_its_order(caller: Caller, compression: Any) -> None:
    sent = []
    for i in range(24):
        message, expected = list(LARGE.values())[i % 4] if i % 3 == 0 else (SMALL, None)
        copy = protocol.ModelInferRequest.FromString(message.SerializeToString())
        copy.id = str(i)
        sent.append((copy, expected))
    call = caller.channel.stream_stream(STREAM)(
        (message.SerializeToString() for message, _ in sent), timeout=60, compression=compression
    )
    answers = [protocol.ModelStreamInferResponse.FromString(each) for each in call]
    assert [answer.infer_response.id for answer in answers] == [str(i) for i in range(24)]
    for answer, (_, expected) in zip(answers, sent, strict=True):
        assert not answer.error_message
        if expected is not None:
            assert answer.infer_response.raw_output_contents[0] == expected


def compressed_call(client: RawClient, stream: int, data: bytes, path: str = INFER, end: bool = True) -> bytes:
    prefixed = b"\1" + len(data).to_bytes(4, "big") + data
    return client.headers(stream, path, grpc_encoding="gzip") + data_frames(stream, prefixed, end)


@pytest.mark.parametrize("path", [INFER, STREAM])
def test_what_cannot_be_inflated_is_refused(caller: Caller, path: str) -> None:
    whole = gzip.compress(LARGE["floats"][0].SerializeToString(), 1)
    with contextlib.closing(RawClient(caller.server.address)) as client:
        client.greet()
        for stream, (data, code) in enumerate(
            [(gzip.compress(bytes(40 * MIB)), "8"), (whole[:-90], "13"), (whole[9:], "13")]
        ):
            client.send(compressed_call(client, 2 * stream + 1, data, path))
            assert client.status(2 * stream + 1) == code


def test_calls_that_are_reset_while_they_are_decoded_leave_nothing(caller: Caller) -> None:
    packed = gzip.compress(LARGE["typed texts"][0].SerializeToString())
    for _ in range(3):
        with contextlib.closing(RawClient(caller.server.address)) as client:
            client.greet()
            for stream in range(1, 41, 2):
                client.send(compressed_call(client, stream, packed))
            for stream in range(1, 41, 4):
                client.send(http2.reset(stream, http2.CANCEL))
            caller.infer("chain", np.ones((1, 4), np.float32))
    until(caller.idle, "the end of what was decoded")
    answer, _ = caller.send(LARGE["typed texts"][0])
    assert raw_of(answer) == LARGE["typed texts"][1]


def test_many_compressed_messages_are_bounded_and_others_are_served(caller: TransportCaller) -> None:
    """60 of them would be 900 MB at once."""
    packed = gzip.compress(request("nobody", np.zeros((1, 15 * MIB // 4), np.float32)).SerializeToString())
    before = memory(caller, "VmRSS")
    with contextlib.closing(RawClient(caller.server.address)) as client:
        client.greet()
        for stream in range(1, 121, 2):
            client.send(compressed_call(client, stream, packed))
        for _ in range(20):
            answer, _ = caller.send(SMALL)
            assert outputs(answer)[0].shape == (1, 3)
        ended: list[str] = []
        for kind, _, _, payload in client.frames():
            if kind == http2.HEADERS and "grpc-status" in payload:
                ended.append(payload["grpc-status"])
            elif kind == http2.RST_STREAM:  # of a call that a busy machine's server left unread for too long
                ended.append("refused")
            if len(ended) == 60:
                break
    assert "5" in ended and set(ended) <= {"5", "8", "14", "refused"}  # 5: there is no such model
    if caller.transport == "direct":  # gRPC's core inflates all that it reads
        assert memory(caller, "VmHWM") - before < 300 * MIB
