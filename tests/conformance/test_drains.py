"""Clients of five gRPC libraries that ask nobody's health lose no call while two servers are stopped by turns.

Behind the direct door. grpcio's own server cancels what reaches it between its GOAWAY and the client's reading of it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from tests.conformance.conftest import TOOLS
from tests.conformance.drains import CALLERS, drain_by_turns, drain_failures

from forwardpass import protocol

GO_SOURCES = Path("/usr/share/gocode")  # where Debian's packages put them
JARS = Path("/usr/share/java")
DRAINS = 20


def _build(tool: str, words: Sequence[str | Path], package: str, **more: str) -> None:
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not there (Debian: {package})")
    done = subprocess.run(
        [tool, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **more},
    )
    assert done.returncode == 0, done.stdout


def _python(_folder: Path) -> Sequence[str | Path]:
    return sys.executable, CALLERS / "callers.py"


def _go(folder: Path) -> Sequence[str | Path]:
    package = "golang-go golang-google-grpc-dev"
    if not (GO_SOURCES / "src" / "google.golang.org" / "grpc").exists():
        pytest.skip(f"grpc-go's sources are not there (Debian: {package})")
    settings = {"GO111MODULE": "off", "GOPATH": str(GO_SOURCES), "GOCACHE": str(folder / "cache")}
    _build("go", ["build", "-o", folder / "callers", CALLERS / "callers.go"], package, **settings)
    return (folder / "callers",)


def _node(_folder: Path) -> Sequence[str | Path]:
    modules = TOOLS / "node" / "node_modules"
    if shutil.which("node") is None or not (modules / "@grpc" / "grpc-js").exists():
        pytest.skip("node or @grpc/grpc-js is not there: `make conformance-tools` gets the latter where there is npm")
    return "env", f"NODE_PATH={modules}", "node", CALLERS / "callers.js"


def _cc(folder: Path) -> Sequence[str | Path]:
    package = "g++ pkg-config libgrpc++-dev"
    if shutil.which("pkg-config") is None or subprocess.run(["pkg-config", "--exists", "grpc++"]).returncode:
        pytest.skip(f"gRPC for C++ is not there (Debian: {package})")
    flags = subprocess.run(
        ["pkg-config", "--cflags", "--libs", "grpc++"], stdout=subprocess.PIPE, text=True, check=True
    )
    words = ["-O1", "-std=c++17", CALLERS / "callers.cc", "-o", folder / "callers", *flags.stdout.split()]
    _build("g++", words, package)
    return (folder / "callers",)


def _java(folder: Path) -> Sequence[str | Path]:
    package = "default-jdk-headless libgrpc-java libnetty-java libperfmark-java"
    names = ("grpc-core", "grpc-netty", "netty-all", "perfmark-api", "guava")
    if not all((JARS / f"{name}.jar").exists() for name in names):
        pytest.skip(f"grpc-java is not there (Debian: {package})")
    names = ("grpc", "netty", "perfmark", "guava", "failureaccess")
    jars = [str(jar) for name in names for jar in JARS.glob(f"{name}*.jar")]
    _build("javac", ["-cp", ":".join(jars), "-d", folder, CALLERS / "Callers.java"], package)
    return "java", "-cp", ":".join([*jars, str(folder)]), "Callers"


CLIENTS: dict[str, Callable[[Path], Sequence[str | Path]]] = {
    "python": _python, "go": _go, "node": _node, "c++": _cc, "java": _java,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("wait", ["0", "1"])
def test_no_call_fails(client: str, wait: str, digits_repository: Path, tmp_path: Path) -> None:
    command = CLIENTS[client](tmp_path)
    request = protocol.ModelInferRequest(model_name="digits")
    request.inputs.add(name="x", datatype="FP32", shape=[1, 64])
    request.raw_input_contents.append(np.zeros((1, 64), np.float32).tobytes())
    message = request.SerializeToString()
    found = drain_by_turns(digits_repository, message, tmp_path, command, DRAINS, "--drain-wait", wait)
    print(client, found)
    assert found["ok"] > 100 * DRAINS
    assert drain_failures(found) == {}
