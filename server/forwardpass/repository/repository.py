"""The models and versions, their states, and the worker for each request: look up, load, swap, unload.

A repository is a folder of models, `<name>/<version>/model.onnx`; or one model's own folder, as volumes are mounted.
The look-up table is replaced as a whole at every change, so that a request sees either the old or the new one.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from forwardpass.batching.admission import Admission
from forwardpass.errors import (
    DeviceLost,
    ForwardpassError,
    InvalidRequest,
    ModelError,
    ModelLoading,
    RepositoryUnreadable,
    SettingsError,
    UnknownModel,
    printable,
)
from forwardpass.execution import shared_arena
from forwardpass.execution.cpu_budget import CpuBudget
from forwardpass.execution.interruption import Interruption
from forwardpass.execution.providers import OpenSession, open_session
from forwardpass.inference.worker import Worker
from forwardpass.model.contract import MODEL_FILE
from forwardpass.model.options import ModelConfig
from forwardpass.observability.access_log import AccessLog
from forwardpass.observability.flight_recorder import FlightRecorder
from forwardpass.observability.model_metrics import ModelMetrics
from forwardpass.observability.tracing import Tracing
from forwardpass.repository.listing import RepositoryListing
from forwardpass.repository.loader import LoadedModel, LoadRequest, load
from forwardpass.repository.model_folder import ModelFolder
from forwardpass.repository.model_version import (
    ALL_VERSIONS,
    ModelVersion,
    VersionState,
    announced,
    idle,
    loading,
    look_up,
    number,
    refusal,
    unexpected,
    unknown,
    withdrawn,
)
from forwardpass.repository.shared_measurements import SharedMeasurements
from forwardpass.repository.turns import Turns
from forwardpass.settings import Settings

logger = logging.getLogger(__name__)

NOT_YET = "not loaded yet: its first request loads it"
LOADS = 2  # that run at the same time at least, so that a large one does not keep small ones waiting


class Repository:
    """The models of one server. Thread-safe; `resolve` is cheap and never blocks.

    - Changes of one model take turns. Those of several run at the same time, as many loads as there are cores.
    - A version is in exactly one state; only READY versions are resolved to a worker.
    - A request that names no version gets the highest READY one.
    - A version continues to serve until its replacement is READY: a failed load removes nothing.
    - A replaced worker runs every request that was decoded for it before it ends.
    """

    def __init__(self, settings: Settings, cores: CpuBudget, admission: Admission) -> None:
        self._settings = settings
        self._cores = cores
        self._admission = admission
        self.interruption = Interruption()  # ends loads when the server stops
        self.load_failures: Counter[str] = Counter()  # by model
        self.listing = RepositoryListing(settings.repository, settings.model_name, settings.ignore_unsupported)
        self._lock = threading.Lock()
        self.turns = Turns()  # of changes of one model
        self._loading = threading.Semaphore(max(LOADS, cores.count))
        self.measurements = SharedMeasurements()
        self.opens: OpenSession = open_session
        self._entries: dict[tuple[str, str], ModelVersion] = {}
        self._retiring: list[Worker] = []
        self._kept: dict[tuple[str, str], ModelMetrics] = {}  # of versions that will be loaded again
        self.loads_on_demand = settings.model_control == "on-demand"
        self._idle_reason = NOT_YET if self.loads_on_demand else "not loaded"
        self._table: dict[tuple[str, str], Worker | ModelVersion] = {}
        self.generation = 0
        self.recorder: FlightRecorder | None = None  # of the batches of all models
        self.access: AccessLog | None = None
        self.tracing: Tracing | None = None
        # What other processes report of the same reload, by version: why it could not be loaded there. Blocks until all
        # of them have tried.
        self.agree: Callable[[str, Mapping[str, str]], Mapping[str, str]] = lambda _name, _failed: {}
        self.changed: Callable[[], None] = lambda: None  # called after every state change, from any thread
        self.lost: Callable[[str], None] = lambda _: None  # called with the reason when a device fails, from any thread

    # -- look-up, for every request ---------------------------------------------------------------------------------

    def resolve(self, name: str, version: str) -> Worker:
        """The worker of a version; an empty version selects the latest. No path is ever made from a name.

        Raises UnknownModel, ModelLoading, ModelUnusable, or InvalidRequest for an empty name.
        """
        found = self._table.get((name, version))
        if isinstance(found, Worker):
            return found
        if found is not None:
            raise refusal(found)
        if not name:
            raise InvalidRequest("the request names no model")
        if (name, version) in self.listing.skipped:
            what = f"{name}/{version}" if version else name
            raise UnknownModel(f"the folder '{printable(what)}' is skipped: {self.listing.skipped[name, version]}")
        raise unknown(name, version, self._table)

    # -- state ------------------------------------------------------------------------------------------------------

    def entries(self, name: str | None = None) -> list[ModelVersion]:
        """Every known version, or those of one model, by name and number."""
        with self._lock:
            found = [e for e in self._entries.values() if name is None or e.name == name]
        return sorted(found, key=lambda e: (e.name, number(e.version)))

    def skipped(self) -> list[tuple[str, str, str]]:
        """Folders that look like a model or a version and are not: (name, entry in it or "", reason).

        Models and versions with an entry are left out: the entry has the reason.
        """
        with self._lock:
            known = {*self._entries, *((name, "") for name, _ in self._entries)}
        return [(*key, why) for key, why in self.listing.skipped.items() if key not in known]

    def missing(self) -> list[ModelVersion]:
        """Every version that should serve but does not."""
        return [entry for entry in self.entries() if entry.missing]

    def workers(self) -> Iterator[Worker]:
        """All workers that may have requests: those that serve, and those that are retiring."""
        with self._lock:
            retiring = list(self._retiring)
        yield from (e.loaded.worker for e in self.entries() if e.loaded is not None)
        yield from retiring

    def loaded(self, name: str, version: str) -> LoadedModel:
        """Like `resolve`, but the LoadedModel of the version."""
        worker = self.resolve(name, version)
        with self._lock:
            entry = self._entries.get((worker.name, worker.version))
        if entry is None or entry.loaded is None:
            raise ModelLoading(f"version {worker.version} of model '{worker.name}' is being replaced; try again")
        return entry.loaded

    def model_folders(self) -> dict[str, ModelFolder]:
        """The models on disk by name, served or not. Raises RepositoryUnreadable."""
        return self.listing.model_folders()

    # -- changes ----------------------------------------------------------------------------------------------------

    def discover(self) -> list[ModelVersion]:
        """Find the versions to load and enter them as LOADING.

        Raises SettingsError if there is no model, unless models may be added later.
        """
        settings = self._settings
        try:
            model_folders = self.model_folders()
        except RepositoryUnreadable as error:
            raise SettingsError(str(error)) from None
        if not model_folders and settings.model_control == "none":
            raise SettingsError(
                f"no models in {settings.repository}: expected NAME/VERSION/{MODEL_FILE}, or VERSION/{MODEL_FILE}"
            )
        wanted = set(settings.load_model if settings.model_control in ("explicit", "on-demand") else "*")
        missing = sorted(wanted - model_folders.keys() - {"*"})
        if missing:
            raise SettingsError(f"load_model: there is no model {missing[0]!r} in {settings.repository}")
        found, others = list[ModelVersion](), list[ModelVersion]()
        for model_folder in model_folders.values():
            if model_folder.name not in wanted and "*" not in wanted:
                others.append(idle(model_folder, self._idle_reason))
            else:
                found += announced(model_folder)
        self._enter(*others, *found)
        return found

    def load(self, entry: ModelVersion) -> ModelVersion:
        """Load an announced version and serve it, or enter the reason why it can't be loaded. Blocks until then.

        If its entry has changed since it was announced, that entry is returned unchanged.
        """
        model_folder = entry.model_folder or ModelFolder(entry.name, entry.folder.parent)
        with self.turns.of(entry.name):
            now = self._entries.get((entry.name, entry.version), entry)
            if now is not entry:
                return now
            try:
                config = model_folder.config()
                if not entry.version:
                    model_folder.chosen(config)
                found = self._load(model_folder, config, entry.version, entry.folder, None)
            except Exception as error:
                reason = self._failed(entry.name, entry.version, error)
                found = dataclasses.replace(
                    entry, state=VersionState.UNAVAILABLE, reason=reason, model_folder=model_folder
                )
            self._enter(found)
            return found

    def reload(self, model_folder: ModelFolder, config: ModelConfig | None = None) -> list[ModelVersion]:
        """Serve a model as its folder is now; with `config` instead of the options there.

        Unchanged versions are left alone. New versions are loaded first; then all of them take over at once, and the
        workers they replace finish their requests. If any can't be loaded, no version in service is removed. Blocks.
        Returns the entries of the selected versions; those with a `reason` could not be loaded.
        """
        with self.turns.of(model_folder.name):
            before = {e.version: e for e in self.entries(model_folder.name)}
            try:
                config = config or model_folder.config()
                chosen = model_folder.chosen(config)
            except ModelError as error:
                self.agree(model_folder.name, {ALL_VERSIONS: str(error)})
                return self._keep(model_folder, before, str(error))
            for version, folder in chosen.items():
                if before.get(str(version), idle(model_folder)).loaded is None:
                    self._enter(loading(model_folder, str(version), folder))
            wanted = [self._renew(model_folder, config, str(n), f, before.get(str(n))) for n, f in chosen.items()]
            failed = self.agree(model_folder.name, {e.version: e.reason for e in wanted if e.reason})
            if failed:
                wanted = [withdrawn(e, before.get(e.version), failed) for e in wanted]
            kept: list[ModelVersion] = []
            if any(e.reason for e in wanted):
                versions = {e.version for e in wanted}
                kept = [e for e in before.values() if e.loaded is not None and e.version not in versions]
            self._replace(model_folder.name, [*wanted, *kept])
            return wanted

    def unload(self, name: str, reason: str = "unloaded") -> bool:
        """Stop serving a model, after its accepted requests. Blocks. Returns whether there was such a model."""
        with self.turns.of(name):
            entries = self.entries(name)
            if self.loads_on_demand:  # its counters go on when it is loaded again
                self._kept |= {(name, e.version): e.loaded.worker.metrics for e in entries if e.loaded is not None}
            going = [
                dataclasses.replace(e, state=VersionState.UNLOADING, loaded=None, asked_for=False) for e in entries
            ]
            self._replace(name, going)
            gone = [dataclasses.replace(e, state=VersionState.UNAVAILABLE, reason=reason) for e in going]
            self._replace(name, gone)
        if entries:
            logger.info("model %s was %s", name, reason)
        return bool(entries)

    def forget(self, name: str) -> None:
        """`unload` a model that is not on disk any more, and remove it from the index. Blocks."""
        with self.turns.of(name):
            self.unload(name)
            self._replace(name, [])
            self._kept = {key: metrics for key, metrics in self._kept.items() if key[0] != name}

    def note(self, model_folders: Iterable[ModelFolder]) -> None:
        """Enter models on disk that were not asked for, and drop those that are gone. Does not wait for a load."""
        found = {h.name: h for h in model_folders}
        with self._lock:
            names = {name for name, _ in self._entries}
            new = [idle(model_folder, self._idle_reason) for name, model_folder in found.items() if name not in names]
            gone = [(e.name, "") for e in self._entries.values() if not (e.asked_for or e.version or e.name in found)]
            for key in gone:
                del self._entries[key]
            self._entries.update({(e.name, ""): e for e in new})
            if not new and not gone:
                return
            self._publish({*(name for name, _ in gone), *(e.name for e in new)})
        self.changed()

    def close(self, seconds: float) -> bool:
        """End all workers in parallel, within `seconds`. Returns whether all of them ended."""
        workers = list(self.workers())
        threads = [threading.Thread(target=w.close, args=(seconds,)) for w in workers if not w.is_idle]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(seconds + 1.0)
        for worker in workers:
            worker.close(0.0)
        return not any(t.is_alive() for t in threads)

    # -- loading and entries ----------------------------------------------------------------------------------------

    def _load(
        self, model_folder: ModelFolder, config: ModelConfig, version: str, folder: Path, before: LoadedModel | None
    ) -> ModelVersion:
        """Load a version and start its worker. Returns its entry. Raises ModelError."""
        fingerprint = model_folder.fingerprint(folder, config)  # taken first: changes from here on count
        # Counters continue across a reload, so that none ever decreases.
        metrics = before.worker.metrics if before is not None else self._kept.pop((model_folder.name, version), None)
        request = LoadRequest(
            model_folder.name, version, folder, config, self._settings, self._cores, self._admission,
            model_folder.folder, metrics, lambda reason: self.lost(reason), self.interruption, self.measurements,
            self.opens,
        )  # fmt: skip
        try:
            with self._loading:
                loaded = load(request)
        except DeviceLost as error:
            self.lost(str(error))
            raise
        if self.recorder is not None:
            loaded.worker.metrics.flight = self.recorder.track(model_folder.name, version)
        loaded.worker.metrics.access, loaded.worker.metrics.tracing = self.access, self.tracing
        loaded.worker.start()
        others = (e.loaded.memory for e in self.entries() if e.loaded is not None)
        shared_arena.check_weights(loaded.memory + sum(others))
        return ModelVersion(
            model_folder.name, version, folder, VersionState.READY, "", loaded, model_folder, fingerprint
        )

    def _renew(
        self, model_folder: ModelFolder, config: ModelConfig, version: str, folder: Path, before: ModelVersion | None
    ) -> ModelVersion:
        """The entry of one version after a reload; if that failed, of the version that serves, with the reason."""
        serving = before is not None and before.loaded is not None
        if before is not None and serving and before.fingerprint == model_folder.fingerprint(folder, config):
            return dataclasses.replace(before, reason="")
        try:
            entry = self._load(model_folder, config, version, folder, before.loaded if before else None)
        except Exception as error:
            reason = self._failed(model_folder.name, version, error)
        else:
            logger.info("model %s version %s was %s", model_folder.name, version, "reloaded" if serving else "loaded")
            return entry
        if before is not None and serving:
            return dataclasses.replace(before, reason=f"serves as it was; it could not be loaded again: {reason}")
        return ModelVersion(
            model_folder.name, version, folder, VersionState.UNAVAILABLE, reason, model_folder=model_folder
        )

    def _failed(self, name: str, version: str, error: Exception) -> str:
        """Log and count a failed load, or log one given up because the server stops. Returns the reason in words."""
        if self.interruption.stopping:
            logger.info("model %s version %s was not loaded: the server is stopping", name, version)
            return "the server is stopping"
        self.load_failures[name] += 1
        if isinstance(error, ForwardpassError):
            logger.error("model %s version %s cannot be served: %s", name, version, error)
            return str(error)
        logger.error("model %s version %s could not be loaded", name, version, exc_info=error)
        return unexpected(error)

    def _keep(self, model_folder: ModelFolder, before: dict[str, ModelVersion], reason: str) -> list[ModelVersion]:
        """Log and count a model that can't be loaded at all; its versions in service stay, with the reason."""
        self.load_failures[model_folder.name] += 1
        logger.error("model %s cannot be loaded: %s", model_folder.name, reason)
        said = f"serves as it was; it could not be loaded again: {reason}"
        kept = [dataclasses.replace(e, reason=said) for e in before.values() if e.loaded is not None]
        if not kept:
            latest = max(before, key=number, default="")
            kept = [dataclasses.replace(idle(model_folder, reason), version=latest, asked_for=True)]
        self._replace(model_folder.name, kept)
        return kept

    def _replace(self, name: str, entries: list[ModelVersion]) -> None:
        """Replace all entries of a model at once; then wait until the workers left out have finished."""
        with self._lock:
            serving = {id(e.loaded.worker) for e in entries if e.loaded is not None}
            of_it = [e for e in self._entries.values() if e.name == name]
            leaving = [e.loaded.worker for e in of_it if e.loaded is not None and id(e.loaded.worker) not in serving]
            for e in of_it:
                del self._entries[e.name, e.version]
            self._entries.update({(e.name, e.version): e for e in entries})
            self._retiring += leaving
            self._publish({name})
        self.changed()
        for worker in leaving:
            if not worker.retire(self._settings.grace):
                worker.close(0.0)
        with self._lock:
            self._retiring = [w for w in self._retiring if w not in leaving]
        if leaving:
            shared_arena.shrink()

    def _enter(self, *entries: ModelVersion) -> None:
        with self._lock:
            self._entries.update({(e.name, e.version): e for e in entries})
            self._publish({e.name for e in entries})
        self.changed()

    def _publish(self, names: set[str]) -> None:
        """Renew the look-up table, of which `names` changed. The lock must be held."""
        others = {key: found for key, found in self._table.items() if key[0] not in names}
        self._table = others | look_up(e for e in self._entries.values() if e.name in names)
        self.generation += 1
