"""Regions of shared memory: what may be registered, read and written, and when a region's file is closed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from forwardpass import protocol
from forwardpass.errors import AlreadyExists, InvalidRequest, UnknownMethod, UnknownRegion
from forwardpass.inference.parameters import RegionRange
from forwardpass.inference.shared_memory import FOLDER, MOST_REGIONS, SharedMemoryRegions, SharedMemoryService

pytestmark = pytest.mark.skipif(not Path(FOLDER).is_dir(), reason=f"there is no {FOLDER} here")


@pytest.fixture
def make() -> Iterator[Callable[..., str]]:
    """`make(data)`: a shared-memory object with this content; its key."""
    made: list[Path] = []

    def new(data: bytes) -> str:
        key = f"forwardpass-test-{os.getpid()}-{len(made)}"
        path = Path(FOLDER, key)
        path.write_bytes(data)
        made.append(path)
        return "/" + key

    yield new
    for path in made:
        path.unlink()


@pytest.fixture
def regions() -> SharedMemoryRegions:
    return SharedMemoryRegions(most=1 << 20)


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_a_window_reads_and_writes_its_own_bytes(regions: SharedMemoryRegions, make: Callable[..., str]) -> None:
    key = make(bytes(range(64)))
    regions.register("r", key, 16, 32)
    window = regions.window(RegionRange("r", 4, 8))
    assert window.read() == bytes(range(20, 28))
    window.write(b"abcdef")
    content = Path(FOLDER + key).read_bytes()
    assert content == bytes(range(20)) + b"abcdef" + bytes(range(26, 64))


@pytest.mark.parametrize("slash", ["/", ""])
def test_a_key_may_have_one_slash_before_it(regions: SharedMemoryRegions, make: Callable[..., str], slash: str) -> None:
    regions.register("r", slash + make(b"12345678").removeprefix("/"), 0, 8)
    assert regions.window(RegionRange("r", 0, 8)).read() == b"12345678"


@pytest.mark.parametrize(
    "key",
    ["", "/", ".", "..", "/..", "//a", "a/b", "/../etc/hostname", "../etc/hostname", "a\0b", "x" * 256, "no-such"],
)
def test_a_key_never_leaves_the_folder(regions: SharedMemoryRegions, key: str) -> None:
    with pytest.raises(InvalidRequest, match="shared-memory region 'r'"):
        regions.register("r", key, 0, 1)
    assert regions.status("") == []


def test_a_link_or_a_pipe_is_no_region(regions: SharedMemoryRegions, make: Callable[..., str], tmp_path: Path) -> None:
    target = tmp_path / "secret"
    target.write_bytes(b"secret")
    link, pipe = Path(FOLDER, f"forwardpass-link-{os.getpid()}"), Path(FOLDER, f"forwardpass-pipe-{os.getpid()}")
    link.symlink_to(target)
    os.mkfifo(pipe)
    try:
        for path in (link, pipe):
            with pytest.raises(InvalidRequest):
                regions.register("r", "/" + path.name, 0, 1)
    finally:
        link.unlink()
        pipe.unlink()


@pytest.mark.parametrize(("offset", "nbytes"), [(0, 65), (64, 1), (1, 64), (2**63, 1), (0, 2**64 - 1), (0, 0)])
def test_a_region_lies_within_its_object(
    regions: SharedMemoryRegions, make: Callable[..., str], offset: int, nbytes: int
) -> None:
    key = make(bytes(64))
    before = descriptors()
    with pytest.raises(InvalidRequest):
        regions.register("r", key, offset, nbytes)
    assert descriptors() == before


@pytest.mark.parametrize(("offset", "nbytes"), [(0, 33), (32, 1), (2**63, 1), (1, 2**63)])
def test_a_window_lies_within_its_region(
    regions: SharedMemoryRegions, make: Callable[..., str], offset: int, nbytes: int
) -> None:
    regions.register("r", make(bytes(64)), 0, 32)
    with pytest.raises(InvalidRequest, match="has 32 bytes"):
        regions.window(RegionRange("r", offset, nbytes))


def test_an_object_that_shrank_is_an_error_and_is_not_made_larger_again(
    regions: SharedMemoryRegions, make: Callable[..., str]
) -> None:
    key = make(bytes(64))
    regions.register("r", key, 0, 64)
    window = regions.window(RegionRange("r", 0, 64))
    os.truncate(FOLDER + key, 10)
    with pytest.raises(InvalidRequest, match="made smaller"):
        window.read()
    with pytest.raises(InvalidRequest, match="made smaller"):
        window.write(bytes(64))
    assert Path(FOLDER + key).stat().st_size == 10


def test_a_name_is_registered_once(regions: SharedMemoryRegions, make: Callable[..., str]) -> None:
    key = make(b"first---")
    regions.register("r", key, 0, 8)
    with pytest.raises(AlreadyExists, match="'r'"):
        regions.register("r", make(b"second--"), 0, 8)
    assert regions.window(RegionRange("r", 0, 8)).read() == b"first---"
    regions.unregister("r")
    with pytest.raises(UnknownRegion):
        regions.window(RegionRange("r", 0, 8))
    regions.register("r", make(b"third---"), 0, 8)
    assert regions.window(RegionRange("r", 0, 8)).read() == b"third---"


def test_a_region_is_open_for_as_long_as_a_request_has_a_window_on_it(
    regions: SharedMemoryRegions, make: Callable[..., str]
) -> None:
    before = descriptors()
    regions.register("r", make(b"12345678"), 0, 8)
    window = regions.window(RegionRange("r", 0, 8))
    regions.unregister("")
    assert window.read() == b"12345678"
    assert descriptors() == before + 1
    del window
    assert descriptors() == before


def test_the_number_of_regions_is_bounded(
    regions: SharedMemoryRegions, make: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forwardpass.inference.shared_memory.MOST_REGIONS", 3)
    assert MOST_REGIONS > 3
    key = make(b"12345678")
    for i in range(3):
        regions.register(f"r{i}", key, 0, 8)
    with pytest.raises(InvalidRequest, match="limit"):
        regions.register("one more", key, 0, 8)


def test_the_calls_say_what_is_registered(regions: SharedMemoryRegions, make: Callable[..., str]) -> None:
    calls = SharedMemoryService(regions).methods
    key = make(bytes(64))
    calls["SystemSharedMemoryRegister"](
        protocol.SystemSharedMemoryRegisterRequest(name="r", key=key, offset=8, byte_size=16)
    )
    said = calls["SystemSharedMemoryStatus"](protocol.SystemSharedMemoryStatusRequest())
    assert {name: (r.name, r.key, r.offset, r.byte_size) for name, r in said.regions.items()} == {
        "r": ("r", key, 8, 16)
    }
    with pytest.raises(UnknownRegion, match="'other'"):
        calls["SystemSharedMemoryStatus"](protocol.SystemSharedMemoryStatusRequest(name="other"))
    calls["SystemSharedMemoryUnregister"](protocol.SystemSharedMemoryUnregisterRequest(name="other"))
    calls["SystemSharedMemoryUnregister"](protocol.SystemSharedMemoryUnregisterRequest(name="r"))
    assert not calls["SystemSharedMemoryStatus"](protocol.SystemSharedMemoryStatusRequest()).regions


@pytest.mark.parametrize("call", ["CudaSharedMemoryStatus", "CudaSharedMemoryRegister", "CudaSharedMemoryUnregister"])
def test_cuda_shared_memory_is_said_not_to_be_offered(regions: SharedMemoryRegions, call: str) -> None:
    with pytest.raises(UnknownMethod, match="CUDA shared memory is not offered"):
        SharedMemoryService(regions).methods[call](protocol.METHODS[call].request(name="region"))


def test_forgetting_all_cuda_regions_is_no_error_for_there_are_none(regions: SharedMemoryRegions) -> None:
    SharedMemoryService(regions).methods["CudaSharedMemoryUnregister"](protocol.CudaSharedMemoryUnregisterRequest())


def test_where_it_is_turned_off_every_call_says_so() -> None:
    for name, call in SharedMemoryService(None).methods.items():
        if name != "CudaSharedMemoryUnregister":
            with pytest.raises(UnknownMethod):
                call(protocol.METHODS[name].request())
