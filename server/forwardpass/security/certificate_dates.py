"""When certificates expire, read from their DER form (RFC 5280, 4.1). Python's ssl shows this only of a peer's."""

from __future__ import annotations

import re
import ssl
from datetime import UTC, datetime
from typing import Final

_PEM: Final = re.compile(rb"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)
_UTC_TIME, _GENERALIZED_TIME, _VERSION = 0x17, 0x18, 0xA0
_BEFORE_VALIDITY: Final = 3  # serial number, signature algorithm, issuer
_FORMATS: Final = {_UTC_TIME: "%y%m%d%H%M%SZ", _GENERALIZED_TIME: "%Y%m%d%H%M%SZ"}


def expiry(chain: bytes) -> float:
    """The time at which the first certificate of a PEM chain expires, in seconds since 1970.

    Raises ValueError if it has none, or one that cannot be read.
    """
    dates = [_not_after(ssl.PEM_cert_to_DER_cert(pem.decode("ascii"))) for pem in _PEM.findall(chain)]
    if not dates:
        raise ValueError("expected certificates in PEM, got none")
    return min(dates)


def _not_after(der: bytes) -> float:
    try:
        _, certificate, _ = _element(der)
        _, signed, _ = _element(certificate)
        kind, _, rest = _element(signed)
        if kind == _VERSION:
            signed = rest
        for _ in range(_BEFORE_VALIDITY):
            _, _, signed = _element(signed)
        _, validity, _ = _element(signed)
        _, _, rest = _element(validity)  # its beginning
        kind, text, _ = _element(rest)
        return datetime.strptime(text.decode("ascii"), _FORMATS[kind]).replace(tzinfo=UTC).timestamp()
    except (IndexError, KeyError, UnicodeDecodeError) as error:
        raise ValueError(f"expected a certificate in DER: {error!r}") from None


def _element(data: bytes) -> tuple[int, bytes, bytes]:
    """The tag and contents of the first element of DER, and what follows it."""
    size, start = data[1], 2
    if size & 0x80:
        start += size & 0x7F
        size = int.from_bytes(data[2:start], "big")
    if len(data) < start + size:
        raise IndexError("cut off")
    return data[0], data[start : start + size], data[start + size :]
