"""Throw-away certificates for the tests, made by the openssl command: an authority, and pairs that it signs."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Pair:
    certificate: Path
    key: Path


class Authority:
    """Signs certificates; its own is `certificate`. Skips the test where there is no openssl."""

    def __init__(self, folder: Path, name: str = "authority") -> None:
        if shutil.which("openssl") is None:
            pytest.skip("the command openssl is not installed")
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.certificate, self._key = folder / f"{name}.pem", folder / f"{name}.key"
        self._run(
            "req", "-x509", *self._new_key(self._key), "-out", self.certificate, "-days", "2", "-subj", f"/CN={name}"
        )

    def issue(self, name: str, days: int = 2) -> Pair:
        """A pair for 127.0.0.1 and localhost. `days` negative: it has expired."""
        pair = Pair(self._folder / f"{name}.pem", self._folder / f"{name}.key")
        request = self._folder / f"{name}.csr"
        self._run(
            "req", *self._new_key(pair.key), "-out", request, "-subj", f"/CN={name}",
            "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1",
        )  # fmt: skip
        self._run(
            "x509", "-req", "-in", request, "-CA", self.certificate, "-CAkey", self._key, "-CAcreateserial",
            "-out", pair.certificate, "-days", str(days), "-copy_extensions", "copy",
        )  # fmt: skip
        return pair

    @staticmethod
    def _new_key(path: Path) -> tuple[str | Path, ...]:
        return "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", path

    @staticmethod
    def _run(*words: str | Path) -> None:
        done = subprocess.run(["openssl", *map(str, words)], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
