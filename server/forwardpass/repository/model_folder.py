"""The contents of a repository on disk: models, their options and versions, and whether any of them changed.

Reads folders and options files, opens no network, keeps nothing but a folder's options. No path is ever made from a
request's name. Unreadable entries are errors; they are never treated as missing.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from forwardpass.errors import ConfigError, ModelError, SettingsError
from forwardpass.model import options, triton_config
from forwardpass.model.contract import MODEL_FILE
from forwardpass.model.options import ModelConfig

NETWORK = ".onnx"  # the usual suffix of a network's file
NOT_OURS = frozenset({"lost+found"})  # folders of a volume itself, which only root may read
MOST_FILES = 10_000  # of one version that are checked for changes

_LIKE_A_VERSION = re.compile(r"[vV]?[0-9][0-9._-]*")

Fingerprint = tuple[Any, ...]  # equal as long as nothing changed


@dataclasses.dataclass(frozen=True)
class ModelFolder:
    """One model's folder. `named`: the folder's name is the model's, as in a repository of many.

    Its options are read once, so that all that is decided from one listing is decided by the same options.
    `ignore_unsupported`: options that are not supported and change no answer are no error.
    """

    name: str
    folder: Path
    named: bool = True
    ignore_unsupported: bool = False

    def config(self) -> ModelConfig:
        """The options beside the versions: from model.toml or config.pbtxt, else the defaults. Raises ConfigError."""
        return self._config

    def anew(self) -> ModelFolder:
        """The same folder, whose options will be read again."""
        return dataclasses.replace(self)

    @functools.cached_property
    def _config(self) -> ModelConfig:
        toml, triton = self.folder / options.FILE_NAME, self.folder / triton_config.FILE_NAME
        try:
            in_triton, in_toml = _is_there(triton), _is_there(toml)
        except OSError as error:
            raise ConfigError(f"{self.folder} cannot be read: {_why(error)}") from None
        if not in_triton:
            return ModelConfig.load(self.folder)
        if in_toml:
            raise ConfigError(f"{self.folder} has {toml.name} and {triton.name}; expected one of them")
        return triton_config.load(triton, self.name if self.named else None, self.ignore_unsupported)

    def present(self) -> bool:
        """Whether there is anything to load or to report: a version, an entry that looks like one, or an error."""
        try:
            return bool(self.versions(self.config().model_file) or self.skipped())
        except ModelError:
            return True

    def versions(self, model_file: str) -> dict[int, Path]:
        """Number and folder of every version, the lowest first.

        A folder named by a number is a version once it contains the network's file. If there are none, a network in the
        model's own folder is version 1. Raises ModelError if the folder can't be read.
        """
        try:
            numbers = [p for p in _children(self.folder) if _is_number(p.name)]
            found = {int(p.name): p for p in numbers if _is_there(p / model_file)}
            if not found and _is_there(self.folder / model_file):
                return {1: self.folder}
        except OSError as error:
            raise ModelError(f"{self.folder} cannot be read: {_why(error)}") from None
        return dict(sorted(found.items()))

    def skipped(self) -> dict[str, str]:
        """Entries that look like versions and are not, by name in the model's folder: the reason. Raises ModelError."""
        model_file = self.config().model_file
        served = self.versions(model_file).values()
        found = {}
        try:
            for path in sorted(_children(self.folder)):
                if path in served or path.name.startswith((".", "_")):
                    continue
                if path.suffix == NETWORK and self.folder not in served and path.is_file():
                    found[path.name] = f"expected VERSION/{model_file}"
                    continue
                inside = sorted(p.name for p in _children(path)) if _is_folder(path) else []
                if _is_number(path.name) and _is_folder(path):
                    has = f"has {', '.join(inside[:5])}" if inside else "is empty"
                    found[path.name] = f"expected {model_file} in it, it {has}"
                elif _LIKE_A_VERSION.fullmatch(path.name) or any(name.endswith(NETWORK) for name in inside):
                    found[path.name] = "expected a folder named by a whole number from 1 on, without zeros before it"
        except OSError as error:
            raise ModelError(f"{self.folder} cannot be read: {_why(error)}") from None
        return found

    def chosen(self, config: ModelConfig) -> dict[int, Path]:
        """The versions that the options select, the lowest first. Raises ModelError if one is missing."""
        found = self.versions(config.model_file)
        if not found:
            like = "".join(f"; {name}: {reason}" for name, reason in list(self.skipped().items())[:3])
            raise ModelError(f"there is no version: expected {self.folder.name}/VERSION/{config.model_file}{like}")
        if config.versions == "all":
            return found
        if isinstance(config.versions, int):
            return dict(list(found.items())[-config.versions :])
        missing = sorted(set(config.versions) - set(found))
        if missing:
            have = ", ".join(map(str, found))
            raise ModelError(f"{config.where('versions')}: there is no version {missing[0]}; there are {have}")
        return {number: folder for number, folder in found.items() if number in config.versions}

    def latest(self) -> dict[int, Path]:
        """The highest version with the default file name, for a model with unusable options; empty if there is none."""
        try:
            return dict(list(self.versions(MODEL_FILE).items())[-1:])
        except ModelError:
            return {}

    def fingerprint(self, version: Path, config: ModelConfig) -> Fingerprint:
        """The fingerprint of one version: its files, and its options with the files that they name."""
        given = config.origin.given
        beside = [config.labels, *(t.labels for t in config.outputs)]
        named = [self.folder / n for n in beside if n] + [self.folder / "warmup"] * bool(config.warm_up)
        said = config.model_dump_json(), None if given is None else given.SerializeToString(deterministic=True)
        # For a version in the model's own folder, only its file: else the options file's time would count.
        files = [version / config.model_file] if version == self.folder else [version]
        return said, tuple(_stats(files + named))

    def state(self) -> Fingerprint:
        """The fingerprint of the model's selected versions, or of an error; for polling. Never raises."""
        try:
            config = self.config()
            return tuple((n, self.fingerprint(f, config)) for n, f in self.chosen(config).items())
        except (ModelError, OSError) as error:
            return str(error), tuple(_stats([self.folder]))


