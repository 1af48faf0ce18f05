"""Several load-generating processes as one: starts them, gives them a common start time, merges their counts.

Each process has its share of the rate (or of the calls in flight) and a piece of shared memory that it counts in; a
callback can read the counts while they work. Blocks until all are done.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import numpy as np

from forwardpass.errors import LoadTestError
from forwardpass.loadtest.generator import client_process
from forwardpass.loadtest.generator.client_process import ProcessPlan, ProcessStats
from forwardpass.loadtest.generator.recording import Recording

START_SECONDS = 30.0  # timeout for a process to become ready
SET_OUT = 0.05  # seconds between the start message and the first request
LEAD = 0.25  # seconds from calling `at_begin` to the start of recording: its load on the server must be over by then
LOOK_EVERY = 0.25  # seconds between two calls of `look`; without `look` this process sleeps

Look = Callable[[float, Sequence[Recording]], None]  # seconds since recording began, each process's counts so far


@dataclass(frozen=True, slots=True)
class Finished:
    """The merged results of all processes."""

    recording: Recording
    told: Sequence[ProcessStats]


class _Process:
    """One client process, its pipe and its memory."""

    def __init__(self, order: ProcessPlan) -> None:
        context = multiprocessing.get_context("spawn")
        size = Recording.size(order.slices)
        self._memory = SharedMemory(create=True, size=8 * size)
        flat: Any = np.ndarray(size, np.int64, self._memory.buf)
        self.recording: Recording | None = Recording(order.slices, flat)
        self.pipe, other = context.Pipe()
        self._process = context.Process(target=client_process.main, args=(order, self._memory.name, other), daemon=True)
        self._process.start()
        other.close()

    def hear(self, seconds: float) -> Any:
        """The next message from the process. Raises LoadTestError on timeout, or if the process ended or failed."""
        try:
            if not self.pipe.poll(max(0.0, seconds)):
                raise LoadTestError(f"a client process reported nothing for {seconds:.0f} s")
            said = self.pipe.recv()
        except (EOFError, OSError):
            raise LoadTestError("a client process ended unexpectedly; its output is above") from None
        if isinstance(said, ProcessStats) and said.error:
            raise LoadTestError(said.error)
        return said

    def close(self) -> None:
        self.pipe.close()
        if self._process.is_alive():
            self._process.terminate()
        self._process.join(10.0)
        self.recording = None
        with contextlib.suppress(BufferError):  # the counts are still referenced
            self._memory.close()
        self._memory.unlink()


@contextlib.contextmanager
def unwinding() -> Iterator[None]:
    """Raise SIGTERM as SystemExit within the context, so that the code that started a process ends it.

    Does nothing outside the main thread, where signals do not arrive.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, _: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # do not interrupt the cleanup
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run(
    order: ProcessPlan, processes: int = 1, look: Look | None = None, at_begin: Callable[[], None] | None = None
) -> Finished:
    """Execute `order` with that many processes. Raises LoadTestError.

    `at_begin` is called just before recording begins, `look` a few times a second; both in this process.
    """
    if not hasattr(select, "epoll"):
        raise LoadTestError(f"load tests need Linux (epoll); this is {sys.platform}")
    if order.in_flight:
        processes = min(processes, order.in_flight)
    with unwinding():
        return _run(order, processes, look, at_begin)


def _run(order: ProcessPlan, processes: int, look: Look | None, at_begin: Callable[[], None] | None) -> Finished:
    workers: list[_Process] = []
    try:
        for share in range(processes):
            own = order.in_flight // processes + (share < order.in_flight % processes)
            workers.append(_Process(dataclasses.replace(order, share=share, shares=processes, in_flight=own)))
        for worker in workers:
            worker.hear(START_SECONDS)
        begin = time.monotonic() + max(LEAD, SET_OUT + order.warm_up)
        for worker in workers:
            worker.pipe.send(begin)
        _sleep_until(begin - LEAD)
        if at_begin is not None:
            at_begin()
        told = _watch(workers, order, begin, look)
        merged = Recording(order.slices)
        for worker in workers:
            if worker.recording is not None:
                merged.flat += worker.recording.flat
        return Finished(merged, told)
    finally:
        for worker in workers:
            worker.close()


def _watch(workers: Sequence[_Process], order: ProcessPlan, begin: float, look: Look | None) -> list[ProcessStats]:
    """Wait until all processes have sent their stats. Raises LoadTestError if one does not finish in time."""
    last = begin + order.seconds + order.patience + START_SECONDS
    waiting = {worker.pipe: worker for worker in workers}
    told = []
    while waiting:
        # Waking up briefly takes a core from a client or the server, so it is done only if `look` is given.
        pause = LOOK_EVERY if look is not None else max(0.0, last - time.monotonic())
        ready = select.select(list(waiting), [], [], pause)[0]
        told += [waiting.pop(pipe).hear(0.0) for pipe in ready]
        if waiting and time.monotonic() > last:
            raise LoadTestError("a client process did not come to its end")
        if look is not None:
            look(time.monotonic() - begin, [worker.recording for worker in workers if worker.recording])
    return told


def _sleep_until(moment: float) -> None:
    time.sleep(max(0.0, moment - time.monotonic()))
