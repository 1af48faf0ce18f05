"""Who may call what: bearer tokens from a file, each with a role. No gRPC: metadata in, an error or None out.

The file has a line for each token, `ROLE TOKEN`, where ROLE is infer or admin, and TOKEN is the token itself or
`sha256:` and its digest in hexadecimal. Empty lines and lines that begin with # are ignored. It is read again when it
changes.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

from forwardpass.errors import PermissionDenied, RequestError, SettingsError, Unauthenticated
from forwardpass.watched_files import Watched, read_bytes

KEY: Final = "authorization"  # a key of the request metadata; its value: "Bearer TOKEN"
SHORTEST = 16  # characters of a token, at least: one that can be guessed is worse than none
LOOK_EVERY = 1.0  # seconds between two checks of the file
_TOKEN = re.compile(r"[!-~]+")
_DIGEST = re.compile(r"sha256:([0-9a-fA-F]{64})")


class Role(enum.IntEnum):
    """What a token permits; a higher role includes the lower."""

    INFER = 1
    ADMIN = 2


# Methods that change what the server serves, or have it read and write memory of its machine. All others of the
# inference service need INFER; health needs no role.
ADMIN_METHODS = frozenset(
    {
        "RepositoryModelLoad", "RepositoryModelUnload", "TraceSetting", "LogSettings",
        "SystemSharedMemoryStatus", "SystemSharedMemoryRegister", "SystemSharedMemoryUnregister",
        "CudaSharedMemoryStatus", "CudaSharedMemoryRegister", "CudaSharedMemoryUnregister",
    }
)  # fmt: skip

Digests = tuple[tuple[bytes, Role], ...]


def role_of(method: str) -> Role:
    """The role that a method of the inference service needs."""
    return Role.ADMIN if method in ADMIN_METHODS else Role.INFER


class Tokens:
    """The tokens that are valid now. Thread-safe."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises SettingsError for a file that can't be used, naming the line but no token."""
        self.watched: Watched[Digests] = Watched(
            "the file of tokens", [path], lambda: parse(path), every=LOOK_EVERY, clock=clock
        )

    def refusal(self, metadata: Iterable[tuple[str, str | bytes]], needed: Role) -> RequestError | None:
        """The error to reject a call with this metadata; None: it is allowed.

        The time it takes does not depend on which token is wrong or where it differs.
        """
        self.watched.look()
        given = [value for key, value in metadata if key == KEY]
        if len(given) != 1 or not isinstance(given[0], str):
            return Unauthenticated(f"expected one 'authorization: Bearer TOKEN' (metadata or header), got {len(given)}")
        scheme, _, token = given[0].partition(" ")
        if scheme.lower() != "bearer":
            return Unauthenticated("expected 'authorization: Bearer TOKEN' (metadata or header), got another scheme")
        digest = hashlib.sha256(token.strip().encode("utf-8", "surrogateescape")).digest()
        role = 0
        for known, its_role in self.watched.value:
            # Every one is compared, even after a match.
            role = max(role, its_role * hmac.compare_digest(digest, known))
        if not role:
            return Unauthenticated("the token is not known here")
        if role < needed:
            return PermissionDenied(
                f"this call needs the role {needed.name.lower()}; the token has {Role(role).name.lower()}"
            )
        return None


def parse(path: Path) -> Digests:
    """The digests and roles in a file. Raises SettingsError naming the line."""
    text = read_bytes(path, "tokens").decode("utf-8", "replace")
    found: list[tuple[bytes, Role]] = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        where = f"tokens: {path}, line {number}"
        if len(words) != 2 or words[0] not in ("infer", "admin"):
            raise SettingsError(f"{where}: expected 'infer TOKEN' or 'admin TOKEN'")
        role, token = Role[words[0].upper()], words[1]
        if digest := _DIGEST.fullmatch(token):
            found.append((bytes.fromhex(digest[1]), role))
        elif token.startswith("sha256:") or not _TOKEN.fullmatch(token):
            raise SettingsError(f"{where}: expected a token of printable ASCII, or sha256: and 64 hexadecimal digits")
        elif len(token) < SHORTEST:
            raise SettingsError(f"{where}: expected a token of at least {SHORTEST} characters, got {len(token)}")
        else:
            found.append((hashlib.sha256(token.encode()).digest(), role))
    if not found:
        raise SettingsError(f"tokens: {path} has no token")
    return tuple(found)