def find(root: Path, name: str = "", ignore_unsupported: bool = False) -> list[ModelFolder]:
    """The models below `root`, by name; or `root` itself if it is one model.

    With `name`, `root` is one model of that name; else a single model is named by its options, or by its folder.
    Raises SettingsError if `root` is not a folder, OSError if it can't be read.
    """
    status = _status(root)
    if status is None or not stat.S_ISDIR(status.st_mode):
        raise SettingsError(f"the repository {root} is not a folder")
    if name or is_model(root):
        return [
            ModelFolder(
                name or triton_config.model_name(root / triton_config.FILE_NAME) or root.resolve().name,
                root,
                named=False,
                ignore_unsupported=ignore_unsupported,
            )
        ]
    children = [p for p in sorted(root.iterdir()) if not p.name.startswith((".", "_")) and p.name not in NOT_OURS]
    return [ModelFolder(p.name, p, ignore_unsupported=ignore_unsupported) for p in children if _is_folder(p)]


def is_model(folder: Path) -> bool:
    """Whether a folder is a single model: it contains options, a network, or versions. Raises OSError."""
    if any(_is_there(folder / file) for file in (options.FILE_NAME, triton_config.FILE_NAME, MODEL_FILE)):
        return True
    return any(_is_number(p.name) and _is_there(p / MODEL_FILE) for p in folder.iterdir())


def identity(folder: Path) -> tuple[int, int] | None:
    """Device and inode, by which a replaced folder is detected; None if there is no such folder."""
    status = _status(folder)
    return None if status is None else (status.st_dev, status.st_ino)


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdigit() and not name.startswith("0") and len(name) < 19


def _children(folder: Path) -> list[Path]:
    """The entries of a folder; empty if there is no such folder. Raises OSError if it can't be read."""
    try:
        return list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _status(path: Path) -> os.stat_result | None:
    """The path's status; None if it does not exist. Raises OSError if that can't be determined."""
    try:
        return path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if error.errno == errno.ELOOP:  # a loop of links
            return None
        raise


def _is_there(path: Path) -> bool:
    return _status(path) is not None


def _is_folder(path: Path) -> bool:
    status = _status(path)
    return status is not None and stat.S_ISDIR(status.st_mode)


def _why(error: OSError) -> str:
    return error.strerror or str(error)


def _stats(paths: list[Path]) -> Iterator[tuple[str, int, int, int]]:
    """Path, inode, size and modification time of every file at or below `paths`; links are followed."""
    count = 0
    for path in paths:
        pending = [path]
        while pending and count < MOST_FILES:
            at = pending.pop()
            count += 1
            try:
                found = at.stat()
                if at.is_dir():
                    # A loop of links is followed up to the system's limit.
                    pending += sorted(Path(entry) for entry in os.scandir(at))
            except OSError:
                yield str(at), 0, 0, 0
                continue
            yield str(at), found.st_ino, found.st_size, found.st_mtime_ns
