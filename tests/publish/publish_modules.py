"""The modules of deploy/publish, which is no package: scripts and hooks of mkdocs that import each other."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
PUBLISH = ROOT / "deploy" / "publish"


def load(name: str) -> ModuleType:
    if str(PUBLISH) not in sys.path:
        sys.path.append(str(PUBLISH))
    return importlib.import_module(name)
