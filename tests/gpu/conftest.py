"""Tests on a real CUDA device. Where there is none, each is skipped, and the reason says what is missing."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.conftest import recipe_repository

from forwardpass.execution.cuda.detect import detect_cuda


@pytest.fixture(scope="session", autouse=True)
def devices() -> int:
    """How many CUDA devices there are; at least one."""
    machine = detect_cuda()
    if not machine.count:
        pytest.skip(f"no CUDA device can be used: {machine.missing}")
    return machine.count


@pytest.fixture(scope="session", params=["document", "digits", "mnist"])
def recipe(request: pytest.FixtureRequest, devices: int, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe's model folder, with its version 1. Not to be written to."""
    name: str = request.param
    return recipe_repository(name, tmp_path_factory.mktemp("recipes")) / name
