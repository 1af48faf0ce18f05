"""TLS and mutual TLS at both transports: who gets in, who does not, certificates replaced while serving."""

from __future__ import annotations

import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import models
import numpy as np
import pytest
from caller import outputs, request, until
from certificates import Authority, Pair
from grpc_health.v1 import health_pb2, health_pb2_grpc

from forwardpass import protocol
from forwardpass.testing.server_process import ServerProcess

Serve = Callable[..., ServerProcess]
SECONDS = 10.0  # that a call which cannot get through is given


@pytest.fixture(params=["direct", "grpcio"], autouse=True)
def transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORWARDPASS_TRANSPORT", request.param)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture
def pair(authority: Authority, tmp_path: Path) -> Pair:
    """A pair of the test's own, to be replaced as it likes."""
    return put(authority.issue("server"), Pair(tmp_path / "tls.crt", tmp_path / "tls.key"))


def put(new: Pair, where: Pair) -> Pair:
    shutil.copy(new.certificate, where.certificate)
    shutil.copy(new.key, where.key)
    return where


def options(pair: Pair, *more: str) -> list[str]:
    return ["--tls-certificate", str(pair.certificate), "--tls-key", str(pair.key), *more]


def channel(server: ServerProcess, authority: Authority | None, client: Pair | None = None) -> grpc.Channel:
    """`authority` None: plaintext."""
    if authority is None:
        return grpc.insecure_channel(server.address)
    own = (client.key.read_bytes(), client.certificate.read_bytes()) if client is not None else (None, None)
    return grpc.secure_channel(server.address, grpc.ssl_channel_credentials(authority.certificate.read_bytes(), *own))


def status(server: ServerProcess, authority: Authority | None, client: Pair | None = None) -> int:
    """What the health service says. Raises grpc.RpcError where there is no way to it."""
    with channel(server, authority, client) as found:
        stub = health_pb2_grpc.HealthStub(found)
        said: int = stub.Check(health_pb2.HealthCheckRequest(), timeout=SECONDS).status
        return said


def refused(server: ServerProcess, authority: Authority | None, client: Pair | None = None) -> str:
    with pytest.raises(grpc.RpcError) as caught:
        status(server, authority, client)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    return str(caught.value.details())


def serial(server: ServerProcess) -> bytes:
    """The certificate that a new connection is shown."""
    host, _, port = server.address.rpartition(":")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    with socket.create_connection((host, int(port)), SECONDS) as plain, context.wrap_socket(plain) as secure:
        found = secure.getpeercert(binary_form=True)
    assert found
    return found


def der(pair: Pair) -> bytes:
    return ssl.PEM_cert_to_DER_cert(pair.certificate.read_text())


def reloads(server: ServerProcess, result: str) -> float:
    wanted = f'forwardpass_file_reloads_total{{files="certificates",result="{result}"}} '
    return next(float(line.removeprefix(wanted)) for line in server.metrics().splitlines() if line.startswith(wanted))


def test_a_client_that_trusts_the_authority_gets_in_and_no_other(
    authority: Authority, pair: Pair, serve: Serve, document_repository: Path, tmp_path: Path
) -> None:
    server = serve(document_repository, *options(pair))
    assert any(line.startswith("grpc 127.0.0.1:") and "TLS" in line for line in server.lines)
    assert status(server, authority) == 1
    refused(server, Authority(tmp_path / "foreign"))
    refused(server, None)
    assert status(server, authority) == 1


def test_large_messages_go_both_ways(authority: Authority, pair: Pair, serve: Serve, tmp_path: Path) -> None:
    """Many TLS records each, several at once, from several threads: every answer is its request's."""
    models.save(tmp_path / "models", "any", models.relu_any_width())
    server = serve(tmp_path / "models", *options(pair))
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((100 * (1 + i), 200)).astype(np.float32) for i in range(12)]
    with channel(server, authority) as found:
        infer = found.unary_unary(protocol.METHODS["ModelInfer"].path)
        for _ in range(3):
            calls = [infer.future(request("any", x).SerializeToString(), timeout=60) for x in arrays]
            for call, x in zip(calls, arrays, strict=True):
                assert np.array_equal(outputs(call.result())[0], np.maximum(x, 0))


def test_a_client_that_shakes_no_hands_is_closed_and_keeps_nobody(
    authority: Authority, pair: Pair, serve: Serve, document_repository: Path
) -> None:
    server = serve(document_repository, *options(pair))
    host, _, port = server.address.rpartition(":")
    silent = [socket.create_connection((host, int(port)), SECONDS) for _ in range(20)]
    for one in silent[::2]:
        one.sendall(b"\x16\x03\x01\x02\x00\x01")  # the beginning of a hello
    assert status(server, authority) == 1
    for one in silent:
        one.close()
    assert status(server, authority) == 1


def test_with_a_clients_authority_only_its_clients_get_in(
    authority: Authority, pair: Pair, serve: Serve, document_repository: Path, tmp_path: Path
) -> None:
    clients = Authority(tmp_path / "clients", "clients")
    server = serve(document_repository, *options(pair, "--tls-client-ca", str(clients.certificate)))
    good = clients.issue("good")
    assert status(server, authority, good) == 1
    refused(server, authority)
    refused(server, authority, Authority(tmp_path / "foreign").issue("foreign"))
    refused(server, authority, clients.issue("expired", days=-1))
    refused(server, None)
    assert status(server, authority, good) == 1
    log = "\n".join(server.lines).lower()
    for reason in ("peer did not return a certificate", "certificate verify failed", "wrong version number"):
        assert reason.replace(" ", "_") in log or reason in log, f"the log does not say '{reason}':\n{log}"


