"""Security as configured: TLS, tokens, and whether clients may share memory with the server."""

from __future__ import annotations

import logging
from typing import Any

from forwardpass.errors import SettingsError
from forwardpass.observability import catalogue
from forwardpass.observability.catalogue import SampleSink
from forwardpass.security.certificates import Certificates
from forwardpass.security.tokens import Tokens
from forwardpass.settings import Settings
from forwardpass.watched_files import Watched

logger = logging.getLogger(__name__)


class SecurityConfig:
    """`certificates` and `tokens` are None if they are not configured."""

    def __init__(self, settings: Settings, local: bool) -> None:
        """`local`: only this machine can reach the port.

        Raises SettingsError for files that can't be used and for settings that contradict each other.
        """
        self.certificates: Certificates | None = None
        if settings.tls_certificate is not None and settings.tls_key is not None:
            self.certificates = Certificates(settings.tls_certificate, settings.tls_key, settings.tls_client_ca)
        elif settings.tls_certificate or settings.tls_key or settings.tls_client_ca:
            missing = "tls_certificate" if settings.tls_certificate is None else "tls_key"
            raise SettingsError(f"{missing}: expected tls_certificate and tls_key together, it is missing")
        self.tokens = None if settings.tokens is None else Tokens(settings.tokens)
        asked = settings.shared_memory
        self.shared_memory = asked == "on" or (asked == "auto" and (local or self.tokens is not None))
        if self.certificates is None and not local:
            what = "requests, answers and tokens" if self.tokens is not None else "requests and answers"
            logger.warning(
                "listening on %s without TLS: %s can be read and changed on the way; --tls-certificate and --tls-key "
                "turn it on", settings.host, what,
            )  # fmt: skip

    def collect(self, samples: SampleSink) -> None:
        """Add the counts of the files' reloads to a scrape."""
        for what, files in self._watched().items():
            samples.add(catalogue.FILE_RELOADS_TOTAL, (what, "ok"), files.reloads)
            samples.add(catalogue.FILE_RELOADS_TOTAL, (what, "failed"), files.failures)
        if self.certificates is not None:
            samples.add(catalogue.CERTIFICATE_EXPIRY_SECONDS, (), self.certificates.watched.value.expiry)

    def read_again(self) -> dict[str, str]:
        """Read the files even if unchanged. Returns, by kind, the reason it can't be used, or "". Blocks."""
        return {what: files.read_again() for what, files in self._watched().items()}

    def _watched(self) -> dict[str, Watched[Any]]:
        watched: dict[str, Watched[Any]] = {}
        if self.certificates is not None:
            watched["certificates"] = self.certificates.watched
        if self.tokens is not None:
            watched["tokens"] = self.tokens.watched
        return watched
