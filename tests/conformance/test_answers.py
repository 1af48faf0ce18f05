"""Clients of five gRPC libraries, old and new, get the very answers that their calls must get, by each way to a server.

Metadata, ids, compression, large messages, streams, deadlines, cancels, refusals; plaintext and TLS, and proxies.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import grpc
import pytest
from tests.conformance.answers import CANCELLED, VERIFIERS, faults, make, without_large_streams
from tests.conformance.clients import CLIENTS
from tests.conformance.proxies import PROXIES, in_front
from tests.service.certificates import Authority

from forwardpass import protocol
from forwardpass.testing.server_process import ServerProcess

CALLS = 400
SECONDS = 300.0

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make(tmp_path_factory.mktemp("answers"))


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


def verify(client: str, address: str, messages: Path, folder: Path, *authority: Path) -> dict[str, dict[str, int]]:
    """What the client counted that it must not have."""
    command = [*CLIENTS[client](VERIFIERS / "verify", folder), address, messages, CALLS, *authority]
    # Loopback: no proxy, whatever the environment says.
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=SECONDS, env=environment)
    if "does not support ALPN" in done.stderr:
        pytest.skip("no TLS: Debian's netty has no ALPN with this JDK")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.strip().splitlines()[-1])
    print(client, found)
    assert {"unary", "large", "stream", "deadlines", "cancels", "oversized", "after all"} <= found.keys()
    return faults(found)


def secured(authority: Authority) -> list[str]:
    pair = authority.issue("server")
    return ["--tls-certificate", str(pair.certificate), "--tls-key", str(pair.key)]


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("tls", [False, True], ids=["plaintext", "tls"])
@pytest.mark.parametrize("transport", ["direct", "grpcio"])
def test_answers(
    client: str, tls: bool, transport: str, made: tuple[Path, Path], authority: Authority, tmp_path: Path
) -> None:
    repository, messages = made
    options = ["--transport", transport, *(secured(authority) if tls else [])]
    with ServerProcess(repository, *options) as server:
        trusted = [authority.certificate] if tls else []
        assert verify(client, server.address, messages, tmp_path, *trusted) == {}
        assert server.stop() == 0, server.tail()


# Whatever server is behind them (docs/compatibility.md): for a stream's reset that C++ 1.51 sends before its beginning
# HAProxy and nghttpx end the connection, and HAProxy lets grpc-go's large messages stand still.
THROUGH_PROXIES = [
    *[("nginx", client) for client in ("python", "go", "c++")],
    *[("nghttpx", client) for client in ("python", "go")],
    ("haproxy", "python"),
]


@pytest.mark.parametrize(("proxy", "client"), THROUGH_PROXIES)
@pytest.mark.parametrize("tls", [False, True], ids=["plaintext", "tls"])
def test_answers_through_a_proxy(
    proxy: str, client: str, tls: bool, made: tuple[Path, Path], authority: Authority, tmp_path: Path
) -> None:
    repository, messages = made
    if proxy == "haproxy":
        # Large messages both ways at once may stand still: it reads from neither side while its buffers are full.
        messages = without_large_streams(messages)
    with ServerProcess(repository, *(secured(authority) if tls else [])) as server:
        with in_front(proxy, server.address, tls, tmp_path) as address:
            wrong = verify(client, address, messages, tmp_path)
        if proxy == "haproxy" and wrong.get("oversized") == {CANCELLED: 1}:
            # It drops a response that is complete before its request is.
            del wrong["oversized"]
        assert wrong == {}
        assert server.stop() == 0, server.tail()


@pytest.mark.parametrize("tls", [False, True], ids=["plaintext", "tls"])
@pytest.mark.parametrize("proxy", PROXIES)
def test_a_refusal_spoils_no_later_call(
    proxy: str, tls: bool, made: tuple[Path, Path], authority: Authority, tmp_path: Path
) -> None:
    """A proxy has calls follow each other on one connection; the refused ones are answered before they are complete."""
    repository, messages = made
    request, response = (messages / f"small0.{kind}" for kind in ("request", "response"))
    with ServerProcess(repository, *(secured(authority) if tls else [])) as server:
        with (
            in_front(proxy, server.address, tls, tmp_path) as address,
            grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel,
        ):
            infer = channel.unary_unary(protocol.METHODS["ModelInfer"].path)
            nothing = channel.unary_unary(f"/{protocol.INFERENCE_SERVICE}/Nothing")
            for _ in range(100):
                with pytest.raises(grpc.RpcError) as refused:
                    nothing(request.read_bytes(), timeout=SECONDS)
                assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
                assert infer(request.read_bytes(), timeout=SECONDS) == response.read_bytes()
        assert server.stop() == 0, server.tail()
