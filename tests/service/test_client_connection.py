"""How clients get in: TLS, client certificates, tokens; when they try again, and when not. Real servers throughout."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from certificates import Authority, Pair
from models import chain, save

from forwardpass import AsyncClient, Client, protocol
from forwardpass.cli.main import main
from forwardpass.client import (
    Cancelled,
    Coalesce,
    InvalidArgument,
    ResourceExhausted,
    Tls,
    Unauthenticated,
    Unavailable,
)
from forwardpass.testing.server_process import ServerProcess

Said = pytest.CaptureFixture[str]

INFER, ADMIN = "infer-token-0123456789", "admin-token-0123456789"
X = np.ones((2, 4), np.float32)
NOBODY = "127.0.0.1:1"
PATIENCE = 60.0  # seconds, for what should take a moment


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("connection")
    save(folder, "chain", chain())
    return folder


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def own(authority: Authority) -> Pair:
    """A client's pair."""
    return authority.issue("client")


@pytest.fixture(scope="module")
def secured(repository: Path, authority: Authority) -> Iterator[ServerProcess]:
    """Mutual TLS and tokens."""
    pair = authority.issue("server")
    tokens = repository.parent / "tokens"
    tokens.write_text(f"infer {INFER}\nadmin {ADMIN}\n")
    with ServerProcess(
        repository,
        *("--tls-certificate", str(pair.certificate), "--tls-key", str(pair.key)),
        *("--tls-client-ca", str(authority.certificate), "--tokens", str(tokens)),
    ) as server:
        yield server
        assert server.stop() == 0, server.tail()


