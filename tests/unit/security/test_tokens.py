"""The file of tokens, and what a call's metadata is worth."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from forwardpass import protocol
from forwardpass.errors import PermissionDenied, SettingsError, Unauthenticated
from forwardpass.security.tokens import ADMIN_METHODS, LOOK_EVERY, Role, Tokens, parse, role_of

ONE, TWO = "first-token-0123456789", "second-token-0123456789"


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "tokens"
    path.write_text(f"infer {ONE}\nadmin {TWO}\n")
    return path


def bearer(token: str) -> list[tuple[str, str | bytes]]:
    return [("user-agent", "test"), ("authorization", f"Bearer {token}")]


def test_roles(path: Path) -> None:
    tokens = Tokens(path)
    assert tokens.refusal(bearer(ONE), Role.INFER) is None
    assert tokens.refusal(bearer(TWO), Role.INFER) is None
    assert tokens.refusal(bearer(TWO), Role.ADMIN) is None
    refusal = tokens.refusal(bearer(ONE), Role.ADMIN)
    assert isinstance(refusal, PermissionDenied) and "the role admin; the token has infer" in str(refusal)


@pytest.mark.parametrize(
    "metadata",
    [
        [],
        [("authorization", ONE)],
        [("authorization", f"Basic {ONE}")],
        [("authorization", b"Bearer " + ONE.encode())],
        bearer(""),
        bearer(ONE[:-1]),
        bearer(ONE + "x"),
        bearer(ONE.upper()),
        bearer("sha256:" + hashlib.sha256(ONE.encode()).hexdigest()),
        bearer("tok\udc80en"),
        bearer(ONE) + bearer(ONE),
        [("Authorization", f"Bearer {ONE}")],  # HTTP/2 has no capital letters
    ],
)
def test_anything_but_one_known_token_is_refused_without_saying_it(
    path: Path, metadata: list[tuple[str, str | bytes]]
) -> None:
    refusal = Tokens(path).refusal(metadata, Role.INFER)
    assert isinstance(refusal, Unauthenticated)
    assert ONE not in str(refusal) and TWO not in str(refusal)


def test_of_a_token_with_both_roles_the_higher_counts(path: Path) -> None:
    path.write_text(f"admin {ONE}\ninfer {ONE}\n")
    assert Tokens(path).refusal(bearer(ONE), Role.ADMIN) is None


def test_a_digest_stands_for_its_token(path: Path) -> None:
    path.write_text(f"infer sha256:{hashlib.sha256(ONE.encode()).hexdigest().upper()}\n")
    assert Tokens(path).refusal(bearer(ONE), Role.INFER) is None


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "has no token"),
        ("# nothing\n\n", "has no token"),
        (f"infer {ONE}\n{TWO}\n", "line 2: expected 'infer TOKEN' or 'admin TOKEN'"),
        (f"root {ONE}\n", "line 1: expected 'infer TOKEN'"),
        (f"infer {ONE} # mine\n", "line 1: expected 'infer TOKEN'"),
        ("infer short\n", "line 1: expected a token of at least 16 characters, got 5"),
        ("infer sha256:abc\n", "line 1: expected a token of printable ASCII, or sha256:"),
        ("infer tökentökentökentöken\n", "line 1: expected a token of printable ASCII"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_by_line_and_without_a_token(path: Path, text: str, what: str) -> None:
    path.write_text(text)
    with pytest.raises(SettingsError, match=what) as caught:
        parse(path)
    assert ONE not in str(caught.value) and TWO not in str(caught.value)


def test_a_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot be read"):
        Tokens(tmp_path / "nothing")


def test_the_file_is_looked_at_again_after_a_while(path: Path) -> None:
    clock = Clock()
    tokens = Tokens(path, clock)
    path.write_text(f"infer {TWO}{TWO}\n")
    assert tokens.refusal(bearer(ONE), Role.INFER) is None, "not yet"
    clock.now += LOOK_EVERY
    assert isinstance(tokens.refusal(bearer(ONE), Role.INFER), Unauthenticated)
    assert tokens.refusal(bearer(TWO + TWO), Role.INFER) is None
    path.unlink()
    clock.now += LOOK_EVERY
    assert tokens.refusal(bearer(TWO + TWO), Role.INFER) is None, "the last good file stays"
    assert (tokens.watched.reloads, tokens.watched.failures) == (1, 1)


def test_what_needs_admin_are_methods_of_the_service() -> None:
    assert set(protocol.METHODS) >= ADMIN_METHODS
    assert role_of("ModelInfer") is Role.INFER and role_of("RepositoryModelLoad") is Role.ADMIN
