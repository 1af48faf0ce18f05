"""Imports ONNX Runtime in one place: usage reports turned off, and a clear error if it is missing."""

from __future__ import annotations

import os

from forwardpass.errors import SettingsError

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # its Linux wheel would report usage; the user may set 0

try:
    import onnxruntime as ort
except ImportError as error:  # pragma: no cover - needs an environment without it
    raise SettingsError(
        "onnxruntime is not installed: install forwardpass[cpu], or forwardpass[gpu] for CUDA (not both: they "
        "overwrite each other)"
    ) from error

__all__ = ["ort"]
