"""The flight recorder of one server: when it is dumped, and where to.

A dump is written by SIGUSR1, before the process ends for a lost device or port, and when a latency condition is met;
`dump` returns it for an administrator's call. Writing takes up to seconds, and is never done on the event loop of a
server that serves. Its file can be read by the server's user alone: ids are the clients'. What a condition writes is
bounded: the oldest of KEPT files goes.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from forwardpass import __version__
from forwardpass.batching.request import Closed
from forwardpass.observability.flight_recorder import FlightRecorder
from forwardpass.observability.latency_watch import LatencyCondition, LatencyWatch
from forwardpass.observability.model_metrics import LATENCY_BOUNDS, ModelMetrics
from forwardpass.repository.repository import Repository
from forwardpass.settings import Settings

logger = logging.getLogger(__name__)

KEPT: Final = 16  # files that a latency condition leaves behind, at most
LOOK_SECONDS: Final = 1.0
CLOSE_SECONDS: Final = 10.0  # for which a stopping server waits for a dump that is being written


class FlightDumps:
    """One server's recorder, its dumps and its watch. Thread-safe."""

    def __init__(self, settings: Settings, repository: Repository, metrics: ModelMetrics) -> None:
        """`metrics`: of requests without a model."""
        self.recorder: FlightRecorder | None = None
        self._repository = repository
        self._folder = settings.flight_folder or Path(tempfile.gettempdir())
        self._number = 0
        self._writing = threading.Lock()  # one dump at a time
        self._watched: deque[Path] = deque()
        self._over = threading.Event()
        self._watch: threading.Thread | None = None
        self._last_cause = ""
        if settings.flight_batches:
            self.recorder = FlightRecorder(settings.flight_batches, Closed.NAMES)
            repository.recorder = self.recorder
            metrics.flight = self.recorder.track("", "")
        if self.recorder is not None and settings.flight_when:
            condition = LatencyCondition.parse(settings.flight_when, LATENCY_BOUNDS)
            watch = LatencyWatch(condition, LATENCY_BOUNDS, self._latencies, self._fired)
            self._watch = threading.Thread(target=self._look, args=(watch,), name="latency-watch", daemon=True)
            self._watch.start()

    def dump(self, cause: str) -> bytes | None:
        """Everything that is recorded, as JSON; None if nothing is. Blocks, for up to seconds."""
        if self.recorder is None:
            return None
        with self._writing:
            return "".join(self._text(self.recorder, cause)).encode()

    def _text(self, recorder: FlightRecorder, cause: str) -> Iterator[str]:
        """A dump's JSON, piece by piece."""
        head, batches, refused = recorder.parts(cause, self._models())
        yield json.dumps({"forwardpass": __version__, "pid": os.getpid(), **head})[:-1]
        for name, entries in (("batches", batches), ("refused", refused)):
            yield f', "{name}": ['
            for place, entry in enumerate(entries):
                yield ("," if place else "") + "\n" + json.dumps(entry)
            yield "]"
        yield "}\n"

    def write(self, cause: str) -> Path | None:
        """Write a dump and log its path; None if nothing is recorded, or if it cannot be written. Blocks."""
        recorder = self.recorder
        if recorder is None:
            return None
        with self._writing:
            self._number += 1
            stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
            path = self._folder / f"forwardpass-flight-{os.getpid()}-{stamp}-{self._number}.json"
            try:
                # Never through a link that somebody else put into a shared folder.
                descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
                with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                    file.writelines(self._text(recorder, cause))
            except OSError as error:
                logger.warning("the flight recorder could not be written (%s): %s", cause, error)
                return None
            logger.warning("the flight recorder was written to %s (%s)", path, cause)
            return path

    def write_at_end(self, cause: str) -> None:
        """Have `close` write a dump: the batch that failed, and what was rejected because of it, are in it then."""
        self._last_cause = cause

    def close(self) -> None:
        """End the watch, and write what `write_at_end` asked for."""
        self._over.set()
        if self._watch is not None:
            self._watch.join(CLOSE_SECONDS)
        if self._last_cause:
            self.write(self._last_cause)

    def _models(self) -> list[Mapping[str, Any]]:
        found: list[Mapping[str, Any]] = []
        for entry in self._repository.entries():
            if entry.loaded is not None:
                worker, limits = entry.loaded.worker, entry.loaded.worker.options.limits
                found.append(
                    {
                        "model": entry.name,
                        "version": entry.version,
                        "instances": worker.options.instances,
                        "max_batch_rows": limits.max_batch_rows,
                        "queue_delay": limits.delay,
                        "placement": entry.loaded.placement.label,
                    }
                )
        return found

    # -- the latency condition ----------------------------------------------------------------------------------------

    def _look(self, watch: LatencyWatch) -> None:
        while not self._over.wait(LOOK_SECONDS):
            try:
                watch.look(time.monotonic())
            except Exception:  # the watch must outlive whatever is wrong with one look
                logger.exception("latencies could not be looked at")

    def _latencies(self) -> dict[tuple[str, str], list[int]]:
        return {w.metrics.labels: w.metrics.latencies() for w in self._repository.workers()}

    def _fired(self, cause: str) -> None:
        path = self.write(cause)
        if path is not None:
            self._watched.append(path)
            if len(self._watched) > KEPT:
                with contextlib.suppress(OSError):
                    self._watched.popleft().unlink()
