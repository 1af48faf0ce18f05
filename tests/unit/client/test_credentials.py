"""What a connection is told, and what it then does: which targets are this machine, tokens, certificates. No server."""

from __future__ import annotations

from pathlib import Path

import pytest

from forwardpass.client import Client, Tls, credentials
from forwardpass.client.credentials import is_local
from forwardpass.errors import SettingsError

TOKEN = "a-token-0123456789"


@pytest.mark.parametrize(
    "target",
    [
        "127.0.0.1:8001", "localhost:8001", "localhost", "[::1]:8001", "unix:/run/a.sock", "unix-abstract:a",
        "dns:///localhost:8001", "dns:localhost:1", "ipv4:127.0.0.1:1,127.0.0.2:2", "ipv6:[::1]:1", "ipv6:[::1]",
    ],
)  # fmt: skip
def test_targets_that_are_this_machine(target: str) -> None:
    assert is_local(target)


@pytest.mark.parametrize(
    "target",
    [
        "10.0.0.1:8001", "example.org:8001", "dns:///a.b:8001", "dns://127.0.0.1/a.b:8001", "localhost.example.org:1",
        "ipv4:127.0.0.1:1,10.0.0.1:1", "ipv6:[fd00::1]:1", "[fd00::1]:1", "0.0.0.0:8001", "vsock:1:2", "",
    ],
)  # fmt: skip
def test_targets_that_are_not(target: str) -> None:
    assert not is_local(target)


def test_a_token_is_not_sent_where_it_can_be_read_on_the_way() -> None:
    with pytest.raises(SettingsError, match=r"expected tls for 10\.0\.0\.1:8001") as caught:
        Client("10.0.0.1:8001", token=TOKEN)
    assert TOKEN not in str(caught.value)
    for options in ({"tls": Tls()}, {"plaintext_token": True}):
        Client("10.0.0.1:8001", token=TOKEN, **options).close()  # type: ignore[arg-type]
    Client("127.0.0.1:8001", token=TOKEN).close()
    Client("10.0.0.1:8001").close()


def metadata(client: Client) -> tuple[tuple[str, str], ...]:
    return client._metadata((("forwardpass-timings", "1"),))


def test_a_token_goes_along_with_what_else_is_said(tmp_path: Path) -> None:
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    for options in ({"token": TOKEN}, {"token_file": tmp_path / "token"}, {"token_file": str(tmp_path / "token")}):
        with Client(**options) as client:  # type: ignore[arg-type]
            assert metadata(client) == (("forwardpass-timings", "1"), ("authorization", f"Bearer {TOKEN}"))
    with Client() as client:
        assert metadata(client) == (("forwardpass-timings", "1"),)


def test_a_file_with_a_token_is_read_again_and_a_bad_one_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "token"
    path.write_text(TOKEN)
    monkeypatch.setattr(credentials, "_LOOK_EVERY", 0.0)  # at each call
    with Client(token_file=path) as client:
        path.write_text("another-token-0123456789\n")
        assert metadata(client)[-1] == ("authorization", "Bearer another-token-0123456789")
        for bad in ("", "two words", "ünprintable"):
            path.write_text(bad)
            assert metadata(client)[-1] == ("authorization", "Bearer another-token-0123456789")
        path.unlink()
        assert metadata(client)[-1] == ("authorization", "Bearer another-token-0123456789")
    assert "another-token" not in caplog.text


@pytest.mark.parametrize("token", ["", "two words", "new\nline", "ünprintable"])
def test_what_is_no_token_is_refused_unseen(token: str, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(token)
    for options in ({"token": token}, {"token_file": tmp_path / "token"}):
        with pytest.raises(SettingsError, match=r"^token.*: expected one token of printable ASCII") as caught:
            Client(**options)  # type: ignore[arg-type]
        assert not token or token not in str(caught.value)


def test_options_that_contradict_each_other_and_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="expected token or token_file, got both"):
        Client(token=TOKEN, token_file=tmp_path / "token")
    with pytest.raises(SettingsError, match=r"token_file: .* cannot be read: No such file"):
        Client(token_file=tmp_path / "token")
    with pytest.raises(SettingsError, match="tls: expected certificate and key together, key is missing"):
        Client(tls=Tls(certificate=tmp_path / "a.pem"))
    with pytest.raises(SettingsError, match="tls: expected certificate and key together, certificate is missing"):
        Client(tls=Tls(key=tmp_path / "a.key"))
    with pytest.raises(SettingsError, match=r"tls ca: .* cannot be read: No such file"):
        Client(tls=Tls(ca=tmp_path / "ca.pem"))


def test_the_name_of_the_certificate_can_be_given() -> None:
    with Client("ipv4:10.0.0.1:1,10.0.0.2:1", tls=Tls(server_name="models.example")) as client:
        assert dict(client._arguments)["grpc.ssl_target_name_override"] == "models.example"
