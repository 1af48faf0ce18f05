"""A client's credentials: TLS and a token, and which addresses may get a token without TLS. Reads files; no network."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

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

    def credentials(self) -> grpc.ChannelCredentials:
        """gRPC's channel credentials. Raises SettingsError for an unreadable file, and for half a pair."""
        if (self.certificate is None) != (self.key is None):
            missing = "certificate" if self.certificate is None else "key"
            raise SettingsError(f"tls: expected certificate and key together, {missing} is missing")
        ca, key, certificate = (
            None if path is None else read_bytes(Path(path), f"tls {what}")
            for what, path in (("ca", self.ca), ("key", self.key), ("certificate", self.certificate))
        )
        return grpc.ssl_channel_credentials(ca, key, certificate)


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