def test_new_connections_get_the_new_certificate_and_open_ones_go_on(
    authority: Authority, pair: Pair, serve: Serve, document_repository: Path
) -> None:
    server = serve(document_repository, *options(pair))
    with channel(server, authority) as old:
        stub = health_pb2_grpc.HealthStub(old)
        stub.Check(health_pb2.HealthCheckRequest(), timeout=SECONDS)
        assert serial(server) == der(pair)
        for name in ("second", "third"):
            new = authority.issue(name)
            put(new, pair)
            assert serial(server) == der(new)
            assert status(server, authority) == 1
            assert stub.Check(health_pb2.HealthCheckRequest(), timeout=SECONDS).status == 1
    assert reloads(server, "ok") == 2 and reloads(server, "failed") == 0


def test_a_bad_pair_leaves_the_last_good_one(
    authority: Authority, pair: Pair, serve: Serve, document_repository: Path
) -> None:
    server = serve(document_repository, *options(pair))
    first, second = der(pair), authority.issue("second")

    shutil.copy(second.certificate, pair.certificate)  # and not its key
    assert serial(server) == first and serial(server) == first
    assert reloads(server, "failed") == 1, "a state of the files is tried once"
    until(lambda: any("the server's certificate changed and cannot be used" in line for line in server.lines))

    pair.certificate.write_bytes(second.certificate.read_bytes()[:200])
    assert serial(server) == first
    pair.certificate.unlink()
    assert serial(server) == first
    assert reloads(server, "failed") == 3 and reloads(server, "ok") == 0
    assert status(server, authority) == 1

    put(second, pair)
    assert serial(server) == der(second)
    assert reloads(server, "ok") == 1


def test_a_mounted_secret_is_replaced_by_turning_a_link(
    authority: Authority, serve: Serve, document_repository: Path, tmp_path: Path
) -> None:
    first, second = authority.issue("first"), authority.issue("second")
    for i, new in enumerate((first, second)):
        (tmp_path / f"..{i}").mkdir()
        put(new, Pair(tmp_path / f"..{i}" / "tls.crt", tmp_path / f"..{i}" / "tls.key"))
    (tmp_path / "..data").symlink_to("..0")
    for name in ("tls.crt", "tls.key"):
        (tmp_path / name).symlink_to(f"..data/{name}")
    server = serve(document_repository, *options(Pair(tmp_path / "tls.crt", tmp_path / "tls.key")))
    assert serial(server) == der(first)
    (tmp_path / "..new").symlink_to("..1")
    (tmp_path / "..new").rename(tmp_path / "..data")
    assert serial(server) == der(second)


@pytest.mark.parametrize("transport", ["direct", "grpcio"])
def test_a_signal_has_certificates_read_again(
    authority: Authority, pair: Pair, serve: Serve, document_repository: Path, transport: str
) -> None:
    """And whoever takes new connections hears of it, though the change was seen before one came."""
    server = serve(document_repository, *options(pair), "--transport", transport)
    second = authority.issue("second")
    assert serial(server) != der(second)
    put(second, pair)
    server.send(signal.SIGHUP)
    until(lambda: "SIGHUP: certificates: in use" in server.tail(), "the certificate")
    assert serial(server) == der(second)


def test_rotation_under_way_fails_no_new_connection(
    authority: Authority, pair: Pair, serve: Serve, document_repository: Path
) -> None:
    server = serve(document_repository, *options(pair))
    pairs = [authority.issue(f"turn{i}") for i in range(2)]
    over = threading.Event()

    def rotate() -> None:
        turn = 0
        while not over.is_set():
            put(pairs[turn % 2], pair)  # one file after the other: in between they do not fit
            turn += 1
            over.wait(0.002)

    thread = threading.Thread(target=rotate)
    thread.start()
    try:
        assert [status(server, authority) for _ in range(100)] == [1] * 100
    finally:
        over.set()
        thread.join()
    assert reloads(server, "ok") > 0


def encrypted(pair: Pair) -> None:
    subprocess.run(
        ["openssl", "ec", "-in", pair.key, "-aes128", "-passout", "pass:secret", "-out", f"{pair.key}.new"],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    Path(f"{pair.key}.new").replace(pair.key)


@pytest.fixture(params=["foreign key", "encrypted key", "no certificate", "no key", "no client authority"])
def broken(request: pytest.FixtureRequest, pair: Pair, authority: Authority, tmp_path: Path) -> Iterator[list[str]]:
    more: list[str] = []
    match request.param:
        case "foreign key":
            shutil.copy(authority.issue("other").key, pair.key)
        case "encrypted key":
            encrypted(pair)
        case "no certificate":
            pair.certificate.write_text("nothing")
        case "no key":
            pair.key.unlink()
        case "no client authority":
            (tmp_path / "ca.pem").write_text("nothing")
            more = ["--tls-client-ca", str(tmp_path / "ca.pem")]
    yield options(pair, *more)


def start(repository: Path, *more: str) -> str:
    """What a server that cannot start says."""
    ports = ["--metrics-port", "-1", "--grpc-port", "0", "--http-port", "-1"]
    command = [sys.executable, "-m", "forwardpass", "serve", str(repository), *ports, *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0 and "Traceback" not in done.stderr, done.stderr
    return done.stderr


def test_what_cannot_serve_is_said_at_the_start(broken: list[str], document_repository: Path) -> None:
    said = start(document_repository, *broken)
    assert "tls_certificate" in said or "tls_key" in said or "tls_client_ca" in said


def test_half_a_pair_is_none(pair: Pair, document_repository: Path) -> None:
    assert "tls_key" in start(document_repository, "--tls-certificate", str(pair.certificate))
    assert "tls_certificate" in start(document_repository, "--tls-key", str(pair.key))
