"""Regions of system (POSIX) shared memory registered by clients, and the RPCs for them. Linux: /dev/shm.

A region is opened once, when it is registered. Its bytes are read and written by calls on its file, not through a
mapping: a client that shrinks its object under a mapping would kill the server with SIGBUS, and one that changes it
during a run would change bytes that were already checked.
"""

from __future__ import annotations

import logging
import os
import re
import stat
import threading
from collections.abc import Callable, Mapping
from typing import Any, Final

from forwardpass import protocol
from forwardpass.errors import AlreadyExists, InvalidRequest, UnknownMethod, UnknownRegion, printable
from forwardpass.inference.parameters import RegionRange

logger = logging.getLogger(__name__)

FOLDER: Final = "/dev/shm"
# POSIX: a name with at most one slash before it. It must not lead out of the folder.
_KEY = re.compile(r"/?(?!\.\.?$)[^/\0]{1,255}")
NAME_LIMIT = 1024  # characters of a region's name
MOST_REGIONS = 4096  # each holds a file descriptor


class SharedMemoryRegion:
    """An open region. Its file is closed when the last request that uses it is done."""

    def __init__(self, name: str, key: str, offset: int, nbytes: int) -> None:
        """Open it. Raises InvalidRequest if it can't be opened, or if the object is smaller than the region."""
        self.name, self.key, self.offset, self.nbytes = name, key, offset, nbytes
        self._file = -1
        what = f"shared-memory region '{printable(name)}'"
        if not _KEY.fullmatch(key):
            raise InvalidRequest(f"{what}: expected a key of one name, as given to shm_open, got '{printable(key)}'")
        if nbytes < 1:
            raise InvalidRequest(f"{what}: expected a size of at least 1 byte, got {nbytes}")
        try:
            path = f"{FOLDER}/{key.removeprefix('/')}"
            self._file = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not a name that a file can have"
            raise InvalidRequest(f"{what}: cannot open '{printable(key)}' in {FOLDER}: {reason}") from None
        status = os.fstat(self._file)
        if not stat.S_ISREG(status.st_mode):
            raise InvalidRequest(f"{what}: '{printable(key)}' is not a shared-memory object")
        if offset + nbytes > status.st_size:
            raise InvalidRequest(
                f"{what}: {nbytes} bytes at offset {offset} reach beyond '{printable(key)}', "
                f"which has {status.st_size} bytes"
            )

    def __del__(self) -> None:
        if self._file >= 0:
            os.close(self._file)

    def read(self, place: RegionRange) -> bytes:
        start = self.offset + place.offset
        parts: list[bytes] = []
        left = place.nbytes
        while left:
            part = os.pread(self._file, left, start)
            if not part:
                raise self._gone(place)
            parts.append(part)
            start += len(part)
            left -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def write(self, place: RegionRange, data: bytes) -> None:
        start = self.offset + place.offset
        # Writing beyond the end would enlarge the object without its owner's knowledge.
        if os.fstat(self._file).st_size < start + len(data):
            raise self._gone(place)
        view = memoryview(data)
        while view:
            try:
                written = os.pwrite(self._file, view, start)
            except OSError as error:
                raise InvalidRequest(
                    f"shared-memory region '{printable(self.name)}' cannot be written: {error.strerror}"
                ) from None
            start += written
            view = view[written:]

    def _gone(self, place: RegionRange) -> InvalidRequest:
        return InvalidRequest(
            f"shared-memory region '{printable(self.name)}': the {place.nbytes} bytes at {place.offset} are gone; "
            f"'{printable(self.key)}' was made smaller after it was registered"
        )


class RegionWindow:
    """A part of a region, checked to lie within it."""

    __slots__ = ("_region", "place")

    def __init__(self, region: SharedMemoryRegion, place: RegionRange) -> None:
        self._region = region
        self.place = place

    def read(self) -> bytes:
        return self._region.read(self.place)

    def write(self, data: bytes) -> None:
        """Write `data`, which must fit the window, at its beginning."""
        self._region.write(self.place, data)


