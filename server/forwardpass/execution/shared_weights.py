"""One copy of a network's weights for several processes: an optimized copy of its file, which each of them maps.

ONNX Runtime maps weights that lie beside a network's file, but then packs matrices anew for its kernels, in memory of
the process. Here the packed matrices are written beside the file as well, once, by the first process that opens the
network; what all map is the page cache's. (`session.save_external_prepacked_constant_initializers` in ONNX Runtime.)
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, Final

from forwardpass.errors import ModelError
from forwardpass.execution.onnx_runtime import ort
from forwardpass.execution.ort_session import session_options
from forwardpass.execution.placement import CPU, Placement
from forwardpass.execution.providers import open_session
from forwardpass.execution.session import Session
from forwardpass.model import external_data

logger = logging.getLogger(__name__)

LEAST: Final = 8 << 20  # bytes of weights; smaller networks are opened as they are
PACKED: Final = "1024"  # bytes of a tensor from which it lies beside the file
NETWORK, WEIGHTS, SUFFIX = "network.onnx", "network.weights", ".onnx"
SOURCE: Final = "source"  # beside a network's copy: the path of the network
PREFIX, IN_USE = "forwardpass-weights-", "in-use"  # a folder's name; its file that a living server has locked


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder for the copies of one server. Those of servers that were killed are removed."""
    _sweep(Path(tempfile.gettempdir()))
    with tempfile.TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True) as name:
        folder = Path(name)
        descriptor = os.open(folder / "taking", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            (folder / "taking").rename(folder / IN_USE)  # from here others may look whether it is locked
            yield folder
        finally:
            os.close(descriptor)


def _sweep(folder: Path) -> None:
    for left in folder.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # it is in use, or another user's
            descriptor = os.open(left / IN_USE, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left, ignore_errors=True)  # processes that drain keep what they mapped
            finally:
                os.close(descriptor)


class SharedWeights:
    """Opens networks of the CPU provider from copies in a folder that several processes use. Thread-safe."""

    def __init__(self, folder: Path) -> None:
        """`folder`: for this alone, on this machine. Copies of networks whose files were replaced are removed."""
        self._folder = folder

    def remove(self, folders: Collection[Path]) -> None:
        """Remove the copies of networks in these folders, which no process serves, or whose files are gone."""
        for source in self._folder.glob(f"*/{SOURCE}"):
            with contextlib.suppress(OSError):
                network = Path(source.read_text("utf-8"))
                if network.exists() and not any(map(network.is_relative_to, folders)):
                    continue
                with _alone(source.parent):
                    _remove_folders(source.parent)

    def open(
        self,
        path: Path,
        placement: Placement,
        optimizations: str = "all",
        name: str = "session",
        opening: Callable[[Any], None] = lambda _: None,
    ) -> Session:
        """As OpenSession. Where no copy can be made, the network is opened as it is."""
        if placement.provider == CPU and path.suffix == SUFFIX:
            copy = self._copy_of(path, placement, optimizations, opening)
            if copy is not None:
                with contextlib.suppress(ModelError):  # removed meanwhile, since its network was replaced
                    return open_session(copy, placement, "none", name, opening)
        return open_session(path, placement, optimizations, name, opening)

    def _copy_of(
        self, path: Path, placement: Placement, optimizations: str, opening: Callable[[Any], None]
    ) -> Path | None:
        """The copy, made now if there is none; None: the network is small, or none can be made."""
        try:
            files = [path, *(path.parent / location for location in external_data.locations(path))]
            found = [(str(file), *_identity(file)) for file in files]
            if sum(size for _, size, *_ in found) < LEAST:
                return None
            home = self._folder / hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
            key = hashlib.sha256(repr((found, optimizations, ort.__version__)).encode()).hexdigest()[:16]
            copy = home / key / NETWORK
            home.mkdir(exist_ok=True)
            with _alone(home):
                if not copy.exists():
                    (home / SOURCE).write_text(str(path), "utf-8")
                    self._make(path, copy.parent, placement, optimizations, opening)
            return copy
        except (OSError, ModelError) as error:
            logger.warning("%s: its weights are not shared between processes: %s", path, error)
            return None

    def _make(
        self, path: Path, folder: Path, placement: Placement, optimizations: str, opening: Callable[[Any], None]
    ) -> None:
        """Write the copy, whole or not at all, and remove those of what was there before."""
        made = Path(tempfile.mkdtemp(prefix="making-", dir=folder.parent))
        try:
            options = session_options(placement, optimizations)
            opening(options)
            options.optimized_model_filepath = str(made / NETWORK)
            for key, value in (
                ("session.optimized_model_external_initializers_file_name", WEIGHTS),
                ("session.optimized_model_external_initializers_min_size_in_bytes", PACKED),
                ("session.save_external_prepacked_constant_initializers", "1"),
            ):
                options.add_session_config_entry(key, value)
            try:
                ort.InferenceSession(str(path), options, providers=[placement.provider])
            except Exception as error:
                raise ModelError(str(error).partition("\n")[0]) from None
            _remove_folders(folder.parent, made)
            made.rename(folder)
        finally:
            shutil.rmtree(made, ignore_errors=True)


def _remove_folders(home: Path, staying: Path | None = None) -> None:
    for other in home.iterdir():
        if other.is_dir() and other != staying:
            shutil.rmtree(other, ignore_errors=True)  # processes that have mapped it keep what they mapped


def _identity(file: Path) -> tuple[int, int, int, int]:
    """What changes when a file does; its size first."""
    status = file.stat()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process, and one thread, at a time."""
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
