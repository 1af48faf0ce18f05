"""The init container's program: what it fetches over HTTP, what it refuses, and that nothing refused is left there."""

from __future__ import annotations

import hashlib
import http.server
import io
import os
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.deploy import toolbox

from forwardpass import Client
from forwardpass.testing.server_process import ServerProcess

PROGRAM = toolbox.CHART / "files" / "fetch.py"
Fetch = Callable[[bytes, str | None], subprocess.CompletedProcess[str]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "models").mkdir()
    return tmp_path / "models"


@pytest.fixture
def fetch(folder: Path, tmp_path: Path) -> Iterator[Fetch]:
    """`fetch(archive, sha256)`: serve it on loopback and run the program; None: the digest that it has."""
    published = tmp_path / "published"
    published.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, directory=str(published), **kwargs)  # type: ignore[arg-type]

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()

    def run(archive: bytes, sha256: str | None) -> subprocess.CompletedProcess[str]:
        (published / "a.tar.gz").write_bytes(archive)
        command = [
            sys.executable,
            str(PROGRAM),
            f"http://127.0.0.1:{server.server_port}/a.tar.gz",
            sha256 or hashlib.sha256(archive).hexdigest(),
            str(folder),
        ]
        environ = os.environ | {"no_proxy": "127.0.0.1"}
        return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environ)

    yield run
    server.shutdown()
    server.server_close()
    thread.join()


def _archive(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for member, content in members:
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return out.getvalue()


def test_a_repository_that_was_fetched_is_served(fetch: Fetch, folder: Path, digits_repository: Path) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        tar.add(digits_repository / "digits", "digits")
    done = fetch(out.getvalue(), None)
    assert done.returncode == 0, done.stderr
    with ServerProcess(folder) as server, Client(server.address) as client:
        assert [m.name for m in client.models(ready=True)] == ["digits"]


def test_another_content_is_refused_and_nothing_unpacked(fetch: Fetch, folder: Path) -> None:
    done = fetch(_archive((tarfile.TarInfo("m/1/model.onnx"), b"x")), "00" * 32)
    assert done.returncode == 1
    assert f"expected sha256 {'00' * 32}, got " in done.stderr
    assert not list(folder.iterdir())


def _link(name: str, to: str, kind: bytes) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, to
    return member


@pytest.mark.parametrize(
    "member",
    [
        tarfile.TarInfo("../outside"),
        tarfile.TarInfo("/outside"),
        tarfile.TarInfo("a/../../outside"),
        _link("link", "/etc/passwd", tarfile.SYMTYPE),
        _link("hard", "/etc/passwd", tarfile.LNKTYPE),
        _link("device", "", tarfile.CHRTYPE),
    ],
    ids=lambda member: member.name,
)
def test_only_files_below_the_folder_are_unpacked(member: tarfile.TarInfo, fetch: Fetch, folder: Path) -> None:
    done = fetch(_archive((member, b"")), None)
    assert done.returncode == 1
    assert "expected a plain file or folder" in done.stderr
    assert not list(folder.iterdir()) and not (folder.parent / "outside").exists()


def test_what_is_no_archive_is_said_on_one_line(fetch: Fetch) -> None:
    done = fetch(b"<html>not found</html>", None)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
