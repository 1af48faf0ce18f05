"""`predict` for the tasks of one event loop that share requests: how they wait, and the tasks that send for them.

A sending task exists only while there are rows to send. Cancelling a caller does not affect the request for the others.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from forwardpass.client.coalesced_calls import CoalescedCalls, Way, unsettled
from forwardpass.client.coalescer import ALONE, SEND, WATCH, Coalesce, Group, Rows
from forwardpass.client.operations import Operations, Steps


class TaskBell:
    """Wakes callers whose rows have their outcome, each by its own future, so that one can be cancelled alone."""

    def ring(self, settled: Sequence[Rows]) -> None:
        for rows in settled:
            _wake(rows)


def _wake(rows: Rows) -> None:
    if not rows.there.done():
        rows.there.set_result(None)


class AsyncCoalescer:
    """Any number of tasks of one loop may call `predict`. `run` makes an operation's calls."""

    def __init__(
        self, operations: Operations, options: Coalesce, address: str, run: Callable[[Steps[Any]], Awaitable[Any]]
    ) -> None:
        self._shared = CoalescedCalls(operations, options, address, TaskBell)
        self._coalescer = self._shared.coalescer
        self._max_wait = options.max_wait
        self._run = run
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def counts(self) -> tuple[int, int]:
        """The number of rows sent in shared requests, and of those requests."""
        return self._coalescer.rows, self._coalescer.requests

    async def predict(
        self, model: str, x: ArrayLike, output: str | None, version: str, timeout: float | None, priority: int
    ) -> NDArray[Any]:
        """See `Client.predict`."""
        array = x if type(x) is np.ndarray else np.asarray(x)
        like = (model, version, output, priority, timeout, array.shape, array.dtype)
        way: Way = self._shared.known(like) or await self._run(self._shared.way(like, array))
        group = way.group
        if group is not None:
            rows = Rows(array, way.rows, time.monotonic() + way.limit)
            turn = self._coalescer.offer(group, rows)
            if turn is not ALONE:
                rows.there = asyncio.get_running_loop().create_future()
                if turn is SEND:
                    self._start(group)
                await self._wait(group, rows, way.limit, turn is WATCH)
                return self._shared.result(way, rows)
        try:
            result: NDArray[Any] = await self._run(
                self._shared.operations.predict(
                    model, array, output=output, version=version, timeout=timeout, priority=priority
                )
            )
        finally:
            if group is not None and self._coalescer.ended(group):
                self._start(group)
        return result

    async def _wait(self, group: Group, rows: Rows, limit: float, watch: bool) -> None:
        """Wait for an outcome, or until the time limit."""
        coalescer = self._coalescer

        def overdue() -> None:
            if coalescer.overdue(group, rows):
                self._start(group)

        loop = asyncio.get_running_loop()
        timers = [loop.call_later(self._max_wait, overdue)] if watch else []
        if limit < float("inf"):
            timers.append(loop.call_later(limit, _wake, rows))
        try:
            await rows.there
        finally:
            for timer in timers:
                timer.cancel()
            if rows.outcome is None and coalescer.gone(rows) and watch:
                overdue()

    def close(self) -> None:
        """Fail the rows that were not sent yet."""
        self._coalescer.close()

    async def join(self) -> None:
        """Wait for the senders. Call when their calls have ended."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _start(self, group: Group) -> None:
        """Start a task that sends for the group."""
        task = asyncio.get_running_loop().create_task(self._send(group))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _send(self, group: Group) -> None:
        """Send the group's waiting rows until none are left."""
        coalescer = self._coalescer
        while (taken := coalescer.take(group)) is not None:
            if taken.more:
                self._start(group)
            try:
                await self._run(self._shared.share(group, taken.rows))
            except BaseException as error:
                coalescer.fail(taken.rows, unsettled(error))  # no caller is left waiting
                if not isinstance(error, Exception):
                    raise
            # Let woken callers run first: those that call again at once join the waiting ones.
            await asyncio.sleep(0)
            if not coalescer.ended(group):
                return
