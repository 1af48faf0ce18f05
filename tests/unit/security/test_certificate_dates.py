"""A certificate's end, as OpenSSL says it."""

from __future__ import annotations

import calendar
import ssl
import subprocess
import time
from pathlib import Path

import pytest
from tests.service.certificates import Authority

from forwardpass.security.certificate_dates import expiry


@pytest.mark.parametrize("days", [1, 400, 20_000, 365 * 40])
def test_it_is_what_openssl_says(tmp_path: Path, days: int) -> None:
    authority = Authority(tmp_path)
    pair = authority.issue("server", days)
    said = subprocess.run(
        ["openssl", "x509", "-in", pair.certificate, "-noout", "-enddate"], capture_output=True, text=True, check=True
    ).stdout
    end = calendar.timegm(time.strptime(said.strip().removeprefix("notAfter="), "%b %d %H:%M:%S %Y GMT"))
    assert expiry(pair.certificate.read_bytes()) == end
    chain = pair.certificate.read_bytes() + b"\n# its authority, for two days\n" + authority.certificate.read_bytes()
    assert expiry(chain) == min(end, expiry(authority.certificate.read_bytes()))


@pytest.mark.parametrize("size", [0, 5, 60, 300, -1])
def test_what_is_none_is_refused(tmp_path: Path, size: int) -> None:
    with pytest.raises(ValueError, match="got none"):
        expiry(b"")
    der = ssl.PEM_cert_to_DER_cert(Authority(tmp_path).certificate.read_text())
    with pytest.raises(ValueError, match="expected a certificate in DER"):
        expiry(ssl.DER_cert_to_PEM_cert(der[:size]).encode())
