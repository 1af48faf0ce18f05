"""System shared memory over the wire: tensors that never travel, both ways; and servers that do not offer it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import models
import numpy as np
import pytest

from forwardpass import protocol
from forwardpass.testing.server_process import ServerProcess

FOLDER = Path("/dev/shm")
SECONDS = 60.0

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"there is no {FOLDER} here")


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shared")
    models.save(folder, "two", models.two_by_two())
    models.save(folder, "words", models.echo(models.STRING, ("batch", 1)))
    return folder


@pytest.fixture(scope="module", params=["direct", "grpcio"])
def running(request: pytest.FixtureRequest, repository: Path) -> Iterator[ServerProcess]:
    with ServerProcess(repository, "--transport", request.param) as server:
        yield server
        assert server.stop() == 0, server.tail()


@pytest.fixture
def key() -> Iterator[str]:
    """A shared-memory object of 4 KiB, at /dev/shm + key."""
    name = f"/forwardpass-service-{os.getpid()}"
    path = FOLDER / name[1:]
    path.write_bytes(bytes(4096))
    yield name
    path.unlink()


def call(server: ServerProcess, method: str, **fields: Any) -> Any:
    what = protocol.METHODS[method]
    with grpc.insecure_channel(server.address) as channel:
        unary = channel.unary_unary(what.path, what.request.SerializeToString, what.response.FromString)
        return unary(what.request(**fields), timeout=SECONDS)


def refused(server: ServerProcess, method: str, **fields: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call(server, method, **fields)
    return caught.value.code(), caught.value.details() or ""


def place(offset: int, nbytes: int, region: str = "region") -> dict[str, Any]:
    return {
        "shared_memory_region": {"string_param": region},
        "shared_memory_offset": {"int64_param": offset},
        "shared_memory_byte_size": {"int64_param": nbytes},
    }


A, N = np.arange(6, dtype=np.float32).reshape(2, 3), np.array([[10], [20]])


def two(outputs: list[dict[str, Any]] | None = None, offset: int = 0) -> dict[str, Any]:
    """A request for `two`: `a` from shared memory, `n` in the message."""
    return {
        "model_name": "two",
        "inputs": [
            {"name": "n", "datatype": "INT64", "shape": [2, 1]},
            {"name": "a", "datatype": "FP32", "shape": [2, 3], "parameters": place(offset, A.nbytes)},
        ],
        "outputs": outputs or [],
        "raw_input_contents": [N.tobytes()],
    }


def test_tensors_come_from_a_region_and_go_to_it(running: ServerProcess, key: str) -> None:
    call(running, "SystemSharedMemoryRegister", name="region", key=key, offset=1024, byte_size=2048)
    try:
        path = FOLDER / key[1:]
        for scale in (1, 7):  # the second time nothing of the message is different
            with path.open("r+b") as file:
                file.seek(1024 + 64)
                file.write((scale * A).tobytes())
            outputs = [
                {"name": "most"},
                {"name": "sum", "parameters": place(512, 100)},
                {"name": "n_out"},
            ]
            said = call(running, "ModelInfer", **two(outputs, offset=64))
            assert [o.name for o in said.outputs] == ["most", "sum", "n_out"]
            raw = list(said.raw_output_contents)
            assert np.frombuffer(raw[0], "<f4").tolist() == (scale * A).max(axis=1).tolist()
            assert raw[1] == b""
            assert np.frombuffer(raw[2], "<i8").tolist() == [10, 20]
            told = said.outputs[1].parameters
            assert told["shared_memory_region"].string_param == "region"
            assert told["shared_memory_offset"].int64_param == 512
            assert told["shared_memory_byte_size"].int64_param == 24
            written = path.read_bytes()[1024 + 512 :][:24]
            assert np.frombuffer(written, "<f4").reshape(2, 3).tolist() == (scale * A + N).tolist()
    finally:
        call(running, "SystemSharedMemoryUnregister", name="region")


def test_text_goes_both_ways(running: ServerProcess, key: str) -> None:
    call(running, "SystemSharedMemoryRegister", name="region", key=key, byte_size=4096)
    try:
        words = b"\3\0\0\0one\5\0\0\0three"
        with (FOLDER / key[1:]).open("r+b") as file:
            file.write(words)
        call(
            running,
            "ModelInfer",
            model_name="words",
            inputs=[{"name": "x", "datatype": "BYTES", "shape": [2, 1], "parameters": place(0, len(words))}],
            outputs=[{"name": "y", "parameters": place(2000, 100)}],
        )
        assert (FOLDER / key[1:]).read_bytes()[2000:][: len(words)] == words
    finally:
        call(running, "SystemSharedMemoryUnregister")


def test_what_is_registered_is_told_and_forgotten(running: ServerProcess, key: str) -> None:
    assert not call(running, "SystemSharedMemoryStatus").regions
    call(running, "SystemSharedMemoryRegister", name="region", key=key, offset=8, byte_size=16)
    try:
        (told,) = call(running, "SystemSharedMemoryStatus", name="region").regions.values()
        assert (told.name, told.key, told.offset, told.byte_size) == ("region", key, 8, 16)
        code, text = refused(running, "SystemSharedMemoryRegister", name="region", key=key, byte_size=16)
        assert code is grpc.StatusCode.ALREADY_EXISTS and "'region'" in text
    finally:
        call(running, "SystemSharedMemoryUnregister", name="region")
    assert refused(running, "SystemSharedMemoryStatus", name="region")[0] is grpc.StatusCode.NOT_FOUND
    assert refused(running, "ModelInfer", **two())[0] is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize(("offset", "nbytes"), [(0, 4097), (4096, 1), (2**63, 16), (0, 2**64 - 1)])
def test_a_region_beyond_its_object_is_refused(running: ServerProcess, key: str, offset: int, nbytes: int) -> None:
    code, _ = refused(running, "SystemSharedMemoryRegister", name="region", key=key, offset=offset, byte_size=nbytes)
    assert code is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("bad", ["../etc/passwd", "/../etc/passwd", "a/b", "", "..", "no-such-object"])
def test_a_key_that_is_none_is_refused(running: ServerProcess, bad: str) -> None:
    code, _ = refused(running, "SystemSharedMemoryRegister", name="region", key=bad, byte_size=1)
    assert code is grpc.StatusCode.INVALID_ARGUMENT


def test_places_beyond_the_region_and_outputs_too_large_are_refused(running: ServerProcess, key: str) -> None:
    call(running, "SystemSharedMemoryRegister", name="region", key=key, byte_size=64)
    try:
        for offset in (41, 2**62):
            code, text = refused(running, "ModelInfer", **two(offset=offset))
            assert code is grpc.StatusCode.INVALID_ARGUMENT and "which has 64 bytes" in text
        code, text = refused(running, "ModelInfer", **two([{"name": "sum", "parameters": place(0, 23)}]))
        assert code is grpc.StatusCode.INVALID_ARGUMENT and "has 24 bytes" in text
        assert (FOLDER / key[1:]).read_bytes() == bytes(4096)
        # An object that is made smaller behind the server's back would kill one that had mapped it.
        os.truncate(FOLDER / key[1:], 10)
        code, text = refused(running, "ModelInfer", **two())
        assert code is grpc.StatusCode.INVALID_ARGUMENT and "made smaller" in text
    finally:
        call(running, "SystemSharedMemoryUnregister")
    assert call(running, "ServerLive").live


def test_cuda_shared_memory_is_said_not_to_be_offered(running: ServerProcess) -> None:
    for method in ("CudaSharedMemoryStatus", "CudaSharedMemoryRegister", "CudaSharedMemoryUnregister"):
        code, text = refused(running, method, name="region")
        assert code is grpc.StatusCode.UNIMPLEMENTED and "CUDA shared memory is not offered" in text


def test_a_server_without_it_says_so(repository: Path, key: str) -> None:
    with ServerProcess(repository, "--shared-memory", "off") as server:
        code, text = refused(server, "SystemSharedMemoryRegister", name="region", key=key, byte_size=64)
        assert code is grpc.StatusCode.UNIMPLEMENTED and "turned off" in text
        assert refused(server, "ModelInfer", **two())[0] is grpc.StatusCode.INVALID_ARGUMENT
        assert "system_shared_memory" not in call(server, "ServerMetadata").extensions
