"""The modules of deploy/publish, which is no package: its files are scripts and mkdocs' hooks."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
PUBLISH = ROOT / "deploy" / "publish"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"publish_{name}", PUBLISH / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their own module up
    spec.loader.exec_module(module)
    return module
