"""Changes which models are served while the server runs: by request, or when their folders change.

Loading takes seconds, so changes are made on threads of their own; callers await them. Changes of one model take turns,
those of several do not wait for each other. Once the server is stopping, no change is begun, and one in progress ends
early.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from forwardpass.errors import (
    ConfigError,
    ControlRefused,
    Draining,
    InvalidRequest,
    ModelUnusable,
    Overloaded,
    Reason,
    RepositoryUnreadable,
    RequestError,
    SettingsError,
    UnknownModel,
    printable,
)
from forwardpass.model import triton_config
from forwardpass.model.options import ModelConfig, plain_name
from forwardpass.repository.model_folder import Fingerprint, ModelFolder
from forwardpass.repository.model_version import ModelVersion
from forwardpass.repository.on_demand import OnDemand
from forwardpass.repository.repository import Repository
from forwardpass.settings import Settings

logger = logging.getLogger(__name__)

CHANGES = 8  # that are made at the same time
MOST_WAITING = 64  # changes that are queued or in progress
SETTLE_SECONDS = 0.5  # a changed folder is loaded if it does not change during this time: copying takes time
MOST_LOOKS = 64  # limit of the polls between attempts to load an unchanged model that fails: 1, 2, 4, 8 ...
NAME_LIMIT = 255  # characters of the name of a model whose files are in a request
FILE_DEPTH = 16  # folders in the path of such a file
PATH_LIMIT = 1024  # characters in that path
BY_REQUEST = ("explicit", "on-demand")  # the ways of control with which models are loaded and unloaded by request
STOPPING = "the server is stopping; models are not changed any more"
FILE = "file:"  # the prefix of the names of parameters that carry files

T = TypeVar("T")


class ModelControl:
    """Changes which models a repository serves. Its coroutines must run on one event loop; `close` ends its threads."""

    def __init__(self, repository: Repository, settings: Settings) -> None:
        self._repository = repository
        self._settings = settings
        # More than the loads that run at a time: a change may wait for its model's turn, or for requests to finish.
        self._threads = ThreadPoolExecutor(CHANGES, "model-control")
        self._polling = ThreadPoolExecutor(1, "model-polling")  # has the others make changes, and waits for them
        self._waiting = 0
        # Listing the folder waits for the disk, and must not wait for a load.
        self._looking = ThreadPoolExecutor(1, "model-listing")
        self._naming = ThreadPoolExecutor(1, "model-names")  # the same, for names that are not known
        self._listing: asyncio.Future[None] | None = None  # the listing in progress, or the last one
        self._unfinished: set[futures.Future[Any]] = set()
        self.on_demand: OnDemand | None = None
        if settings.model_control == "on-demand":
            self.on_demand = OnDemand(
                repository,
                settings.model_memory,
                partial(self._submit, self._threads),
                partial(self._submit, self._naming),
            )
        self._seen: dict[str, Fingerprint] = {}  # by model: the state on disk at the last attempt to load it
        self._again: dict[str, tuple[int, int]] = {}  # by failed model: polls between attempts, and polls left
        self._sent: dict[str, tempfile.TemporaryDirectory[str]] = {}  # folders of models whose files were in a request

    def stop(self) -> None:
        """Reject changes from now on, and end a load in progress early. Does not block."""
        self._repository.interruption.stop()

    def close(self, seconds: float = 0.0) -> bool:
        """`stop`, and wait up to `seconds` for changes in progress. Returns whether all of them ended."""
        self.stop()
        for thread in (self._threads, self._polling, self._looking, self._naming):
            thread.shutdown(wait=False, cancel_futures=True)
        return not futures.wait(self._unfinished, seconds).not_done

    async def start(self, entry: ModelVersion) -> ModelVersion:
        """Load an announced version; see Repository.load. Any number may be started at once."""
        self._check()
        return await asyncio.wrap_future(self._submit(self._threads, lambda: self._repository.load(entry)))

    # -- by request -------------------------------------------------------------------------------------------------

    async def load(self, name: str, parameters: Mapping[str, Any]) -> None:
        """Load a model, or reload it from its folder. Returns once it serves.

        `parameters` are the protocol's: `config`, a ModelConfig as JSON instead of the options on disk, and
        `file:VERSION/NAME`, files instead of those on disk. Raises ModelUnusable with the reason if it can't be loaded
        (versions that served before continue to serve), UnknownModel, InvalidRequest, ControlRefused or Overloaded.
        """
        self._allowed()
        config, files = _read(parameters)
        if self.on_demand is not None:
            if config is not None:
                raise InvalidRequest(
                    "expected no parameters with --model-control on-demand: they would be forgotten when the model is "
                    "evicted"
                )
            await self._change(partial(self._load_as_asked, self.on_demand, name))
            return
        await self._change(lambda: self._load(name, config, files))

    async def unload(self, name: str) -> None:
        """Stop serving a model. Returns once accepted requests are finished. Raises UnknownModel, ControlRefused."""
        self._allowed()
        await self._change(lambda: self._unload(name))

    async def again(self) -> str:
        """Update the served models from the folder now, in any mode. Returns a summary in words.

        With explicit control only models that were asked for are loaded, and none is unloaded. Raises RequestError.
        """
        return await self._change(self._again_now, self._polling)

    def _again_now(self) -> str:
        before = {id(e.loaded.worker) for e in self._repository.entries() if e.loaded is not None}
        if self.on_demand is not None:
            self.on_demand.look()
        elif self._settings.model_control == "explicit":
            model_folders = self._repository.model_folders()
            asked_for = {e.name for e in self._repository.entries() if e.asked_for}
            self._reload([model_folders[name] for name in asked_for & model_folders.keys() - self._sent.keys()])
        else:
            self._seen.clear()
            self.look()
        serving = {id(e.loaded.worker) for e in self._repository.entries() if e.loaded is not None}
        missing = len(self._repository.missing())
        return f"{len(serving - before)} version(s) loaded, {len(serving)} served, {missing} not served that should be"

    async def refresh(self) -> None:
        """Update the index with models on disk that were not asked for. Does nothing with control none or poll.

        If the folder can't be read, the index is not changed.
        """
        if self._settings.model_control not in BY_REQUEST or self._repository.interruption.stopping:
            return
        if self._listing is None or self._listing.done():  # else concurrent calls share one listing
            listing = self._submit(
                self._looking, lambda: self._repository.note(self._repository.model_folders().values())
            )
            self._listing = asyncio.wrap_future(listing)
        with contextlib.suppress(RepositoryUnreadable):  # logged and counted by the listing
            await asyncio.shield(self._listing)

    def _allowed(self) -> None:
        mode = self._settings.model_control
        if mode not in BY_REQUEST:
            raise ControlRefused(
                f"models are loaded and unloaded by request with --model-control explicit; this server has {mode}"
            )

    async def _change(self, change: Callable[[], T], thread: ThreadPoolExecutor | None = None) -> T:
        if self._waiting >= MOST_WAITING:
            raise Overloaded(
                f"{self._waiting} changes of models wait already", reason=Reason.MODEL_CONTROL, retry_after=1.0
            )
        self._check()
        self._waiting += 1
        try:
            return await asyncio.wrap_future(self._submit(thread or self._threads, change))
        finally:
            self._waiting -= 1

    def _submit(self, thread: ThreadPoolExecutor, work: Callable[[], T]) -> futures.Future[T]:
        try:
            future = thread.submit(work)
        except RuntimeError:  # it was shut down meanwhile
            raise Draining(STOPPING) from None
        self._unfinished.add(future)
        future.add_done_callback(self._unfinished.discard)
        return future

    def _check(self) -> None:
        """Raises Draining once the server is stopping."""
        if self._repository.interruption.stopping:
            raise Draining(STOPPING)

    def _reload(self, model_folders: Sequence[ModelFolder]) -> list[list[ModelVersion]]:
        """Reload each on the threads for changes; returns what Repository.reload does for each."""
        work = [self._submit(self._threads, partial(self._repository.reload, m)) for m in model_folders]
        try:
            return [future.result() for future in work]
        except futures.CancelledError:
            raise Draining(STOPPING) from None

    def _load_as_asked(self, on_demand: OnDemand, name: str) -> None:
        self._home(name, {})  # raises where there is no such model
        self._repository.note(self._repository.model_folders().values())
        on_demand.load(name)

    def _load(self, name: str, config: str | None, files: Mapping[str, bytes]) -> None:
        with self._repository.turns.of(name):
            self._load_now(name, config, files)

    def _load_now(self, name: str, config: str | None, files: Mapping[str, bytes]) -> None:
        model_folder = self._home(name, files)
        options: ModelConfig | None = None
        try:
            if config is not None:
                options = triton_config.from_json(config, name, self._settings.ignore_unsupported)
        except ConfigError as error:
            raise InvalidRequest(str(error)) from None
        sent = tempfile.TemporaryDirectory(prefix="forwardpass-") if files else None
        try:
            if sent is not None:
                model_folder = ModelFolder(name, Path(sent.name), False, self._settings.ignore_unsupported)
                _write(model_folder.folder, files)
            assert model_folder is not None
            wrong = [e for e in self._repository.reload(model_folder, options) if e.reason]
            if wrong:
                self._check()
                raise ModelUnusable("; ".join(f"model '{name}' {_version(e.version)}{e.reason}" for e in wrong))
            if sent is not None:
                self._sent[name], sent = sent, self._sent.get(name)
            elif name in self._sent:
                sent = self._sent.pop(name)
        finally:
            if sent is not None:
                sent.cleanup()

    def _home(self, name: str, files: Mapping[str, bytes]) -> ModelFolder | None:
        """The model's folder; None if the request has its files. No path is made from the name."""
        if not name:
            raise InvalidRequest("the request names no model")
        if files:
            if len(name) > NAME_LIMIT or not name.isprintable() or name.strip(" .") != name or "/" in name:
                raise InvalidRequest(f"model name '{printable(name)}': expected one that a folder could have")
            return None
        model_folders = self._repository.model_folders()
        # A served model that is gone from the disk keeps its folder, so that the index shows the failure.
        served = {
            e.name: e.model_folder
            for e in self._repository.entries()
            if e.loaded is not None and e.model_folder is not None
        }
        if name in served and name not in model_folders and name not in self._sent:
            return served[name].anew()
        if name not in model_folders:
            have = ", ".join(list(model_folders)[:10])
            raise UnknownModel(f"there is no model '{printable(name)}' in the repository; it has {have or 'none'}")
        return model_folders[name]

    def _unload(self, name: str) -> None:
        with self._repository.turns.of(name):
            if not self._repository.unload(name):
                raise UnknownModel(f"there is no model '{printable(name)}'")
            if name in self._sent:
                self._sent.pop(name).cleanup()

    # -- by polling -------------------------------------------------------------------------------------------------

    async def poll(self) -> None:
        """Apply changes of the folder, every `poll_seconds`, until cancelled."""
        while True:
            await asyncio.sleep(self._settings.poll_seconds)
            try:
                await self._change(self.look, self._polling)
            except RepositoryUnreadable:  # logged and counted; the next poll tries again
                continue
            except (SettingsError, RequestError) as error:
                logger.error("the repository could not be listed: %s", error)
            except Exception:
                logger.exception("the repository could not be listed")

    def look(self) -> None:
        """Load new and changed models, forget those that are gone, and retry failed ones.

        Blocks until they are loaded. Raises RepositoryUnreadable, before it changes anything.
        """
        if self.on_demand is not None:
            self.on_demand.look()
            return
        model_folders = self._repository.model_folders()
        for name in {e.name for e in self._repository.entries()} - model_folders.keys():
            logger.info("model %s is not on disk any more", name)
            self._repository.forget(name)
            self._seen.pop(name, None)
            self._again.pop(name, None)
        states = {name: model_folder.state() for name, model_folder in model_folders.items()}
        changed = [n for n, state in states.items() if self._seen.get(n) != state or self._is_due(n)]
        if any(name in self._seen for name in changed):
            self._repository.interruption.wait(SETTLE_SECONDS)
        settled: list[ModelFolder] = []
        for name in changed:
            model_folder = model_folders[name]
            if name in self._seen:
                model_folder = model_folder.anew()
                if model_folder.state() != states[name]:
                    continue  # still being written: left to the next poll
            self._seen[name] = states[name]
            settled.append(model_folder)
        for model_folder, entries in zip(settled, self._reload(settled), strict=True):
            name = model_folder.name
            failed = any(entry.reason for entry in entries)
            wait = min(MOST_LOOKS, 2 * self._again[name][0]) if name in self._again else 1
            if failed:
                self._again[name] = (wait, wait)
            else:
                self._again.pop(name, None)

    def _is_due(self, name: str) -> bool:
        """Whether an unchanged model whose load failed must be retried at this poll. Counts the poll."""
        wait, left = self._again.get(name, (0, 0))
        if wait:
            self._again[name] = (wait, left - 1)
        return wait > 0 and left <= 1


