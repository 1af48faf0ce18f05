"""What a repository holds on disk: its models, their options, their versions, and whether any of that was changed.

Reads folders and options files, opens no network, keeps no state. No path is ever made from a request's name.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from forwardpass.contract import MODEL_FILE
from forwardpass.errors import ConfigError, ModelError, SettingsError
from forwardpass.serving import model_config, pbtxt
from forwardpass.serving.model_config import ModelConfig

MOST_FILES = 10_000  # of one version that are looked at for changes

Fingerprint = tuple[Any, ...]  # equal as long as nothing was changed


@dataclasses.dataclass(frozen=True, slots=True)
class Home:
    """One model's folder. `named`: the folder's name is the model's, as in a repository of many."""

    name: str
    folder: Path
    named: bool = True

    def config(self) -> ModelConfig:
        """The options beside the versions: a model.toml or a config.pbtxt, or else the defaults. Raises ConfigError."""
        toml, triton = self.folder / model_config.FILE_NAME, self.folder / pbtxt.FILE_NAME
        if not triton.exists():
            return ModelConfig.load(self.folder)
        if toml.exists():
            raise ConfigError(f"{self.folder} has {toml.name} and {triton.name}; expected one of them")
        return pbtxt.load(triton, self.name if self.named else None)

    def present(self) -> bool:
        """Whether there is anything to load, or to complain of: a version, or options that can't be read."""
        try:
            return bool(self.versions(self.config().model_file))
        except ConfigError:
            return True

    def versions(self, model_file: str) -> dict[int, Path]:
        """Number and folder of every version, the lowest first.

        A folder called by a number is one as soon as the network's file is in it. A network that lies in the model's
        own folder, where there are no such folders, is version 1.
        """
        found = {int(p.name): p for p in _entries(self.folder) if _is_number(p.name) and (p / model_file).exists()}
        if not found and (self.folder / model_file).is_file():
            return {1: self.folder}
        return dict(sorted(found.items()))

    def chosen(self, config: ModelConfig) -> dict[int, Path]:
        """The versions that its options ask for, the lowest first. Raises ModelError where one is not there."""
        found = self.versions(config.model_file)
        if not found:
            raise ModelError(f"there is no version: expected {self.folder.name}/VERSION/{config.model_file}")
        if config.versions == "all":
            return found
        if isinstance(config.versions, int):
            return dict(list(found.items())[-config.versions :])
        missing = sorted(set(config.versions) - set(found))
        if missing:
            have = ", ".join(map(str, found))
            raise ModelError(f"{config.where('versions')}: there is no version {missing[0]}; there are {have}")
        return {number: folder for number, folder in found.items() if number in config.versions}

    def fingerprint(self, version: Path, config: ModelConfig) -> Fingerprint:
        """Of all that one version is made from: its files, and its options with the files that they name."""
        given = config.origin.given
        beside = [config.labels, *(t.labels for t in config.outputs)]
        named = [self.folder / n for n in beside if n] + [self.folder / "warmup"] * bool(config.warm_up)
        said = config.model_dump_json(), None if given is None else given.SerializeToString(deterministic=True)
        # A version in the model's own folder: its file alone, or the options' times would count.
        files = [version / config.model_file] if version == self.folder else [version]
        return said, tuple(_stats(files + named))

    def state(self) -> Fingerprint:
        """Of all that decides what is served of this model; for polling. Never raises."""
        try:
            config = self.config()
            return tuple((n, self.fingerprint(f, config)) for n, f in self.chosen(config).items())
        except (ModelError, OSError) as error:
            return str(error), tuple(_stats([self.folder]))


def find(root: Path, name: str = "") -> list[Home]:
    """The models below `root`, by name; or the one that `root` is, called `name`, or as its options say, or as it is.

    With `name`, `root` is one model. Raises SettingsError where it is no folder.
    """
    if not root.is_dir():
        raise SettingsError(f"the repository {root} is not a folder")
    if name or is_model(root):
        return [Home(name or pbtxt.model_name(root / pbtxt.FILE_NAME) or root.resolve().name, root, named=False)]
    return [Home(p.name, p) for p in sorted(_entries(root)) if p.is_dir() and not p.name.startswith((".", "_"))]


def is_model(folder: Path) -> bool:
    """Whether a folder is one model's own: it has options, a network, or versions in it."""
    if any((folder / file).is_file() for file in (model_config.FILE_NAME, pbtxt.FILE_NAME, MODEL_FILE)):
        return True
    return any(_is_number(p.name) and (p / MODEL_FILE).exists() for p in _entries(folder))


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdigit() and not name.startswith("0") and len(name) < 19


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _stats(paths: list[Path]) -> Iterator[tuple[str, int, int, int]]:
    """Path, inode, size and time of every file at or below `paths`; links are followed."""
    count = 0
    for path in paths:
        pending = [path]
        while pending and count < MOST_FILES:
            at = pending.pop()
            count += 1
            try:
                stat = at.stat()
                if at.is_dir():
                    # A ring of links would be followed until the system's own limit of them ends it.
                    pending += sorted(Path(entry) for entry in os.scandir(at))
            except OSError:
                yield str(at), 0, 0, 0
                continue
            yield str(at), stat.st_ino, stat.st_size, stat.st_mtime_ns
