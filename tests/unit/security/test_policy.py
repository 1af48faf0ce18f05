"""From the settings to what is asked for of security, and what a listener is warned of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from forwardpass.errors import SettingsError
from forwardpass.security.policy import SecurityConfig
from forwardpass.settings import Settings
from forwardpass.transport.addresses import is_loopback


def security(**settings: Any) -> SecurityConfig:
    made = Settings(**settings)
    return SecurityConfig(made, is_loopback(made.host))


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    path = tmp_path / "tokens"
    path.write_text("infer some-token-0123456789\n")
    return path


@pytest.mark.parametrize("host", ["127.0.0.1", "127.3.2.1", "localhost", "::1", "[::1]", "unix:/run/forwardpass.sock"])
def test_a_listener_that_only_this_machine_reaches_is_not_warned_of(
    host: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert is_loopback(host)
    security(host=host)
    assert not caplog.records


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "[::]", "10.0.0.1", "example.org"])
def test_a_plaintext_listener_for_others_is_warned_of(
    host: str, tokens: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert not is_loopback(host)
    security(host=host)
    security(host=host, tokens=tokens)
    first, second = (record.getMessage() for record in caplog.records)
    assert f"listening on {host} without TLS" in first and "tokens" not in first
    assert "requests, answers and tokens" in second


@pytest.mark.parametrize(
    ("settings", "shares"),
    [
        ({}, True),
        ({"host": "0.0.0.0"}, False),
        ({"host": "0.0.0.0", "shared_memory": "on"}, True),
        ({"host": "unix:/run/forwardpass.sock"}, True),
        ({"shared_memory": "off"}, False),
    ],
)
def test_who_may_share_memory(settings: dict[str, Any], shares: bool) -> None:
    assert security(**settings).shared_memory is shares


def test_with_tokens_memory_is_shared_whoever_reaches_the_port(tokens: Path) -> None:
    assert security(host="0.0.0.0", tokens=tokens).shared_memory


@pytest.mark.parametrize("given", [["tls_certificate"], ["tls_key"], ["tls_client_ca"], ["tls_key", "tls_client_ca"]])
def test_half_a_pair_is_an_error(given: list[str], tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="expected tls_certificate and tls_key together"):
        security(**dict.fromkeys(given, tmp_path / "file"))
