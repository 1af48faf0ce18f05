"""A client that hangs up while its request is being answered: its call is cancelled, as a cancelled gRPC call is.

Looking for it takes a task of its own, which most requests are answered too soon to need: it starts a little later.
"""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Any, Final, Self

from starlette.types import Receive

AFTER_SECONDS: Final = 0.01


class HangUp:
    """Wraps one request's `receive`. As a context, it cancels the task that entered it if the client hangs up."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self.whole = False  # the request's body was received to its end
        self.happened = False
        self._timer: asyncio.TimerHandle | None = None
        self._watch: asyncio.Task[None] | None = None

    async def receive(self) -> Any:
        message = await self._receive()
        if message["type"] == "http.request" and not message.get("more_body", False):
            self.whole = True
        return message

    def __enter__(self) -> Self:
        if self.whole:  # else the next event may be one of the body's
            task = asyncio.current_task()
            assert task is not None
            self._timer = asyncio.get_running_loop().call_later(AFTER_SECONDS, self._start, task)
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _where: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None

    def _start(self, task: asyncio.Task[Any]) -> None:
        self._watch = asyncio.get_running_loop().create_task(self._wait(task))

    async def _wait(self, task: asyncio.Task[Any]) -> None:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self.happened = True
            task.cancel()