def _version(version: str) -> str:
    return f"version {version}: " if version else ""


def _read(parameters: Mapping[str, Any]) -> tuple[str | None, dict[str, bytes]]:
    """Parse `config`, and the files by path. Raises InvalidRequest for any other parameter."""
    config: str | None = None
    files: dict[str, bytes] = {}
    for key, parameter in parameters.items():
        kind = parameter.WhichOneof("parameter_choice")
        if key == "config" and kind == "string_param":
            config = parameter.string_param
        elif key.startswith(FILE) and kind == "bytes_param":
            files[key[len(FILE) :]] = parameter.bytes_param
        else:
            raise InvalidRequest(
                f"parameter '{printable(key)}': expected 'config' as a string or 'file:VERSION/NAME' as bytes, got "
                f"{kind or 'nothing'}"
            )
    if files and config is None:
        raise InvalidRequest("parameter 'config': expected it with files, since none of what is on disk is then used")
    return config, files


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files below `folder`. Raises InvalidRequest, before writing any, for a path outside it; ModelUnusable."""
    targets = {path: _parts(path) for path in files}
    folders = {parts[:i] for parts in targets.values() for i in range(1, len(parts))}
    for path, parts in targets.items():
        if parts in folders:
            raise InvalidRequest(f"parameter '{FILE}{printable(path)}': expected a file, for others it is a folder")
    for path, data in files.items():
        target = folder.joinpath(*targets[path])
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
        except OSError as error:
            raise ModelUnusable(f"'{printable(path)}' cannot be written: {error.strerror or error}") from None


def _parts(path: str) -> tuple[str, ...]:
    """The components of a file's path. Raises InvalidRequest."""
    try:
        parts = tuple(plain_name(part) for part in path.split("/"))
    except ValueError:
        raise InvalidRequest(f"parameter '{FILE}{printable(path)}': expected VERSION/NAME") from None
    longest = max(len(part.encode()) for part in parts)
    if len(parts) > FILE_DEPTH + 1 or len(path) > PATH_LIMIT or longest > NAME_LIMIT:
        raise InvalidRequest(
            f"parameter '{FILE}{printable(path)}': expected at most {FILE_DEPTH} folders, {PATH_LIMIT} characters and "
            f"names of {NAME_LIMIT} bytes, got {len(parts) - 1}, {len(path)} and {longest}"
        )
    return parts
