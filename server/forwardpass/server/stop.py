"""Signal handling on the event loop: stopping, by one signal or two; reading files again; dumping the state."""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import os
import signal
import sys
from collections.abc import Callable, Iterator

STDERR = 2  # the process's own, whatever sys.stderr is


class Stop:
    """`first` is set by the first signal, `second` by the next."""

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()

    def signalled(self) -> None:
        (self.second if self.first.is_set() else self.first).set()


@contextlib.contextmanager
def signals(stop: Stop, read_again: Callable[[], None], dump: Callable[[], None]) -> Iterator[None]:
    """Handle signals while this context is entered; the callbacks run on the event loop.

    SIGTERM and SIGINT stop. SIGHUP calls `read_again`, or stops if the terminal was closed. SIGUSR1 writes the stack of
    every thread to stderr, even if the interpreter hangs, and then calls `dump`.
    """
    loop = asyncio.get_running_loop()
    on_terminal = _on_terminal()

    def hung_up() -> None:
        if on_terminal and not _on_terminal():
            stop.signalled()
        else:
            read_again()

    handlers = {
        signal.SIGTERM: stop.signalled,
        signal.SIGINT: stop.signalled,
        signal.SIGHUP: hung_up,
        signal.SIGUSR1: dump,
    }
    for number, handler in handlers.items():
        loop.add_signal_handler(number, handler)
    faulthandler.register(signal.SIGUSR1, file=STDERR, all_threads=True, chain=True)
    try:
        yield
    finally:
        faulthandler.unregister(signal.SIGUSR1)
        for number in handlers:
            loop.remove_signal_handler(number)
            if number in (signal.SIGHUP, signal.SIGUSR1):
                signal.signal(number, signal.SIG_IGN)  # as in `ignore_early`: nothing is left to read or to dump


def ignore_early() -> None:
    """Ignore SIGHUP and SIGUSR1 until `signals`: during imports, nothing was read yet. Main thread only."""
    for number in (signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _on_terminal() -> bool:
    """Whether the process's input is a terminal that was not closed."""
    return sys.stdin is not None and os.isatty(0)
