"""Calls between the supervisor and a worker process, in both directions over one socket.

A call names a function of the other side; its arguments and result are pickled, which only these two processes can do
to each other: the socket has no name. A RequestError that the function raises is raised by the call.
"""

from __future__ import annotations

import asyncio
import inspect
import itertools
import logging
import pickle
import socket
import struct
from collections.abc import Callable, Mapping
from typing import Any, Final

from forwardpass.errors import Draining, ForwardpassError

logger = logging.getLogger(__name__)

_LENGTH: Final = struct.Struct(">Q")
_CALL, _RESULT, _ERROR = range(3)


class Channel:
    """One end. Used on one event loop, except `call_from_thread`."""

    def __init__(self, sock: socket.socket, functions: Mapping[str, Callable[..., Any]]) -> None:
        """`functions`: what the other side may call, by name; they may be coroutine functions."""
        self._socket = sock
        self._functions = functions
        self._numbers = itertools.count()
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._running: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self.ended = asyncio.Event()  # the other side has closed its end, or is gone

    async def open(self) -> None:
        reader, self._writer = await asyncio.open_connection(sock=self._socket)
        self._reading = self._loop.create_task(self._read(reader))

    async def call(self, name: str, *arguments: Any) -> Any:
        """Call a function of the other side. Raises what it raises, and Draining if the other side ends before."""
        number = next(self._numbers)
        answer = self._waiting[number] = self._loop.create_future()
        try:
            self._send((_CALL, number, name, arguments))
            return await answer
        finally:
            del self._waiting[number]

    def call_from_thread(self, name: str, *arguments: Any) -> Any:
        """As `call`, from another thread than the event loop's. Blocks."""
        return asyncio.run_coroutine_threadsafe(self.call(name, *arguments), self._loop).result()

    def tell(self, name: str, *arguments: Any) -> None:
        """Call a function of the other side, whatever becomes of it. Does not wait."""
        if not self.ended.is_set():
            self._send((_CALL, -1, name, arguments))

    def close(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
        if self._writer is not None:
            self._writer.close()
        self._end()

    def _send(self, message: tuple[Any, ...]) -> None:
        if self.ended.is_set() or self._writer is None:
            raise Draining("the process that was asked has ended", retry_after=0.5)
        data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        self._writer.write(_LENGTH.pack(len(data)))
        self._writer.write(data)

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while True:
                (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
                self._take(pickle.loads(await reader.readexactly(length)))
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            self._end()

    def _take(self, message: tuple[Any, ...]) -> None:
        kind, number = message[:2]
        if kind == _CALL:
            task = self._loop.create_task(self._answer(number, message[2], message[3]))
            self._running.add(task)
            task.add_done_callback(self._running.discard)
            return
        waiting = self._waiting.get(number)
        if waiting is not None and not waiting.done():
            if kind == _RESULT:
                waiting.set_result(message[2])
            else:
                waiting.set_exception(message[2])

    async def _answer(self, number: int, name: str, arguments: tuple[Any, ...]) -> None:
        try:
            found = self._functions[name](*arguments)
            answer = (_RESULT, number, await found if inspect.isawaitable(found) else found)
        except ForwardpassError as error:
            answer = (_ERROR, number, error)
        except Exception as error:
            logger.exception("%s failed", name)
            answer = (_ERROR, number, ForwardpassError(f"{name} failed: {error}"))
        if number >= 0 and not self.ended.is_set():
            self._send(answer)

    def _end(self) -> None:
        self.ended.set()
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(Draining("the process that was asked has ended", retry_after=0.5))