class SharedMemoryRegions:
    """The registered regions by name. Thread-safe; only opening and closing files may block."""

    def __init__(self, most: int) -> None:
        """`most`: the most bytes of one input, since it is copied."""
        self.most = most
        self._lock = threading.Lock()
        self._regions: dict[str, SharedMemoryRegion] = {}

    def register(self, name: str, key: str, offset: int, nbytes: int) -> None:
        """Open a region. Raises InvalidRequest if it can't be opened, AlreadyExists if the name is taken."""
        if not name or len(name) > NAME_LIMIT:
            raise InvalidRequest(f"expected a region's name of 1 to {NAME_LIMIT} characters, got {len(name)}")
        region = SharedMemoryRegion(name, key, offset, nbytes)
        with self._lock:
            if name in self._regions:
                raise AlreadyExists(f"shared-memory region '{printable(name)}' is registered already; unregister it")
            if len(self._regions) >= MOST_REGIONS:
                raise InvalidRequest(f"{MOST_REGIONS} shared-memory regions are registered, which is the limit")
            self._regions[name] = region

    def unregister(self, name: str) -> None:
        """Forget a region, or all if `name` is empty. A missing region is no error."""
        with self._lock:
            if name:
                self._regions.pop(name, None)
            else:
                self._regions.clear()

    def status(self, name: str) -> list[SharedMemoryRegion]:
        """One region, or all if `name` is empty. Raises UnknownRegion."""
        with self._lock:
            return [self._find(name)] if name else list(self._regions.values())

    def window(self, place: RegionRange) -> RegionWindow:
        """A part of a region. Raises UnknownRegion, or InvalidRequest if it reaches beyond the region."""
        with self._lock:
            region = self._find(place.region)
        if place.offset + place.nbytes > region.nbytes:
            raise InvalidRequest(
                f"{place.nbytes} bytes at offset {place.offset} reach beyond shared-memory region "
                f"'{printable(place.region)}', which has {region.nbytes} bytes"
            )
        return RegionWindow(region, place)

    def _find(self, name: str) -> SharedMemoryRegion:
        region = self._regions.get(name)
        if region is None:
            raise UnknownRegion(f"there is no shared-memory region '{printable(name)}'")
        return region


class SharedMemoryService:
    """The shared-memory RPCs, as functions from request message to response message."""

    def __init__(self, regions: SharedMemoryRegions | None) -> None:
        """`regions` None: shared memory is turned off."""
        self._regions = regions
        self.methods: Mapping[str, Callable[[Any], Any]] = {
            "SystemSharedMemoryStatus": self._status,
            "SystemSharedMemoryRegister": self._register,
            "SystemSharedMemoryUnregister": self._unregister,
            "CudaSharedMemoryStatus": self._cuda,
            "CudaSharedMemoryRegister": self._cuda,
            "CudaSharedMemoryUnregister": self._cuda_unregister,
        }

    def _status(self, request: Any) -> Any:
        response = protocol.SystemSharedMemoryStatusResponse()
        for region in self._on().status(request.name):
            entry = response.regions[region.name]
            entry.name, entry.key = region.name, region.key
            entry.offset, entry.byte_size = region.offset, region.nbytes
        return response

    def _register(self, request: Any) -> Any:
        self._on().register(request.name, request.key, request.offset, request.byte_size)
        logger.info(
            "shared-memory region %s: %d bytes at %d of %s",
            printable(request.name), request.byte_size, request.offset, printable(request.key),
        )  # fmt: skip
        return protocol.SystemSharedMemoryRegisterResponse()

    def _unregister(self, request: Any) -> Any:
        self._on().unregister(request.name)
        return protocol.SystemSharedMemoryUnregisterResponse()

    def _cuda(self, _request: Any) -> Any:
        raise UnknownMethod("CUDA shared memory is not offered; system shared memory and plain requests are")

    def _cuda_unregister(self, request: Any) -> Any:
        """Unregistering all regions succeeds, as there are none: clients do so at their end for both kinds."""
        return self._cuda(request) if request.name else protocol.CudaSharedMemoryUnregisterResponse()

    def _on(self) -> SharedMemoryRegions:
        if self._regions is None:
            raise UnknownMethod("shared memory is turned off on this server (--shared-memory)")
        return self._regions
