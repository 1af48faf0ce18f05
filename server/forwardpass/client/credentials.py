"""A client's credentials: TLS and a token, and which addresses may get a token without TLS. Reads files; no network.

`Access` has them for callers without gRPC's channels: load generators.
"""

from __future__ import annotations

import ipaddress
import re
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Final

import grpc

from forwardpass.errors import SettingsError
from forwardpass.watched_files import Watched, read_bytes

_LOOK_EVERY = 1.0  # seconds between checks of a token file
_TOKEN = re.compile(r"[!-~]+")


@dataclass(frozen=True, slots=True)
class Tls:
    """TLS to a server. Files are PEM, and are read once, when the client is created.

    - `ca`: the authorities that may sign the server's certificate; None: gRPC's defaults.
    - `certificate`, `key`: the client's own pair, if the server asks for one (mutual TLS).
    - `server_name`: the name that the server's certificate must have, if it is not the address's host.
    """

    ca: str | PathLike[str] | None = None
    certificate: str | PathLike[str] | None = None
    key: str | PathLike[str] | None = None
    server_name: str | None = None

    def _check_pair(self) -> None:
        if (self.certificate is None) != (self.key is None):
            missing = "certificate" if self.certificate is None else "key"
            raise SettingsError(f"tls: expected certificate and key together, {missing} is missing")

    def context(self) -> ssl.SSLContext:
        """The same for a socket that speaks HTTP/2; `ca` None: the system's. Raises SettingsError."""
        self._check_pair()
        try:
            context = ssl.create_default_context(cafile=self.ca)
            if self.certificate is not None:
                context.load_cert_chain(self.certificate, self.key)
        except OSError as error:  # ssl.SSLError too
            named = [str(path) for path in (self.ca, self.certificate, self.key) if path is not None]
            raise SettingsError(f"tls: {', '.join(named)}: cannot be used: {error.strerror or error}") from None
        context.set_alpn_protocols(["h2"])
        return context

    def credentials(self) -> grpc.ChannelCredentials:
        """gRPC's channel credentials. Raises SettingsError for an unreadable file, and for half a pair."""
        self._check_pair()
        ca, key, certificate = (
            None if path is None else read_bytes(Path(path), f"tls {what}")
            for what, path in (("ca", self.ca), ("key", self.key), ("certificate", self.certificate))
        )
        return grpc.ssl_channel_credentials(ca, key, certificate)


@dataclass(frozen=True, slots=True)
class Access:
    """How a server is called: in plaintext or by TLS, without or with a token. As the options of a Client."""

    tls: Tls | None = None
    token_file: str | PathLike[str] | None = None
    plaintext_token: bool = False

    def options(self) -> dict[str, Any]:
        """As keyword arguments of Client."""
        return {"tls": self.tls, "token_file": self.token_file, "plaintext_token": self.plaintext_token}

    def metadata(self, address: str) -> tuple[tuple[str, str], ...]:
        """What every call brings. Raises SettingsError for a token that cannot be read, or be sent to `address`."""
        token = token_source(None, self.token_file)
        if token is None:
            return ()
        check_plaintext(address, self.tls, self.plaintext_token)
        return (("authorization", token()),)


PLAIN: Final = Access()


def check_plaintext(address: str, tls: Tls | None, allowed: bool) -> None:
    """Raise SettingsError if a token sent to `address` could be read on the way, and that is not `allowed`."""
    if tls is None and not (allowed or is_local(address)):
        raise SettingsError(
            f"token: expected tls for {address}, since a token sent there in plaintext can be read on the way; "
            "plaintext_token=True sends it all the same, as where a mesh encrypts what leaves the pod"
        )


def is_local(address: str) -> bool:
    """Whether a gRPC target is on this machine: a unix socket, or only loopback addresses."""
    scheme, _, rest = address.partition(":")
    if scheme in ("unix", "unix-abstract", "vsock"):
        return scheme != "vsock"
    if scheme in ("dns", "ipv4", "ipv6"):
        address = rest.rpartition("/")[2] if scheme == "dns" else rest.lstrip("/")
    hosts = [part.rpartition(":")[0] if not part.endswith("]") and ":" in part else part for part in address.split(",")]
    return all(_is_loopback(host.strip("[]")) for host in hosts)


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def token_source(token: str | None, file: str | PathLike[str] | None) -> Callable[[], str] | None:
    """A function that returns the current value of `authorization`; None: no token."""
    if token is not None and file is not None:
        raise SettingsError("token: expected token or token_file, got both")
    if token is not None:
        said = _bearer(token, "token")
        return lambda: said
    if file is None:
        return None
    path = Path(file)

    def read() -> str:
        return _bearer(read_bytes(path, "token_file").decode("utf-8", "replace").strip(), f"token_file: {path}")

    watched: Watched[str] = Watched("the token", [path], read, every=_LOOK_EVERY)

    def current() -> str:
        watched.look()
        return watched.value

    return current


def _bearer(token: str, what: str) -> str:
    if not _TOKEN.fullmatch(token):
        raise SettingsError(f"{what}: expected one token of printable ASCII without blanks")
    return f"Bearer {token}"
