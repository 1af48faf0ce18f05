"""The modules of deploy/publish, which is no package: scripts and hooks of mkdocs that import each other."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
PUBLISH = ROOT / "deploy" / "publish"

# An sdist is what stage.py makes of a clone: its README and pyproject.toml are changed already.
in_a_clone = pytest.mark.skipif(
    "<!-- install: from the folder -->" not in (ROOT / "README.md").read_text("utf-8"),
    reason="no clone but an sdist, which is the result of what is tested here",
)


def load(name: str) -> ModuleType:
    if str(PUBLISH) not in sys.path:
        sys.path.append(str(PUBLISH))
    return importlib.import_module(name)
