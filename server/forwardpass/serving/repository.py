"""Which models and versions there are, what state each is in, and who serves a request: load, look up, unload.

A repository is a folder of models, `<name>/<version>/model.onnx`; or one model's own folder, as volumes are mounted;
or, where the settings name the model, one version's own folder.
The look-up table is replaced as a whole at every change, so that a request sees either the old or the new.
"""

from __future__ import annotations

import enum
import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from forwardpass.contract import MODEL_FILE
from forwardpass.errors import (
    InvalidRequest,
    ModelError,
    ModelLoading,
    ModelUnusable,
    RequestError,
    SettingsError,
    UnknownModel,
)
from forwardpass.serving.admission import Admission
from forwardpass.serving.loader import Loaded, load, options_folder
from forwardpass.serving.model_config import ModelConfig
from forwardpass.serving.threads import Cores
from forwardpass.serving.wire import printable
from forwardpass.serving.worker import Worker
from forwardpass.settings import Settings

logger = logging.getLogger(__name__)


class State(enum.Enum):
    """Of one model version. `value` is its name in the protocol's RepositoryIndex."""

    LOADING = "LOADING"
    READY = "READY"
    UNAVAILABLE = "UNAVAILABLE"


@dataclass(frozen=True, slots=True)
class Entry:
    """One version as the index shows it. `loaded` while it is READY; `reason` when it could not be loaded."""

    name: str
    version: str
    folder: Path
    state: State
    reason: str = ""
    loaded: Loaded | None = None


class Repository:
    """The models of one server. Thread-safe; `resolve` is cheap and never blocks.

    - A version is in exactly one state; only READY ones are ever resolved to a worker.
    - Of each model the latest version (the largest number) is served.
    """

    def __init__(self, settings: Settings, cores: Cores, admission: Admission) -> None:
        self._settings = settings
        self._cores = cores
        self._admission = admission
        self._lock = threading.Lock()
        self._entries: dict[tuple[str, str], Entry] = {}
        self._table: dict[tuple[str, str], Worker | Entry] = {}
        self.generation = 0

    # -- looked up for every request ------------------------------------------------------------------------------

    def resolve(self, name: str, version: str) -> Worker:
        """Who serves this. An empty version asks for the latest. No path is ever made from a name.

        Raises UnknownModel, ModelLoading, ModelUnusable, or InvalidRequest for an empty name.
        """
        found = self._table.get((name, version))
        if isinstance(found, Worker):
            return found
        if found is not None:
            raise _refusal(found)
        if not name:
            raise InvalidRequest("the request names no model")
        served = f"; served are {', '.join(sorted({n for n, _ in self._table})[:10])}" if self._table else ""
        if (name, "") in self._table:
            versions = ", ".join(v for n, v in self._table if n == name and v)
            raise UnknownModel(f"model '{printable(name)}' has no version '{printable(version)}'; it has {versions}")
        raise UnknownModel(f"there is no model '{printable(name)}'{served}")

    # -- the state of things ----------------------------------------------------------------------------------------

    def entries(self) -> list[Entry]:
        """Every version known, by name and number."""
        with self._lock:
            return sorted(self._entries.values(), key=lambda e: (e.name, _number(e.version)))

    def workers(self) -> Iterator[Worker]:
        return (e.loaded.worker for e in self.entries() if e.loaded is not None)

    def loaded(self, name: str, version: str) -> Loaded:
        """As `resolve`, with all that is known of the version."""
        worker = self.resolve(name, version)
        with self._lock:
            entry = self._entries[worker.name, worker.version]
        if entry.loaded is None:
            raise ModelLoading(f"version {worker.version} of model '{worker.name}' is being replaced; try again")
        return entry.loaded

    # -- changes ----------------------------------------------------------------------------------------------------

    def announce(self) -> list[Entry]:
        """Find what is to be loaded and enter it as LOADING. Raises SettingsError when there is nothing at all."""
        found = list(self._find(self._settings.repository, self._settings.model_name))
        if not found:
            raise SettingsError(
                f"no models in {self._settings.repository}: expected NAME/VERSION/{MODEL_FILE}, or VERSION/{MODEL_FILE}"
            )
        for entry in found:
            self._enter(entry)
        return found

    def load(self, entry: Entry) -> Entry:
        """Load an announced version and serve it, or enter why it can't be. Blocks for as long as that takes."""
        try:
            config = ModelConfig.load(options_folder(entry.folder, self._settings))
            loaded = load(entry.name, entry.version, entry.folder, config, self._settings, self._cores, self._admission)
        except (ModelError, SettingsError) as error:
            logger.error("model %s version %s cannot be served: %s", entry.name, entry.version, error)
            return self._enter(Entry(entry.name, entry.version, entry.folder, State.UNAVAILABLE, str(error)))
        except Exception:
            logger.exception("model %s version %s could not be loaded", entry.name, entry.version)
            why = "internal error; the server's log has the details"
            return self._enter(Entry(entry.name, entry.version, entry.folder, State.UNAVAILABLE, why))
        loaded.worker.start()
        return self._enter(Entry(entry.name, entry.version, entry.folder, State.READY, "", loaded))

    def close(self, seconds: float) -> bool:
        """End every worker, giving all of them `seconds` together. Whether all of them ended."""
        workers = list(self.workers())
        threads = [threading.Thread(target=w.close, args=(seconds,)) for w in workers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(seconds + 1.0)
        return not any(t.is_alive() for t in threads)

    def _enter(self, entry: Entry) -> Entry:
        with self._lock:
            self._entries[entry.name, entry.version] = entry
            table: dict[tuple[str, str], Worker | Entry] = {}
            for e in sorted(self._entries.values(), key=lambda e: _number(e.version)):
                table[e.name, e.version] = table[e.name, ""] = e if e.loaded is None else e.loaded.worker
            self._table = table
            self.generation += 1
        return entry

    @staticmethod
    def _find(root: Path, only: str) -> Iterator[Entry]:
        if not root.is_dir():
            raise SettingsError(f"the repository {root} is not a folder")
        for name, folder in [(only, root)] if only else _models(root):
            if only and (folder / MODEL_FILE).exists():
                yield Entry(name, "1", folder, State.LOADING)
                continue
            versions = [p for p in folder.iterdir() if _is_version(p)]
            if versions:
                latest = max(versions, key=lambda p: _number(p.name))
                yield Entry(name, latest.name, latest, State.LOADING)


def _models(root: Path) -> Iterator[tuple[str, Path]]:
    """Names and folders of the models below `root`, or of the one that `root` is."""
    if any(_is_version(p) for p in root.iterdir()):
        yield root.resolve().name, root
        return
    for folder in sorted(root.iterdir()):
        if folder.is_dir() and not folder.name.startswith((".", "_")):
            yield folder.name, folder


def _is_version(path: Path) -> bool:
    return path.name.isascii() and path.name.isdigit() and int(path.name) > 0 and (path / MODEL_FILE).exists()


def _number(version: str) -> int:
    return int(version)


def _refusal(entry: Entry) -> RequestError:
    """What a request for a version that does not serve gets."""
    what = f"version {entry.version} of model '{entry.name}'"
    if entry.state is State.LOADING:
        return ModelLoading(f"{what} is still loading", retry_after=0.5)
    return ModelUnusable(f"{what} could not be loaded: {entry.reason}")
