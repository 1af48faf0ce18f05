"""The end of a server as its event loop hears of it: signals, and how many came."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Iterator


class Stop:
    """`first` is set by the first signal, `second` by one more."""

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()

    def signalled(self) -> None:
        (self.second if self.first.is_set() else self.first).set()


@contextlib.contextmanager
def signals(stop: Stop) -> Iterator[None]:
    """SIGTERM and SIGINT as events, for as long as this is entered."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.signalled)
    try:
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