@pytest.fixture(scope="module", params=["direct", "grpcio"])
def with_tokens(request: pytest.FixtureRequest, repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Tokens alone, behind each transport."""
    tokens = tmp_path_factory.mktemp("tokens") / "tokens"
    tokens.write_text(f"infer {INFER}\nadmin {ADMIN}\n")
    with ServerProcess(repository, "--transport", request.param, "--tokens", str(tokens)) as server:
        yield server
        assert server.stop() == 0, server.tail()


def everything(client: Client) -> None:
    """Each way to call."""
    assert client.live() and client.ready("chain")
    y = client.predict("chain", X)
    with client.stream() as stream:
        assert stream.submit("chain", X).result(PATIENCE)["y"].tobytes() == y.tobytes()
    assert client.infer("chain", X, timings=True).timings is not None


async def everything_awaited(client: AsyncClient) -> None:
    async with client:
        assert await client.live() and await client.ready("chain")
        y = await client.predict("chain", X)
        async with client.stream() as stream:
            assert (await stream.infer("chain", X))["y"].tobytes() == y.tobytes()
        assert (await client.infer("chain", X, timings=True)).timings is not None


def test_by_certificate_and_token(secured: ServerProcess, authority: Authority, own: Pair, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(INFER + "\n")
    tls = Tls(ca=authority.certificate, certificate=own.certificate, key=own.key)
    for options in ({"token": INFER}, {"token": ADMIN}, {"token_file": tmp_path / "token"}, {"coalesce": Coalesce()}):
        said: dict[str, Any] = {"token": INFER} if "coalesce" in options else {}
        with Client(secured.address, tls=tls, **(options | said)) as client:
            everything(client)
        asyncio.run(everything_awaited(AsyncClient(secured.address, tls=tls, **(options | said))))


def test_the_name_in_the_certificate_counts(secured: ServerProcess, authority: Authority, own: Pair) -> None:
    port = secured.address.rpartition(":")[2]
    files = {"ca": authority.certificate, "certificate": own.certificate, "key": own.key}
    # An address that the certificate does not name; and names that it does, and does not, have.
    for address, name, gets_in in (
        (f"127.0.0.1:{port}", None, True),
        (f"127.0.0.2:{port}", None, False),
        (f"ipv4:127.0.0.1:{port}", "localhost", True),
        (f"127.0.0.1:{port}", "models.example", False),
    ):
        with Client(address, tls=Tls(**files, server_name=name), token=INFER, attempts=1) as client:  # type: ignore[arg-type]
            if gets_in:
                everything(client)
            else:
                with pytest.raises(Unavailable):
                    client.predict("chain", X)


def test_without_a_certificate_or_with_a_foreign_one_nobody_gets_in(
    secured: ServerProcess, authority: Authority, own: Pair, tmp_path: Path
) -> None:
    foreign = Authority(tmp_path / "foreign")
    other = foreign.issue("other")
    for tls in (
        Tls(ca=authority.certificate),
        Tls(ca=authority.certificate, certificate=other.certificate, key=other.key),
        Tls(ca=foreign.certificate, certificate=own.certificate, key=own.key),
        Tls(certificate=own.certificate, key=own.key),
        None,
    ):
        with Client(secured.address, tls=tls, attempts=1, token=INFER) as client:
            assert not client.live()
            with pytest.raises(Unavailable, match=secured.address):
                client.predict("chain", X)


@pytest.mark.parametrize("coalesce", [None, Coalesce()], ids=["plain", "coalesced"])
def test_a_token_is_asked_for(with_tokens: ServerProcess, coalesce: Coalesce | None) -> None:
    for token in (INFER, ADMIN):
        with Client(with_tokens.address, token=token, coalesce=coalesce) as client:
            everything(client)
    for token in ("no-such-token-0123456789", None):
        with Client(with_tokens.address, token=token, coalesce=coalesce) as client:
            with pytest.raises(Unauthenticated) as caught:
                client.predict("chain", X)
            assert token is None or token not in str(caught.value)
            with pytest.raises(Unauthenticated), client.stream() as stream:
                stream.submit("chain", X).result(PATIENCE)
            assert client.counts.retries == 0


def test_a_token_file_that_changes_is_followed(
    with_tokens: ServerProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forwardpass.client.credentials._LOOK_EVERY", 0.0)  # at each call
    path = tmp_path / "token"
    path.write_text(INFER)
    with Client(with_tokens.address, token_file=path) as client:
        client.predict("chain", X)
        path.write_text("no-such-token-0123456789")
        with pytest.raises(Unauthenticated):
            client.predict("chain", X)
        path.write_text(ADMIN)
        client.predict("chain", X)


def test_commands_get_in_as_well(
    secured: ServerProcess, authority: Authority, own: Pair, tmp_path: Path, capsys: Said
) -> None:
    (tmp_path / "token").write_text(INFER)
    np.save(tmp_path / "x.npy", X)
    how = [
        *("--server", secured.address, "--tls-ca", str(authority.certificate), "--token-file", str(tmp_path / "token")),
        *("--tls-certificate", str(own.certificate), "--tls-key", str(own.key)),
    ]
    assert main(["models", "--json", *how]) == 0
    assert [model["name"] for model in json.loads(capsys.readouterr().out)] == ["chain"]
    assert main(["predict", "chain", "--input", str(tmp_path / "x.npy"), "--json", *how]) == 0
    assert len(json.loads(capsys.readouterr().out)["outputs"]["y"]) == 2
    # And not: one line that says why, and no trace.
    for wrong, text in (
        (["--server", secured.address, "--tls", "--timeout", "2"], "UNAVAILABLE"),
        ([*how, "--token-file", str(tmp_path / "nothing")], "token_file: "),
        (["--server", secured.address, "--tls-key", str(own.key)], "expected certificate and key together"),
        (["--server", "10.0.0.1:8001", "--token-file", str(tmp_path / "token")], "expected tls for 10.0.0.1:8001"),
    ):
        assert main(["models", *wrong]) == 1
        said = capsys.readouterr()
        assert text in said.err and said.err.count("\n") == 1 and not said.out


def test_nobody_there_is_tried_again_and_counted() -> None:
    for attempts in (1, 3):
        with Client(NOBODY, attempts=attempts) as client:
            with pytest.raises(Unavailable, match=NOBODY):
                client.predict("chain", X)
            assert client.counts.retries == attempts - 1
            assert not client.live() and not client.ready()
            assert client.counts.retries == attempts - 1, "who asks whether somebody is there wants to know now"

    async def awaited() -> int:
        async with AsyncClient(NOBODY, attempts=3) as client:
            with pytest.raises(Unavailable, match=NOBODY):
                await client.predict("chain", X)
            return client.counts.retries

    assert asyncio.run(awaited()) == 2


def test_what_is_not_unavailable_is_not_tried_again(with_tokens: ServerProcess) -> None:
    with Client(with_tokens.address, token=INFER) as client:
        with pytest.raises(InvalidArgument):
            client.predict("chain", X[:, :2])
        assert client.counts.retries == 0


def test_a_deadline_is_for_all_attempts_together() -> None:
    with Client(NOBODY, attempts=10) as client:
        began = time.monotonic()
        with pytest.raises(Unavailable):
            client.predict("chain", X, timeout=2.0)
        assert time.monotonic() - began < PATIENCE / 2
        assert 1 <= client.counts.retries < 9, "it went on beyond its deadline"


class Scripted:
    """A real gRPC server that answers each call by what stands next: a status with RetryInfo, or the model's answer.

    Which server asks for which pause cannot be brought about at will with a whole one.
    """

    def __init__(self, *script: tuple[grpc.StatusCode, float | None]) -> None:
        self._script = list(script)
        self.calls: list[float] = []  # when they came
        self._server = grpc.server(ThreadPoolExecutor(4))
        service = protocol.INFERENCE_SERVICE
        handlers = {
            "ModelMetadata": grpc.unary_unary_rpc_method_handler(self._metadata),
            "ModelInfer": grpc.unary_unary_rpc_method_handler(self._infer),
        }
        self._server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, handlers)])
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    def _metadata(self, _request: bytes, _context: Any) -> bytes:
        response = protocol.ModelMetadataResponse(name="m", versions=["1"])
        for said, tensor in ((response.inputs, "x"), (response.outputs, "y")):
            said.add(name=tensor, datatype="FP32", shape=[-1, 4])
        response.parameters["max_batch_size"].int64_param = 64
        data: bytes = response.SerializeToString()
        return data

    def _infer(self, request: bytes, context: Any) -> bytes:
        self.calls.append(time.monotonic())
        code, pause = self._script.pop(0) if self._script else (grpc.StatusCode.OK, None)
        if code is not grpc.StatusCode.OK:
            if pause is not None:
                info = protocol.RetryInfo()
                info.retry_delay.FromNanoseconds(int(pause * 1e9))
                status = protocol.RpcStatus(code=code.value[0], message="not now")
                status.details.add().Pack(info)
                context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
            context.abort(code, "not now")
        asked = protocol.ModelInferRequest.FromString(request)
        response = protocol.ModelInferResponse(model_name="m", model_version="1")
        response.outputs.add(name="y", datatype="FP32", shape=asked.inputs[0].shape)
        response.raw_output_contents.append(asked.raw_input_contents[0])
        data: bytes = response.SerializeToString()
        return data

    def __enter__(self) -> Scripted:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(None).wait()


GONE, FULL = grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED


def test_nobody_comes_back_before_the_server_said() -> None:
    with Scripted((GONE, 0.3), (GONE, None), (GONE, 0.2)) as server, Client(server.address) as client:
        assert client.predict("m", X).tobytes() == X.tobytes()
        assert client.counts.retries == 3
        pauses = np.diff(server.calls)
        assert pauses[0] >= 0.3 and pauses[2] >= 0.2

    async def awaited(address: str) -> int:
        async with AsyncClient(address) as client:
            assert (await client.predict("m", X)).tobytes() == X.tobytes()
            return client.counts.retries

    with Scripted((GONE, 0.3)) as server:
        assert asyncio.run(awaited(server.address)) == 1
        assert np.diff(server.calls)[0] >= 0.3


def test_a_pause_beyond_the_deadline_is_not_waited_for() -> None:
    with Scripted((GONE, 20.0)) as server, Client(server.address) as client:
        with pytest.raises(Unavailable, match="not now") as caught:
            client.predict("m", X, timeout=5.0)
        assert caught.value.retry_after == 20.0
        assert client.counts.retries == 0 and len(server.calls) == 1


def test_a_full_server_is_asked_again_only_by_those_who_said_so() -> None:
    with Scripted((FULL, 0.05)) as server:
        with Client(server.address) as client, pytest.raises(ResourceExhausted):
            client.predict("m", X)
        assert len(server.calls) == 1
    with Scripted((FULL, 0.05), (FULL, None)) as server, Client(server.address, retry_full=True) as client:
        with pytest.raises(ResourceExhausted):
            client.predict("m", X)
        assert client.counts.retries == 1, "it was tried again where nobody said when"


def test_those_who_share_a_request_wait_together_when_it_is_tried_again() -> None:
    with (
        Scripted((grpc.StatusCode.OK, None), (GONE, 0.1), (GONE, 0.1)) as server,
        Client(server.address, coalesce=Coalesce()) as client,
        ThreadPoolExecutor(8) as threads,
    ):
        client.predict("m", X[0])
        assert client._coalescer is not None
        for group in client._coalescer._coalescer._groups.values():
            group.crowd = 64.0  # as if there had been many of them of late
        calls = [threads.submit(client.predict, "m", row) for row in np.arange(32, dtype=np.float32).reshape(8, 4)]
        for i, call in enumerate(calls):
            assert call.result(PATIENCE).tolist() == [4.0 * i, 4.0 * i + 1, 4.0 * i + 2, 4.0 * i + 3]
        assert client.counts.retries == 2 and client.counts.shared_rows == 8


def test_closing_ends_a_pause() -> None:
    with Scripted((GONE, 50.0)) as server, ThreadPoolExecutor(1) as threads:
        client = Client(server.address, timeout=None)
        call = threads.submit(client.predict, "m", X)
        waiting = threading.Event()
        while client.counts.retries == 0 and not call.done():
            waiting.wait(0.02)
        client.close()
        with pytest.raises(Cancelled, match="the client was closed"):
            call.result(PATIENCE)

        async def awaited(address: str) -> None:
            other = AsyncClient(address, timeout=None)
            task = asyncio.create_task(other.predict("m", X))
            while other.counts.retries == 0 and not task.done():
                await asyncio.sleep(0.02)
            await other.close()
            with pytest.raises(Cancelled, match="the client was closed"):
                await task

    with Scripted((GONE, 50.0)) as server:
        asyncio.run(awaited(server.address))
