"""Packages that only some commands need and a serving install lacks: imported when used, else a one-line error."""

from __future__ import annotations

import importlib
from typing import Any

from forwardpass.errors import InsightError


def need(module: str, extra: str) -> Any:
    """Import `module`, which the extra `extra` of forwardpass installs. Raises InsightError naming both."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        missing = (error.name or module).partition(".")[0]
        raise InsightError(f"needs {missing}, which is not installed: pip install 'forwardpass[{extra}]'") from error
