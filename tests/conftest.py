"""What every test may ask for: model repositories with the trained recipes in them.

The recipes run as their users run them, in a process of their own, so that torch comes into a test's process only where
the test itself imports it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

# Before anything imports ONNX Runtime; what the tests start inherits it.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

MODELS = Path(__file__).parents[1] / "models"


def _trained(name: str) -> list[Path]:
    """The version folders of models/<name>, which are trained now if there are none."""
    recipe = MODELS / name / "train.py"
    # Runs side by side take turns: the first trains, the others find what it made. The lock ends with the process.
    with recipe.open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _versions(name):
            command = [sys.executable, str(recipe), "--repository", str(MODELS)]
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600)
            assert done.returncode == 0, f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}"
    return _versions(name)


def _versions(name: str) -> list[Path]:
    return sorted(path.parent for path in MODELS.glob(f"{name}/[0-9]*/model.onnx"))


def _repository(name: str, folder: Path) -> Path:
    """A repository in `folder` with a copy of one trained model, so that no test can spoil another run's."""
    versions = _trained(name)
    assert versions, f"models/{name}/train.py ended well, but left no version in models/{name}"
    for version in versions:
        shutil.copytree(version, folder / name / version.name)
    options = MODELS / name / "model.toml"
    if options.exists():
        shutil.copy2(options, folder / name)
    return folder


@pytest.fixture(scope="session")
def digits_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model repository with the trained `digits` (64 -> 10) in it, and nothing else. Not to be written to."""
    return _repository("digits", tmp_path_factory.mktemp("digits_repository"))


@pytest.fixture(scope="session")
def document_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model repository with `document` (5 -> 3) in it, and nothing else. Not to be written to."""
    return _repository("document", tmp_path_factory.mktemp("document_repository"))
