"""`forwardpass serve` as a child process on free ports of 127.0.0.1, to measure or test a whole server.

A thread reads and keeps the server's output, so that an error about a server that is not ready can include the reason.
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path
from typing import Self

from forwardpass.errors import ForwardpassError

_GRPC = re.compile(r"grpc (unix:\S+|\S+:\d+)")
_HTTP = re.compile(r"http (https?://\S+)")
_METRICS = re.compile(r"metrics (http://\S+)")
_READY = "ready"
_TAIL = 30  # lines of output in an error


class ServerProcess:
    """A server that is ready once constructed. Leaving the context stops it, also after an exception.

    `options` go to the command line ("--transport", "grpcio"). Raises ForwardpassError, with the end of the server's
    output, if it exits, or `patience` seconds pass, before it is ready.
    """

    def __init__(self, repository: Path, *options: str, patience: float = 60.0) -> None:
        command = [sys.executable, "-m", "forwardpass", "serve", str(repository)]
        ports = ["--host", "127.0.0.1", "--grpc-port", "0", "--http-port", "0", "--metrics-port", "0"]
        self._process = subprocess.Popen(
            [*command, *ports, *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        self.lines: list[str] = []  # all output so far
        self.address = ""  # "127.0.0.1:PORT", for gRPC
        self.http_url = ""  # "http://127.0.0.1:PORT"
        self.metrics_url = ""
        self._is_ready = False
        self._settled = threading.Event()
        self._reader = threading.Thread(target=self._read, name="server-output", daemon=True)
        self._reader.start()
        try:
            settled = self._settled.wait(patience)
            if not self._is_ready:
                happened = f"is not ready after {patience:g} s" if not settled else "ended before it was ready"
                raise ForwardpassError(f"the server {happened}:\n{self.tail()}")
        except BaseException:
            self.kill()
            raise

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as output:
            for line in output:
                text = line.rstrip("\n")
                self.lines.append(text)
                if text.startswith("{"):  # --log-format json
                    with contextlib.suppress(ValueError):
                        text = str(json.loads(text).get("message"))
                if found := _GRPC.match(text):
                    self.address = found[1]
                elif found := _HTTP.match(text):
                    self.http_url = found[1]
                elif found := _METRICS.match(text):
                    self.metrics_url = found[1]
                elif text == _READY:
                    self._is_ready = True
                    self._settled.set()
        self._settled.set()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit status, None while the server runs; negative: the signal that ended it."""
        return self._process.poll()

    def metrics(self) -> str:
        """The current /metrics, in Prometheus' text format. Raises OSError if the server does not respond."""
        # Loopback: no proxy, regardless of the environment.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(self.metrics_url, timeout=10) as response:
            text: str = response.read().decode()
        return text

    def tail(self) -> str:
        """The last lines of its output."""
        return "\n".join(self.lines[-_TAIL:])

    def send(self, number: signal.Signals) -> None:
        """Send a signal; nothing happens if the server has ended."""
        self._process.send_signal(number)

    def wait(self, timeout: float = 30.0) -> int:
        """Wait for the exit status. Kills the server and raises ForwardpassError after `timeout` seconds."""
        try:
            status = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise ForwardpassError(f"the server did not end within {timeout:g} s:\n{self.tail()}") from None
        self._reader.join(timeout)
        return status

    def stop(self, timeout: float = 30.0) -> int:
        """Send SIGTERM, and `wait`."""
        self.send(signal.SIGTERM)
        return self.wait(timeout)

    def kill(self) -> None:
        """Send SIGKILL, and wait for the end."""
        self._process.kill()
        self._process.wait()
        self._reader.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.returncode is None:
            self.stop()
        else:
            self._reader.join()
