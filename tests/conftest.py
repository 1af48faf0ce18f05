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

import hypothesis
import pytest

# Before anything imports ONNX Runtime; what the tests start inherits it.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

# How long an example takes is the machine's business, not the test's.
hypothesis.settings.register_profile("untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("untimed")

MODELS = Path(__file__).parents[1] / "models"


def recipe_repository(name: str, folder: Path) -> Path:
    """A repository in `folder`: one recipe's newest version, copied as version 1, so that no test spoils another run.

    The recipe does nothing where that version was made from the sources as they are now.
    """
    recipe = MODELS / name / "train.py"
    command = [sys.executable, str(recipe), "--repository", str(MODELS)]
    # Runs side by side take turns: the first trains, the others find what it made. The lock ends with the process.
    with recipe.open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600)
    assert done.returncode == 0, f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}"
    versions = [path.parent for path in MODELS.glob(f"{name}/*/model.onnx") if path.parent.name.isdecimal()]
    assert versions, f"{' '.join(command)} left no version in {MODELS / name}:\n{done.stdout}"
    shutil.copytree(max(versions, key=lambda path: int(path.name)), folder / name / "1")
    shutil.copy2(MODELS / name / "model.toml", folder / name)
    return folder


@pytest.fixture(scope="session")
def digits_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model repository with the trained `digits` (64 -> 10) in it, and nothing else. Not to be written to."""
    return recipe_repository("digits", tmp_path_factory.mktemp("digits_repository"))


@pytest.fixture(scope="session")
def document_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model repository with `document` (5 -> 3) in it, and nothing else. Not to be written to."""
    return recipe_repository("document", tmp_path_factory.mktemp("document_repository"))
