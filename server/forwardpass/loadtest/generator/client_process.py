"""One load-generating process: sends on schedule, times the responses, counts them in shared memory.

One thread, a few connections, no blocking while something may be due: the loop sleeps only until shortly before the
next request and then polls the sockets, because waking up takes longer than a request may be late. Latency counts
from when a request was due. Requests are opaque bytes, independent of any model. Linux only (epoll).
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import time
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import numpy as np

from forwardpass.client import Tls
from forwardpass.errors import SettingsError, Status
from forwardpass.loadtest.generator import schedule
from forwardpass.loadtest.generator.recording import UNANSWERED, WRONG, Recording
from forwardpass.transport.http2.client_connection import (
    ClientConnection,
    Ended,
    framed,
    request_fields,
    timeout_field,
)

SPIN = 250e-6  # seconds before a request is due in which the process spins instead of sleeping
FOLD_AT = 2048  # responses added to the histograms at a time: takes a tenth of a millisecond
FOLD_EVERY = 0.25  # seconds between folds when responses are few
RECONNECT = 0.1  # seconds between attempts to replace a connection
MAX_IN_FLIGHT = 200_000  # calls of one process; requests due above that count as unanswered


@dataclass(frozen=True, slots=True)
class ProcessPlan:
    """The work of one process. Times in seconds; rates are those of all processes together."""

    host: str
    port: int
    path: str  # of the method
    messages: Sequence[bytes]
    weights: Sequence[float]  # relative frequency of each message
    seconds: float  # recorded
    warm_up: float
    phases: Sequence[schedule.Phase] = ()  # excluding the warm-up
    arrivals: schedule.Arrivals = "poisson"
    in_flight: int = 0  # of this process; above 0: a closed loop without a schedule
    connections: int = 8
    deadline: float | None = None
    patience: float = 2.0  # time to wait for responses after the end
    expected: Sequence[bytes] = ()  # by message: the response it must get; empty: not compared
    seed: int = 0
    share: int = 0
    shares: int = 1
    slices: int = 100
    core: int | None = None
    tls: Tls | None = None
    metadata: Sequence[tuple[str, str]] = ()  # of every call


@dataclass(slots=True)
class ProcessStats:
    """A process's final report, in addition to its counts."""

    busy: float = 0.0  # share of its time not idle
    cpu: float = 0.0  # CPU seconds a second
    held: int = 0  # the most calls of one connection at a time held back by the server's flow control or stream limit
    most_in_flight: int = 0
    examples: dict[int, str] = field(default_factory=dict)  # one message for each status other than OK
    error: str = ""  # the reason if it failed


def main(order: ProcessPlan, memory_name: str, pipe: Any) -> None:
    """Process entry point. Sends "ready", receives the moment at which recording begins, sends a ProcessStats."""
    if order.core is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {order.core})
    memory = SharedMemory(memory_name)
    told = ProcessStats()
    flat = np.ndarray(Recording.size(order.slices), np.int64, memory.buf)
    client: ClientLoop | None = None
    try:
        client = ClientLoop(order, Recording(order.slices, flat))
        pipe.send("ready")
        begin = pipe.recv()
        told = client.run(begin)
    except (OSError, SettingsError) as error:
        told.error = str(error)
    except (EOFError, KeyboardInterrupt):
        return  # the parent has gone
    finally:
        if client is not None:
            client.close()
    with contextlib.suppress(OSError):
        pipe.send(told)
    # The arrays view the shared memory, which cannot be closed while they exist.
    del client, flat
    gc.collect()
    memory.close()


