"""The server's certificate, its key and the authority of its clients: checked before use, read again when they change.

Transports get them at every new connection. A pair that does not match, or is half written, is never passed to them.
"""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import NamedTuple

from forwardpass.errors import SettingsError
from forwardpass.security.certificate_dates import expiry
from forwardpass.watched_files import Watched, read_bytes


class ServerCertificate(NamedTuple):
    """The files' contents, in PEM, and Python's SSL contexts made from them."""

    chain: bytes
    key: bytes
    authority: bytes | None  # of clients; None: clients need no certificate
    context: ssl.SSLContext  # for HTTP/2
    http_context: ssl.SSLContext  # for HTTP/1.1
    expiry: float  # of the first of the chain to expire, in seconds since 1970


class Certificates:
    """With `client_ca`, only clients with a certificate from that authority are accepted."""

    def __init__(self, certificate: Path, key: Path, client_ca: Path | None) -> None:
        """Raises SettingsError for files that can't be read or don't match."""
        self._certificate, self._key, self._client_ca = certificate, key, client_ca
        paths = [certificate, key, *([client_ca] if client_ca is not None else [])]
        self.watched: Watched[ServerCertificate] = Watched("the server's certificate", paths, self._read)

    def current(self) -> ServerCertificate:
        """The one in use, after checking the files: another object if they were read again."""
        self.watched.look()
        return self.watched.value

    def context(self) -> ssl.SSLContext:
        """The SSL context for a new connection."""
        return self.current().context

    def _read(self) -> ServerCertificate:
        certificate = read_bytes(self._certificate, "tls_certificate")
        key = read_bytes(self._key, "tls_key")
        authority = None if self._client_ca is None else read_bytes(self._client_ca, "tls_client_ca")
        # Checked here, because gRPC would only report "invalid private key" and the failure would not be counted. Files
        # that change just now may differ from the bytes read above: then gRPC keeps its last pair, and the next look
        # reads them again.
        http2, http1 = (self._context(authority, application) for application in ("h2", "http/1.1"))
        try:
            end = expiry(certificate)
        except ValueError as error:
            raise SettingsError(f"tls_certificate {self._certificate}: {error}") from None
        return ServerCertificate(certificate, key, authority, http2, http1, end)

    def _context(self, authority: bytes | None, application: str) -> ssl.SSLContext:
        """The SSL context for connections that speak `application` (ALPN)."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2  # HTTP/2 requires at least this
        context.options |= ssl.OP_NO_RENEGOTIATION  # HTTP/2 forbids it, and a read would have to wait for a write
        context.set_alpn_protocols([application])
        try:
            context.load_cert_chain(self._certificate, self._key, password=_no_password)
        except (ssl.SSLError, ValueError, OSError) as error:
            raise SettingsError(
                f"tls_certificate {self._certificate} and tls_key {self._key}: expected a certificate in PEM and its "
                f"unencrypted key: {_reason(error)}"
            ) from None
        if authority is not None:
            try:
                context.load_verify_locations(cadata=authority.decode("ascii"))
                context.verify_mode = ssl.CERT_REQUIRED
            except (ssl.SSLError, ValueError) as error:
                raise SettingsError(
                    f"tls_client_ca {self._client_ca}: expected certificates in PEM: {_reason(error)}"
                ) from None
        return context


def _no_password() -> bytes:
    raise ValueError("the key is encrypted")


def _reason(error: Exception) -> str:
    return (error.reason or "not PEM").lower().replace("_", " ") if isinstance(error, ssl.SSLError) else str(error)
