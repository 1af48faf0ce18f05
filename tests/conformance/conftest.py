"""Foreign tools for the tests here, found where `make conformance-tools` puts them. Nothing is installed from here."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.conformance.tool import Tool

from forwardpass.testing.server_process import ServerProcess

TOOLS = Path(__file__).parents[2] / ".venv-conformance"


def _tool(name: str) -> Path:
    """`name`: of a program, or its path below the tools'."""
    path = TOOLS / name if "/" in name else TOOLS / "bin" / name
    if not path.exists():
        pytest.skip(f"{name} is not there: `make conformance-tools` gets it")
    return path


@pytest.fixture(scope="session")
def python() -> Tool:
    """The tools' own Python, with kserve and tritonclient."""
    return Tool(_tool("python"))


@pytest.fixture(scope="session")
def old_grpc() -> Tool:
    """A Python with an old grpcio and nothing else."""
    tool = Tool(_tool("old-grpc/bin/python"))
    if "Error" in tool.run("-c", "import grpc", check=False):
        pytest.skip("the old grpcio is not there: no wheel of it fits this machine")
    return tool


@pytest.fixture(scope="session")
def buf() -> Tool:
    return Tool(_tool("buf"))


@pytest.fixture(scope="session")
def perf_analyzer() -> Tool:
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        pytest.skip("perf_analyzer's binary is for Linux on x86-64")
    path = _tool("perf_analyzer")
    folders = {library.parent for name in ("libcudart.so.12", "libb64.so.0d") for library in TOOLS.rglob(name)}
    tool = Tool(path, tuple(sorted(folders)))
    said = tool.run("--version", check=False)
    if "error while loading shared libraries" in said:
        pytest.skip(f"perf_analyzer cannot be run here: {said.strip().rpartition(': error')[2] or said.strip()}")
    return tool


@pytest.fixture(scope="module", params=["direct", "grpcio"])
def served(request: pytest.FixtureRequest, digits_repository: Path) -> Iterator[ServerProcess]:
    """A server of `digits` with reflection, once behind each transport."""
    with ServerProcess(digits_repository, "--transport", request.param, "--reflection") as server:
        yield server
        assert server.stop() == 0, server.tail()