class ClientLoop:
    """The connections, the loop over them, and the records. Raises OSError if the server does not respond."""

    def __init__(self, order: ProcessPlan, recording: Recording) -> None:
        self._order = order
        self._recording = recording
        self._told = ProcessStats()
        self._bodies = [framed(message) for message in order.messages]
        self._connections: list[ClientConnection] = []
        self._leaving: list[ClientConnection] = []  # replaced, but with calls still in flight
        self._by_file: dict[int, ClientConnection] = {}
        self._tls = None if order.tls is None else order.tls.context()
        self._poll = select.epoll()
        for _ in range(order.connections):
            self._connections.append(self._connect(5.0))
        self._retry = 0.0
        self._done_due, self._done_at = array("d"), array("d")
        self._lag_due, self._lag = array("d"), array("d")
        self._slice = order.seconds / order.slices
        self._begin = 0.0
        self._fold_by = 0.0
        self._slept = 0.0  # seconds
        self._finished = 0  # completed calls
        authority = f"{order.host}:{order.port}"
        self._fields = request_fields(order.path, authority, order.metadata, "http" if order.tls is None else "https")
        if order.deadline is not None:
            self._fields.append(timeout_field(int(order.deadline * 1e6)))  # last; an open loop replaces it per request

    def _connect(self, timeout: float) -> ClientConnection:
        order = self._order
        connection = ClientConnection(
            order.host,
            order.port,
            timeout,
            keep_answers=bool(order.expected),
            tls=self._tls,
            server_name=None if order.tls is None else order.tls.server_name,
        )
        self._by_file[connection.socket.fileno()] = connection
        self._poll.register(connection.socket, select.EPOLLIN)
        connection.flush()
        return connection

    def close(self) -> None:
        for connection in (*self._connections, *self._leaving):
            connection.close()
        self._poll.close()

    def run(self, begin: float) -> ProcessStats:
        """Send requests, and record those due from `begin` (time.monotonic) on. Blocks until the end."""
        order = self._order
        self._begin = begin
        gc.collect()
        gc.freeze()
        gc.disable()
        started, cpu = time.monotonic(), time.process_time()
        idle = self._closed() if order.in_flight else self._open()
        elapsed = max(time.monotonic() - started, 1e-9)
        self._told.cpu = (time.process_time() - cpu) / elapsed
        self._told.busy = max(0.0, 1.0 - idle / elapsed)
        self._wait(self._begin + order.seconds + order.patience)
        for connection in (*self._connections, *self._leaving):
            for ended in connection.fail_all(Status.CANCELLED, ""):
                due = ended.token[0] if order.expected else ended.token
                self._recording.add_outcome(self._slice_of(due), UNANSWERED)
        self._fold()
        return self._told

    # -- the two loops ----------------------------------------------------------------------------------------------

    def _open(self) -> float:
        """Run the open loop. Returns the idle seconds."""
        order, told = self._order, self._told
        first = order.phases[0].begin
        phases = [schedule.Phase(order.warm_up, first, first)] if order.warm_up else []
        moments = self._moments([*phases, *order.phases], self._begin - order.warm_up)
        pick = self._picks()
        note_due, note_lag = self._lag_due.append, self._lag.append
        clock, bodies, fields, expected = time.monotonic, self._bodies, self._fields, bool(order.expected)
        deadline = order.deadline
        idle = 0.0
        turn = sent = 0
        due = next(moments, None)
        while due is not None:
            now = clock()
            worked = due <= now
            while due is not None and due <= now:
                place = next(pick)
                if deadline is not None:
                    fields = [*self._fields[:-1], timeout_field(int((due + deadline - now) * 1e6))]
                connections = self._connections
                if connections and sent - self._finished < MAX_IN_FLIGHT:
                    turn += 1
                    connection = connections[turn % len(connections)]
                    connection.start((due, place) if expected else due, fields, bodies[place])
                    sent += 1
                    note_due(due)
                    note_lag(now - due)
                else:
                    outcome = UNANSWERED if connections else Status.UNAVAILABLE
                    self._recording.add_outcome(self._slice_of(due), outcome)
                due = next(moments, None)
                now = clock()
            if worked:
                self._flush()
                told.most_in_flight = max(told.most_in_flight, sent - self._finished)
            slept = self._slept
            if not self._take(0.0 if due is None else due - now - SPIN) and not worked and slept == self._slept:
                idle += clock() - now
        return idle + self._slept

    def _closed(self) -> float:
        """Run the closed loop, starting a call when another ends. Returns the idle seconds."""
        order, clock = self._order, time.monotonic
        end = self._begin + order.seconds
        pick = self._picks()
        idle = 0.0
        while (now := clock()) < end:
            for _ in range(order.in_flight - sum(c.in_flight for c in (*self._connections, *self._leaving))):
                if not self._connections:
                    break
                place = next(pick)
                connection = min(self._connections, key=_load)
                connection.start((now, place) if order.expected else now, self._fields, self._bodies[place])
            self._flush()
            # Poll without sleeping, as in the open loop: a wake-up would be part of every latency.
            if not self._take(0.0):
                idle += clock() - now
        self._told.most_in_flight = order.in_flight
        return idle

    def _wait(self, until: float) -> None:
        """Wait for outstanding responses."""
        while time.monotonic() < until and any(c.in_flight for c in (*self._connections, *self._leaving)):
            self._flush()
            self._take(0.01)

    # -- sockets ----------------------------------------------------------------------------------------------------

    def _flush(self) -> None:
        for connection in self._connections:
            if connection.wants_to_write:
                connection.flush()
            if connection.held > self._told.held:
                self._told.held = connection.held

    def _take(self, seconds: float) -> bool:
        """Read from the sockets after waiting up to `seconds`. Returns whether any socket had events."""
        if seconds > 0:
            asked = time.monotonic()
            select.select([self._poll], [], [], seconds)
            self._slept += time.monotonic() - asked
        events = self._poll.poll(0)
        for file, _ in events:
            connection = self._by_file[file]
            ended = connection.receive()
            if ended:
                self._note(ended, time.monotonic())
            if connection.wants_to_write:
                connection.flush()
            if not connection.usable:
                self._replace(connection)
        if not self._connections or any(c.wants_to_write for c in self._connections):
            self._flush()
            self._reconnect()
        return bool(events)

    def _note(self, ended: Sequence[Ended], now: float) -> None:
        expected = self._order.expected
        self._finished += len(ended)
        for token, status, text, answer in ended:
            due = token
            if expected:
                due, place = token
                if status == Status.OK and answer != expected[place]:
                    self._recording.add_outcome(self._slice_of(due), WRONG)
                    self._told.examples.setdefault(WRONG, f"{len(answer)} bytes: {answer[:60]!r}")
                    continue
            if status == Status.OK:
                self._done_due.append(due)
                self._done_at.append(now)
            else:
                self._recording.add_outcome(self._slice_of(due), status)
                if status not in self._told.examples:
                    self._told.examples[status] = text
        if len(self._done_due) >= FOLD_AT or now > self._fold_by:
            self._fold()
            self._fold_by = now + FOLD_EVERY

    def _fold(self) -> None:
        """Add the noted times to the histograms."""
        due, done = np.array(self._done_due), np.array(self._done_at)
        self._recording.add_latencies(self._slices(due), done - due)
        due, lag = np.array(self._lag_due), np.array(self._lag)
        self._recording.add_lags(self._slices(due), lag)
        for notes in (self._done_due, self._done_at, self._lag_due, self._lag):
            del notes[:]

    def _slices(self, due: Any) -> Any:
        return np.floor((due - self._begin) / self._slice).astype(np.int64)

    def _slice_of(self, due: float) -> int:
        return int((due - self._begin) // self._slice)

    def _replace(self, connection: ClientConnection) -> None:
        """Replace a connection that the server is closing; its calls in flight may still end."""
        if connection in self._connections:
            self._connections.remove(connection)
            self._leaving.append(connection)
        if connection.lost or not connection.in_flight:
            if connection in self._leaving:
                self._leaving.remove(connection)
            self._by_file.pop(connection.socket.fileno(), None)
            with contextlib.suppress(OSError, KeyError, ValueError):
                self._poll.unregister(connection.socket)
            connection.close()
        self._reconnect()

    def _reconnect(self) -> None:
        now = time.monotonic()
        if len(self._connections) == self._order.connections or now < self._retry:
            return
        try:
            self._connections.append(self._connect(0.2))
        except OSError:
            self._retry = now + RECONNECT

    # -- requests and their times -----------------------------------------------------------------------------------

    def _moments(self, phases: Sequence[schedule.Phase], start: float) -> Iterator[float]:
        order = self._order
        for chunk in schedule.times(phases, order.arrivals, order.seed, order.share, order.shares):
            yield from (chunk + start).tolist()

    def _picks(self) -> Iterator[int]:
        """Yields the index of the next message."""
        order = self._order
        if len(order.messages) == 1:
            while True:
                yield 0
        generator = np.random.default_rng([order.seed, order.share, 1])
        weights = np.array(order.weights) / np.sum(order.weights)
        while True:
            yield from generator.choice(len(weights), schedule.CHUNK, p=weights).tolist()


def _load(connection: ClientConnection) -> int:
    return connection.in_flight
