"""One model directly in the repository's folder, as KServe mounts it, and the links that Kubernetes mounts."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from forwardpass import Client
from forwardpass.errors import ForwardpassError
from forwardpass.testing.server_process import ServerProcess

Serve = Callable[..., ServerProcess]
ROWS = np.linspace(0, 1, 2 * 64, dtype=np.float32).reshape(2, 64)


def _predict(server: ServerProcess, name: str) -> np.ndarray:
    with Client(server.address) as client:
        assert [(m.name, m.version) for m in client.models()] == [(name, "1")]
        return client.predict(name, ROWS)


def test_a_version_is_served_under_the_name_told(digits_repository: Path, tmp_path: Path, serve: Serve) -> None:
    mounted = tmp_path / "models"
    shutil.copytree(digits_repository / "digits" / "1", mounted)
    shutil.copy(digits_repository / "digits" / "model.toml", mounted)
    server = serve(mounted, "--model-name", "my-digits")
    assert any("my-digits version 1: batches of up to 256 rows" in line for line in server.lines)  # model.toml was read
    assert np.array_equal(_predict(server, "my-digits"), _predict(serve(digits_repository), "digits"))


def test_versions_below_the_folder_are_found_too(digits_repository: Path, serve: Serve) -> None:
    _predict(serve(digits_repository / "digits", "--model-name", "other"), "other")


def test_a_folder_of_links_is_loaded(digits_repository: Path, tmp_path: Path, serve: Serve) -> None:
    """As a kubelet writes volumes: each name links into ..data, and that to a folder which is replaced as a whole."""
    version = tmp_path / "..2025_01_01"
    shutil.copytree(digits_repository / "digits" / "1", version)
    (tmp_path / "..data").symlink_to(version.name)
    for path in version.iterdir():
        (tmp_path / path.name).symlink_to(f"..data/{path.name}")
    _predict(serve(tmp_path, "--model-name", "digits"), "digits")


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ForwardpassError, match="no models in"):
        ServerProcess(tmp_path, "--model-name", "digits")
