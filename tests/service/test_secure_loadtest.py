"""loadtest, plan and tune against a server that asks for TLS, a client's certificate and a token."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from certificates import Authority, Pair
from models import chain, save

from forwardpass.cli.main import main
from forwardpass.client import Access, Tls, Unauthenticated, Unavailable
from forwardpass.errors import SettingsError
from forwardpass.loadtest import request_bodies
from forwardpass.loadtest.target import LoadClient, LoadTarget
from forwardpass.testing.server_process import ServerProcess
from forwardpass.transport.http2.client_connection import ClientConnection, Ended, framed, request_fields

SECRET = "a-token-of-the-tests"


class Secured:
    """A server with everything, and what a client of it needs."""

    def __init__(self, folder: Path) -> None:
        self.authority = Authority(folder / "authority")
        self.pair, self.client = self.authority.issue("server"), self.authority.issue("client")
        self.token = folder / "token"
        self.token.write_text(f"{SECRET}\n")
        (folder / "tokens").write_text(f"admin {SECRET}\n")
        self.settings = {
            "tls_certificate": self.pair.certificate,
            "tls_key": self.pair.key,
            "tls_client_ca": self.authority.certificate,
            "tokens": folder / "tokens",
        }
        self.access = Access(self.tls(self.client), self.token)
        self.options = ["--tls-ca", str(self.authority.certificate), "--token-file", str(self.token)]
        self.options += ["--tls-certificate", str(self.client.certificate), "--tls-key", str(self.client.key)]

    def tls(self, pair: Pair | None) -> Tls:
        own = (None, None) if pair is None else (pair.certificate, pair.key)
        return Tls(self.authority.certificate, *own)

    def arguments(self) -> list[str]:
        return [text for name, path in self.settings.items() for text in (f"--{name.replace('_', '-')}", str(path))]


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Secured:
    return Secured(tmp_path_factory.mktemp("secured"))


@pytest.fixture(scope="module", params=["direct", "grpcio"])
def server(
    request: pytest.FixtureRequest, secured: Secured, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    repository = tmp_path_factory.mktemp("models")
    save(repository, "m", chain((64, 32, 10)), "max_batch_size = 8\n")
    with ServerProcess(repository, "--transport", request.param, *secured.arguments()) as running:
        yield running


def target(server: ServerProcess, access: Access, rows: int = 1) -> LoadTarget:
    requests = request_bodies.make(request_bodies.info(server.address, "m", access=access), "", {rows: 1.0}, None, 0)
    client = LoadClient(warm_up=0.2, processes=1, connections=2, patience=20.0, access=access)
    return LoadTarget(server.address, "m", requests, client, metrics_url="", verify=True)


def test_every_request_is_answered_through_tls(server: ServerProcess, secured: Secured) -> None:
    point = target(server, secured.access).at_rate(200, 0.6)
    assert set(point.recording.by_outcome()) == {"OK"} and point.recording.ok > 50
    # Requests of many records, and answers of several.
    point = target(server, secured.access, rows=1000).closed(4, 0.2)
    assert set(point.recording.by_outcome()) == {"OK"} and point.recording.ok > 0


def test_who_lacks_something_is_refused_by_name(server: ServerProcess, secured: Secured, tmp_path: Path) -> None:
    with pytest.raises(Unauthenticated):
        target(server, Access(secured.tls(secured.client)))
    with pytest.raises(Unavailable):
        target(server, Access(secured.tls(None), secured.token))
    with pytest.raises(Unavailable):
        target(server, Access(Tls(Authority(tmp_path, "other").certificate), secured.token))
    with pytest.raises(SettingsError, match="expected certificate and key together, key is missing"):
        target(server, Access(Tls(certificate=secured.client.certificate)))
    with pytest.raises(SettingsError, match="cannot be used"):
        Tls(ca=secured.token).context()
    with pytest.raises(SettingsError, match=r"expected tls for far\.example:8001"):
        Access(None, secured.token).metadata("far.example:8001")


def test_a_connection_reads_more_records_than_it_takes_at_once(server: ServerProcess, secured: Secured) -> None:
    # An answer of 8 MB: hundreds of records, of which the last ones lie in the socket when the first were read.
    host, _, port = server.address.rpartition(":")
    info = request_bodies.info(server.address, "m", access=secured.access)
    made = request_bodies.make(info, "", {40_000: 1.0}, None, 0)
    (expected,) = request_bodies.answers(server.address, made, False, secured.access)
    assert secured.access.tls is not None
    one = ClientConnection(host, int(port), keep_answers=True, tls=secured.access.tls.context())
    fields = request_fields(request_bodies.PATH, server.address, secured.access.metadata(server.address), "https")
    try:
        one.start(1, fields, framed(made.messages[0]))
        ended: list[Ended] = []
        while not ended:
            one.flush()
            ended = one.receive()
    finally:
        one.close()
    assert (ended[0].status, ended[0].answer) == (0, expected)


def test_a_server_without_http2_in_its_tls_is_an_error(secured: Secured) -> None:
    import socket
    import ssl
    import threading

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(secured.pair.certificate, secured.pair.key)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            peer, _ = listener.accept()
            with context.wrap_socket(peer, server_side=True) as secure:
                secure.recv(1)

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(OSError, match="speaks TLS, and no HTTP/2 in it"):
            ClientConnection("127.0.0.1", listener.getsockname()[1], tls=secured.tls(None).context())
        thread.join()


def test_the_command_takes_the_options(
    server: ServerProcess, secured: Secured, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["loadtest", server.address, "m", "--rate", "100", "--duration", "0.5", "--warm-up", "0.1"]
    assert main([*words, "--json", str(tmp_path / "out.json"), *secured.options]) in (0, 3)
    assert capsys.readouterr().err.count("OK") >= 1
    (point,) = json.loads((tmp_path / "out.json").read_text())["measurements"]
    assert set(point["outcomes"]) == {"OK"}
    assert main([*words, *secured.options[:-4]]) == 1
    assert "UNAVAILABLE" in capsys.readouterr().err


@pytest.mark.slow
def test_plan_measures_through_tls(
    server: ServerProcess, secured: Secured, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["plan", "--rate", "1000", "--slo", "p99=500ms", "--target", server.address, "--model", "m", "--json"]
    words += ["--duration", "0.3", "--rounds", "1", *secured.options]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["cores"] >= 1


@pytest.mark.slow
def test_tune_starts_its_server_with_the_environment_and_measures_through_tls(
    secured: Secured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "models", "m", chain((64, 32, 10)), "max_batch_size = 8\n")
    for name, path in secured.settings.items():
        monkeypatch.setenv(f"FORWARDPASS_{name.upper()}", str(path))
    words = ["tune", "m", "--repository", str(tmp_path / "models"), "--state", str(tmp_path / "state.json")]
    words += ["--slo", "p99=100ms", "--seconds", "0.2,0.3,0.4", "--max-batch-size", "8,64", "--instances", "1"]
    words += ["--intra-op-threads", "1", "--max-queue-delay-us", "0"]
    assert main([*words, *secured.options]) == 0
    assert "in time" in capsys.readouterr().err
    assert main(words) == 1, "without the options it is refused as anybody is"
