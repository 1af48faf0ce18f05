"""Packages that one kind of look needs and the serving install has not: loaded when used, or refused in one line."""

from __future__ import annotations

import importlib
from typing import Any

from forwardpass.errors import InsightError


def need(module: str, extra: str) -> Any:
    """The module `module`; `extra` is the extra of forwardpass that brings it. Raises InsightError naming both."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        missing = (error.name or module).partition(".")[0]
        raise InsightError(f"needs {missing}, which is not installed: pip install 'forwardpass[{extra}]'") from error
