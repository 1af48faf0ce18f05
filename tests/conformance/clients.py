"""How a program in each client's language is built and run: from `callers/` (drains) and `verifiers/` (answers).

Nothing is installed from here: what Debian's packages and `make conformance-tools` did not bring is skipped.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from tests.conformance.conftest import TOOLS

GO_SOURCES = Path("/usr/share/gocode")  # where Debian's packages put them
JARS = Path("/usr/share/java")

Command = Sequence[str | Path]


def _build(tool: str, words: Command, package: str, **more: str) -> None:
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


def _python(program: Path, _folder: Path) -> Command:
    return sys.executable, program.with_suffix(".py")


def _old_python(program: Path, _folder: Path) -> Command:
    python = TOOLS / "old-grpc" / "bin" / "python"
    if not python.exists():
        pytest.skip("the old grpcio is not there: `make conformance-tools` gets it")
    return python, program.with_suffix(".py")


def _go(program: Path, folder: Path) -> Command:
    package = "golang-go golang-google-grpc-dev"
    if not (GO_SOURCES / "src" / "google.golang.org" / "grpc").exists():
        pytest.skip(f"grpc-go's sources are not there (Debian: {package})")
    settings = {"GO111MODULE": "off", "GOPATH": str(GO_SOURCES), "GOCACHE": str(folder / "cache")}
    _build("go", ["build", "-o", folder / "program", program.with_suffix(".go")], package, **settings)
    return (folder / "program",)


def _node(program: Path, _folder: Path) -> Command:
    modules = TOOLS / "node" / "node_modules"
    if shutil.which("node") is None or not (modules / "@grpc" / "grpc-js").exists():
        pytest.skip("node or @grpc/grpc-js is not there: `make conformance-tools` gets the latter where there is npm")
    return "env", f"NODE_PATH={modules}", "node", program.with_suffix(".js")


def _cc(program: Path, folder: Path) -> Command:
    package = "g++ pkg-config libgrpc++-dev"
    if shutil.which("pkg-config") is None or subprocess.run(["pkg-config", "--exists", "grpc++"]).returncode:
        pytest.skip(f"gRPC for C++ is not there (Debian: {package})")
    flags = subprocess.run(
        ["pkg-config", "--cflags", "--libs", "grpc++"], stdout=subprocess.PIPE, text=True, check=True
    )
    words = ["-O1", "-std=c++17", program.with_suffix(".cc"), "-o", folder / "program", *flags.stdout.split()]
    _build("g++", words, package)
    return (folder / "program",)


def _java(program: Path, folder: Path) -> Command:
    package = "default-jdk-headless libgrpc-java libnetty-java libperfmark-java"
    names = ("grpc-core", "grpc-netty", "netty-all", "perfmark-api", "guava")
    if not all((JARS / f"{name}.jar").exists() for name in names):
        pytest.skip(f"grpc-java is not there (Debian: {package})")
    names = ("grpc", "netty", "perfmark", "guava", "failureaccess")
    jars = [str(jar) for name in names for jar in JARS.glob(f"{name}*.jar")]
    source = program.with_name(f"{program.name.capitalize()}.java")
    _build("javac", ["-cp", ":".join(jars), "-d", folder, source], package)
    return "java", "-cp", ":".join([*jars, str(folder)]), source.stem


CLIENTS: dict[str, Callable[[Path, Path], Command]] = {
    "python": _python, "old python": _old_python, "go": _go, "node": _node, "c++": _cc, "java": _java,
}  # fmt: skip
