"""Adds a version to a model repository atomically: written beside its final path, flushed, then renamed.

However the exporter ends, a reader sees the old versions or the complete new one. Uses no torch and no network.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from forwardpass.errors import ExportError

# Hidden, so that it is never mistaken for a version (1, 2, ...).
PREFIX = ".export-"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_TAKEN = (errno.EEXIST, errno.ENOTEMPTY)


def versions(folder: Path) -> list[int]:
    """The numbers of the versions in a model's folder, ascending; none if there is no folder."""
    if not folder.is_dir():
        return []
    return sorted(int(entry.name) for entry in folder.iterdir() if entry.name.isdecimal() and entry.name[0] != "0")


class StagedVersion:
    """A hidden folder in `<repository>/<name>/` that becomes `<name>/<version>` or is removed. A context manager.

    - While its process lives, a lock file beside it is held by flock(2), which the kernel releases with the process:
      an unlocked folder is a leftover, and other exporters remove it.
    - Exited without `publish`, or by an error, it leaves nothing behind: no folder, no lock, no new empty model.
    - Not thread-safe; any number of processes may stage the same model at once.
    """

    def __init__(self, repository: Path, name: str, version: int | None = None) -> None:
        """`version` None: the next free number. Writes nothing yet.

        Raises ExportError if the name is not a valid model name, or the version is invalid or exists already.
        """
        if _NAME.fullmatch(name) is None:
            raise ExportError(
                f"model name {name!r}: expected letters, digits, '_', '-' and '.', at most 128, not a leading '.'"
            )
        if version is not None and version < 1:
            raise ExportError(f"version {version}: expected a number from 1")
        self._model = repository / name
        self._version = version
        if version is not None and (self._model / str(version)).exists():
            raise _exists(self._model / str(version))
        self._made: list[Path] = []  # folders created here, the innermost last
        self._lock: int | None = None
        self.folder = self._model / f"{PREFIX}{secrets.token_hex(8)}"

    @property
    def _lock_path(self) -> Path:
        return self.folder.with_suffix(".lock")

    def __enter__(self) -> Self:
        """Raises ExportError if the repository cannot be written."""
        try:
            self._take_lock()
            _sweep(self._model)
            self.folder.mkdir()
        except OSError as error:
            self._discard()
            raise _cannot_write(error, self.folder) from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._discard()

    def write(self, name: str, data: bytes) -> Path:
        """Write one file of the version and flush it to the disk. Raises ExportError (e.g. if the disk is full)."""
        path = self.folder / name
        try:
            with path.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise _cannot_write(error, path, len(data)) from None
        return path

    def publish(self, finish: Callable[[Path, int], None]) -> Path:
        """Rename the folder to the version's final path, and return that.

        `finish(folder, number)` must write and flush the files that depend on the number; it is called again with a
        higher one if another process took the number meanwhile. Raises ExportError if the version exists by now.
        """
        while True:
            number = self._version if self._version is not None else max(versions(self._model), default=0) + 1
            place = self._model / str(number)
            try:
                if self._version is not None and place.exists():  # an empty folder would be replaced
                    raise _exists(place)
                finish(self.folder, number)
                _flush_folder(self.folder)
                self.folder.rename(place)
            except OSError as error:
                if error.errno in _TAKEN and self._version is None:
                    continue
                if error.errno in _TAKEN:
                    raise _exists(place) from None
                raise _cannot_write(error, place) from None
            with contextlib.suppress(OSError):  # the version is in place; it might just not survive a power failure
                _flush_folder(self._model)
            return place

    def _make_parents(self) -> None:
        missing = [folder for folder in (self._model, *self._model.parents) if not folder.exists()]
        for folder in reversed(missing):
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                self._made.append(folder)

    def _take_lock(self) -> None:
        while True:
            self._make_parents()
            try:
                lock = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            except FileNotFoundError:
                continue  # another exporter that had created the model's folder failed, and removed it again
            fcntl.flock(lock, fcntl.LOCK_EX)
            # A sweep may have removed the file between the two calls; a lock on a removed file protects nothing.
            if _is_file_at(lock, self._lock_path):
                self._lock = lock
                return
            os.close(lock)

    def _discard(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._lock is not None:
            self._lock_path.unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = None
        for folder in reversed(self._made):
            with contextlib.suppress(OSError):  # not empty: another exporter uses it
                folder.rmdir()


def _sweep(model: Path) -> None:
    """Remove leftovers of killed exporters from a model's folder; those that a live process has locked stay."""
    stems = {entry.name.removesuffix(".lock") for entry in model.glob(f"{PREFIX}*")}
    for stem in stems:
        path = model / f"{stem}.lock"
        with contextlib.suppress(OSError):  # another sweep was faster, or its process lives
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_file_at(lock, path):
                    shutil.rmtree(model / stem, ignore_errors=True)
                    path.unlink()
            finally:
                os.close(lock)


def _is_file_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems do not flush folders
            raise
    finally:
        os.close(descriptor)


def _exists(place: Path) -> ExportError:
    return ExportError(f"{place}: exists already; versions are not overwritten")


def _cannot_write(error: OSError, path: Path, size: int | None = None) -> ExportError:
    wanted = f" ({size} bytes)" if size is not None else ""
    return ExportError(f"{path}: cannot be written{wanted}: {error.strerror or error}; nothing was left behind")
