"""Models that are loaded because they are asked for, and unloaded where others need the memory.

A load that is asked for while it goes on is made once. Loads of different models do not wait for each other, except
that as many run at a time as Repository lets. The repository's folder is listed for a name that is not known, once a
second at most. Which models go, and when a failed load is tried again: `memory_policy`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Final

from forwardpass.errors import (
    Draining,
    ModelError,
    ModelUnusable,
    Overloaded,
    Reason,
    RepositoryUnreadable,
    RequestError,
    RunFailed,
    UnknownModel,
    printable,
)
from forwardpass.model.network_memory import network_memory
from forwardpass.repository.memory_policy import FRESH, BackOff, ModelMemory, Plan, Use
from forwardpass.repository.model_folder import Fingerprint, ModelFolder
from forwardpass.repository.model_version import ModelVersion
from forwardpass.repository.repository import Repository

logger = logging.getLogger(__name__)

PATIENCE: Final = 2.0  # seconds that a load waits for others to be done with their requests; longer than FRESH
NAP: Final = 0.02  # seconds between two looks at that
LOOK_PAUSE: Final = 1.0  # seconds between two listings for names that are not known
MOST_ASKING: Final = 1024  # calls of other methods than ModelInfer that wait for a load
MOST_LOOKING: Final = 256  # requests for such names that wait for a listing
# The reasons of errors that a load may mend.
MENDED: Final = frozenset({Reason.NOT_LOADED, Reason.LOADING, Reason.UNUSABLE, Reason.UNKNOWN_MODEL})

Done = Callable[[RequestError | None], None]
Submit = Callable[[Callable[[], None]], Any]  # may raise Draining


class OnDemand:
    """Loads models of one repository. Thread-safe."""

    def __init__(
        self,
        repository: Repository,
        limit: int,
        submit: Submit,
        submit_look: Submit,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`limit`: bytes that loaded models may take; 0: there is none. `submit`: has loads made, several at a time;
        `submit_look`: has the folder listed."""
        self._repository = repository
        self._submit = submit
        self._submit_look = submit_look
        self._clock = clock
        self._lock = threading.Lock()  # held for moments only: requests take it
        self._counting = threading.Lock()  # of what follows; files may be looked at with it
        self._memory = ModelMemory(limit)
        self._changing: Counter[str] = Counter()  # models that are being loaded or evicted
        self._loaded_at: dict[str, float] = {}
        # Of what requests ask for, with `_lock`:
        self._back_off = BackOff()
        self._waiting: dict[str, list[Done]] = {}  # by model that is being loaded: whom to call
        self._looking: list[tuple[str, str, Done]] | None = None  # who waits for a listing, if one is planned
        self._looked_at = -LOOK_PAUSE
        self._states: dict[str, Fingerprint] = {}  # by model: the state on disk when it was loaded, or failed to
        self._asking = 0  # of the event loop
        self.loads: Counter[str] = Counter()  # by model: those that requests brought about and that worked
        self.evictions: Counter[str] = Counter()

    @property
    def memory(self) -> int:
        """Bytes that loaded models count for, and those that are being loaded."""
        with self._counting:
            self._recount()
            return self._memory.total

    # -- asked for by requests: never blocks ---------------------------------------------------------------------------

    def begin(self, name: str, version: str, error: RequestError, done: Done) -> RequestError | None:
        """See inference.load_waits.OnDemandLoads."""
        if error.reason not in MENDED or not name or self._repository.interruption.stopping:
            return error
        with self._lock:
            if error.reason is Reason.UNKNOWN_MODEL and not self._is_idle(name):
                return self._plan_look(name, version, error, done)
            return self._plan_load(name, done)

    async def wait_for(self, name: str, version: str, error: RequestError) -> bool:
        """Have a model loaded because `error` was raised. Returns once it is; or False at once, where nothing mends it.

        Raises the error for those who waited, or Overloaded.
        """
        if self._asking >= MOST_ASKING:
            raise Overloaded(f"{self._asking} calls wait for loads", reason=Reason.LOAD_WAITING, retry_after=0.5)
        loop = asyncio.get_running_loop()
        waiting: asyncio.Future[RequestError | None] = loop.create_future()

        def end(ended: RequestError | None) -> None:
            if not waiting.done():
                waiting.set_result(ended)

        def done(ended: RequestError | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(end, ended)

        refused = self.begin(name, version, error, done)
        if refused is error:
            return False
        if refused is None:
            self._asking += 1
            try:
                refused = await waiting
            finally:
                self._asking -= 1
        if refused is not None:
            raise refused
        return True

    def _is_idle(self, name: str) -> bool:
        """Whether a model is known, and none of its versions is loaded."""
        entries = self._repository.entries(name)
        return bool(entries) and not any(entry.loaded for entry in entries)

    def _plan_load(self, name: str, done: Done) -> RequestError | None:
        """Lock held."""
        waiting = self._waiting.get(name)
        if waiting is not None:
            waiting.append(done)
            return None
        failed = self._back_off.error(name, self._clock())
        if failed is not None:
            return again(failed)
        waiting = self._waiting[name] = [done]
        try:
            self._submit(lambda: self._load_for_requests(name))
        except Draining as error:
            del self._waiting[name]
            return error
        return None

    def _plan_look(self, name: str, version: str, error: RequestError, done: Done) -> RequestError | None:
        """Lock held."""
        if self._looking is None:
            try:
                self._submit_look(self._look_for_requests)
            except Draining as stopping:
                return stopping
            self._looking = []
        if len(self._looking) >= MOST_LOOKING:
            return error
        self._looking.append((name, version, done))
        return None

    # -- the threads --------------------------------------------------------------------------------------------------

    def _load_for_requests(self, name: str) -> None:
        error: RequestError | None = RunFailed("internal error; the server's log has the details")
        try:
            self.load(name)
            self.loads[name] += 1
            error = None
        except RequestError as refused:
            error = refused
        except Exception:
            logger.exception("model %s could not be loaded", name)
        finally:
            with self._lock:
                waiting = self._waiting.pop(name, [])
            for done in waiting:
                done(error if error is None else again(error))

    def _look_for_requests(self) -> None:
        self._repository.interruption.wait(self._looked_at + LOOK_PAUSE - self._clock())
        with self._lock:
            asked, self._looking = self._looking or [], None
            self._looked_at = self._clock()
        known: dict[str, ModelFolder] = {}
        failure: RequestError | None = None
        try:
            known = self._list()
        except RequestError as error:
            failure = error
        except Exception:
            logger.exception("the repository could not be listed")
        for name, version, done in asked:
            refused: RequestError | None = failure
            if name in known and self._has(known[name], version):
                with self._lock:
                    refused = self._plan_load(name, done)
                if refused is None:
                    continue
            done(refused)

    @staticmethod
    def _has(model_folder: ModelFolder, version: str) -> bool:
        """Whether a model's options select a version that is on disk."""
        try:
            return not version or version in map(str, model_folder.chosen(model_folder.config()))
        except ModelError:
            return True  # the load has the reason

    def _list(self) -> dict[str, ModelFolder]:
        """List the folder: enter what is new, unload what is gone. Raises RepositoryUnreadable."""
        model_folders = self._repository.model_folders()
        self._repository.note(model_folders.values())
        for name in {entry.name for entry in self._repository.entries()} - model_folders.keys():
            logger.info("model %s is not on disk any more", name)
            self._repository.forget(name)
            with self._lock:
                self._back_off.worked(name)
                self._states.pop(name, None)
        return model_folders

    def look(self) -> None:
        """Bring the index and the loaded models in line with the folder. Blocks. Raises RepositoryUnreadable."""
        model_folders = self._list()
        for name, model_folder in model_folders.items():
            if name not in self._states or self._is_unchanged(name, model_folder):
                continue
            with self._lock:
                self._back_off.worked(name)
            if not self._is_idle(name):
                try:
                    self.load(name)
                except RequestError as error:
                    logger.warning("model %s changed, and was not loaded again: %s", name, error)

    def _is_unchanged(self, name: str, model_folder: ModelFolder) -> bool:
        """Whether its state is the one when it was loaded; or still changes, so that the next look must decide."""
        state = model_folder.state()
        if state == self._states[name]:
            return True
        self._repository.interruption.wait(0.5)
        return model_folder.anew().state() != state

    # -- loading ------------------------------------------------------------------------------------------------------

    def load(self, name: str) -> list[ModelVersion]:
        """Load a model as its folder is now, and make room for it before. Blocks.

        Raises ModelUnusable with the reason if it can't be loaded, Overloaded with the figures if it does not fit.
        """
        known = [entry.model_folder for entry in self._repository.entries(name) if entry.model_folder is not None]
        if not known:
            raise UnknownModel(f"there is no model '{printable(name)}' any more")
        model_folder = known[0].anew()
        self._states[name] = model_folder.state()
        with self._counting:
            self._changing[name] += 1
        try:
            self._make_room(name, _memory_of(model_folder))
            found = self._repository.reload(model_folder)
        finally:
            with self._counting:
                self._loaded_at[name] = self._clock()
                self._changed(name)
        wrong = [entry for entry in found if entry.reason]
        if not wrong:
            with self._lock:
                self._back_off.worked(name)
            return found
        if self._repository.interruption.stopping:
            raise Draining("the server is stopping; send this to another one")
        reasons = "; ".join(f"version {e.version}: {e.reason}" if e.version else e.reason for e in wrong)
        error = ModelUnusable(f"model '{name}' could not be loaded: {reasons}")
        self._failed(name, error)
        if not model_folder.folder.exists():
            try:
                self._list()
            except RepositoryUnreadable:
                logger.debug("whether model %s is gone could not be found out", name)
        raise error

    def _failed(self, name: str, error: RequestError, *, grows: bool = True) -> None:
        with self._lock:
            error.retry_after = self._back_off.failed(name, error, self._clock(), grows=grows)

    def _make_room(self, name: str, nbytes: int) -> None:
        """Evict what must go. Raises Overloaded, with the figures."""
        until = self._clock() + PATIENCE
        while True:
            with self._counting:
                self._recount()
                plan = self._memory.plan(name, nbytes, self._uses())
                self._changing.update(plan.victims)
            if plan.fits:
                break
            if plan.never or self._clock() >= until or self._repository.interruption.stopping:
                error = self._no_room(name, nbytes, plan)
                self._failed(name, error, grows=plan.never)
                logger.warning("%s", error)
                raise error
            self._repository.interruption.wait(NAP)
        for victim in plan.victims:
            self.evictions[victim] += 1
            reason = f"evicted: {name} needed {shown(nbytes)} of memory; its next request loads it again"
            try:
                self._repository.unload(victim, reason)
            finally:
                with self._counting:
                    self._changed(victim)

    def _changed(self, name: str) -> None:
        """A model's load or eviction is over, or one of them. `_counting` held."""
        self._changing[name] -= 1
        self._changing += Counter()  # without those that are at 0
        self._recount()

    def _no_room(self, name: str, nbytes: int, plan: Plan) -> Overloaded:
        limit = self._memory.limit
        text = f"model '{name}' takes {shown(nbytes)} of memory; --model-memory is {shown(limit)}"
        if not plan.never:
            text += f", of which models that have requests, or are being loaded, take {shown(plan.taken)}"
        return Overloaded(text, reason=Reason.MODEL_MEMORY)

    def _uses(self) -> dict[str, Use]:
        """Of every loaded model that is not being changed. `_counting` held."""
        now = self._clock()
        uses: dict[str, Use] = {}
        for entry in self._repository.entries():
            if entry.loaded is not None and entry.name not in self._changing:
                worker = entry.loaded.worker
                before = uses.get(entry.name, Use(0.0, False))
                loaded = self._loaded_at.get(entry.name, -FRESH)
                fresh = before.fresh or worker.last_used <= loaded > now - FRESH
                uses[entry.name] = Use(max(before.last, worker.last_used), before.busy or worker.busy, fresh)
        return uses

    def _recount(self) -> None:
        """Forget models that were unloaded, and count those that were loaded otherwise. `_counting` held."""
        loaded = {e.name: e.model_folder for e in self._repository.entries() if e.loaded is not None}
        for name in self._memory.names - loaded.keys() - self._changing.keys():
            self._memory.forget(name)
        for name in loaded.keys() - self._memory.names - self._changing.keys():
            self._memory.count(name, _memory_of(loaded[name]))


def _memory_of(model_folder: ModelFolder | None) -> int:
    """Bytes that the selected versions of a model will take; 0 where that is not known, and the load has the reason."""
    if model_folder is None:
        return 0
    try:
        config = model_folder.config()
        return sum(network_memory(f / config.model_file) for f in model_folder.chosen(config).values())
    except ModelError:
        return 0


def again(error: RequestError) -> RequestError:
    """A copy, for one of several calls: an error that is raised refers to its caller's frames."""
    return type(error)(str(error), reason=error.reason, retry_after=error.retry_after)


def shown(nbytes: int) -> str:
    """A size for people."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if nbytes >= size:
            return f"{nbytes / size:.3g} {unit}" if nbytes < 1000 * size else f"{nbytes / size:.0f} {unit}"
    return f"{nbytes} bytes"
