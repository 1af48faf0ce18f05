"""The gallery in docs/examples: each program as it is gets the right answer of a real server, and reports a refusal."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from tests.conformance.clients import GO_SOURCES
from tests.conformance.conftest import TOOLS
from tests.publish.publish_modules import ROOT

from forwardpass import Client
from forwardpass.testing.server_process import ServerProcess

EXAMPLES = ROOT / "docs" / "examples"
PROTO = ROOT / "proto"
SECONDS = 300.0

Command = Sequence[str | Path]


def run(*words: str | Path, cwd: Path = EXAMPLES, **more: str) -> subprocess.CompletedProcess[str]:
    # Loopback: no proxy, whatever the environment says.
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    return subprocess.run(
        [*map(str, words)],
        cwd=cwd,
        env={**environment, **more},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )


def build(*words: str | Path, cwd: Path, **more: str) -> None:
    done = run(*words, cwd=cwd, **more)
    assert done.returncode == 0, done.stderr


def need(*tools: str, debian: str) -> None:
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)}: not there (Debian: {debian})")


def _python(program: Path, _folder: Path) -> Command:
    return sys.executable, program


def _shell(program: Path, _folder: Path) -> Command:
    need("curl", debian="curl")
    return "sh", program


def _node(program: Path, _folder: Path) -> Command:
    modules = TOOLS / "node" / "node_modules"
    if shutil.which("node") is None or not (modules / "@grpc" / "proto-loader").exists():
        pytest.skip("node or @grpc/grpc-js is not there: `make conformance-tools` gets the latter where there is npm")
    return "env", f"NODE_PATH={modules}", "node", program


def _go(program: Path, folder: Path) -> Command:
    need("go", "protoc", debian="golang-go protobuf-compiler")
    generator = "github.com/golang/protobuf/protoc-gen-go"
    if not all((GO_SOURCES / "src" / path).exists() for path in ("google.golang.org/grpc", generator)):
        pytest.skip("grpc-go's sources are not there (Debian: golang-google-grpc-dev)")
    settings = {
        "GO111MODULE": "off",
        "GOPATH": f"{folder}:{GO_SOURCES}",
        "GOCACHE": str(folder / "cache"),
        "GOFLAGS": "",
    }
    package = folder / "src" / "example" / "inference"
    package.mkdir(parents=True)
    build("go", "build", "-o", folder / "protoc-gen-go", generator, cwd=folder, **settings)
    build(
        "protoc",
        f"--plugin={folder / 'protoc-gen-go'}",
        f"--go_out=plugins=grpc,import_path=inference:{package}",
        "-I",
        PROTO,
        PROTO / "grpc_service.proto",
        PROTO / "model_config.proto",
        cwd=folder,
    )
    build("go", "build", "-o", folder / "predict", program, cwd=folder, **settings)
    return (folder / "predict",)


def _cc(program: Path, folder: Path) -> Command:
    """As the program's own first lines say it."""
    need("g++", "protoc", "grpc_cpp_plugin", "pkg-config", debian="g++ pkg-config protobuf-compiler-grpc libgrpc++-dev")
    if run("pkg-config", "--exists", "grpc++").returncode:
        pytest.skip("gRPC for C++ is not there (Debian: libgrpc++-dev)")
    lines = [line.removeprefix("//   ") for line in program.read_text("utf-8").splitlines() if line.startswith("//   ")]
    shutil.copy(program, folder)
    script = "\n".join(lines).replace("../../proto", str(PROTO)).replace("g++ ", "g++ -O0 ")
    assert script.count("protoc -I") == 1 and script.count("g++ -O0 ") == 1
    build("bash", "-euc", script, cwd=folder)
    return (folder / "predict",)


PROGRAMS: dict[str, Callable[[Path, Path], Command]] = {
    "predict.py": _python,
    "predict_triton.py": _python,
    "predict.sh": _shell,
    "predict.js": _node,
    "predict.go": _go,
    "predict.cc": _cc,
}
COMPILED = ("predict.go", "predict.cc")
NAMES = [pytest.param(name, marks=pytest.mark.slow if name in COMPILED else ()) for name in PROGRAMS]


@pytest.fixture(scope="module")
def server(digits_repository: Path) -> Iterator[ServerProcess]:
    with ServerProcess(digits_repository) as server:
        yield server
        assert server.stop() == 0, server.tail()


@pytest.fixture(scope="module")
def empty_server(document_repository: Path) -> Iterator[ServerProcess]:
    """A server without the model that the programs ask for."""
    with ServerProcess(document_repository) as server:
        yield server
        assert server.stop() == 0, server.tail()


def pixels(name: str) -> list[int]:
    """The image in a program's text, as 64 numbers."""
    rows = re.findall(r"^[\s\[]*((?:\d+, *){7}\d+)", (EXAMPLES / name).read_text("utf-8"), re.MULTILINE)
    return [int(number) for row in rows for number in row.split(",")]


def test_the_gallery_is_listed_and_run() -> None:
    files = {path.name for path in EXAMPLES.iterdir() if path.is_file()} - {"README.md"}
    assert files == PROGRAMS.keys()
    listed = set(re.findall(r"^\| \[([\w.]+)\]", (EXAMPLES / "README.md").read_text("utf-8"), re.MULTILINE))
    assert listed == files


def test_all_send_the_same_image() -> None:
    images = {name: pixels(name) for name in PROGRAMS}
    assert len(images["predict.py"]) == 64
    assert {tuple(image) for image in images.values()} == {tuple(images["predict.py"])}


@pytest.fixture(scope="module", params=NAMES)
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Command]:
    """A program's name, and how it is started: built once."""
    return request.param, PROGRAMS[request.param](EXAMPLES / request.param, tmp_path_factory.mktemp("built"))


def call(program: tuple[str, Command], server: ServerProcess) -> subprocess.CompletedProcess[str]:
    name, command = program
    return run(*command, server.http_url.partition("://")[2] if name.endswith(".sh") else server.address)


def test_it_prints_what_the_server_answers(program: tuple[str, Command], server: ServerProcess) -> None:
    done = call(program, server)
    with Client(server.address) as client:
        logits = client.predict("digits", np.array(pixels(program[0]), np.float32))
    assert logits.argmax() == 3
    assert (done.returncode, done.stdout) == (0, f"digit 3, logit {logits.max():.3f}\n"), done.stderr


def test_it_reports_a_refusal(program: tuple[str, Command], empty_server: ServerProcess) -> None:
    done = call(program, empty_server)
    assert done.returncode != 0 and not done.stdout
    assert "there is no model 'digits'" in done.stderr
