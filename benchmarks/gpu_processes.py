"""Has cases measured by worker processes, so that one that crashes or hangs costs its own figure and no other.

A worker takes keys on stdin and prints a JSON object a line: {"device": ...} first, then {"case": key, ...} in order.
"""

from __future__ import annotations

import contextlib
import json
import queue
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

Figures = dict[str, Any]


def collect(
    keys: Sequence[str], command: Sequence[str], patience: float, tell: Callable[[str, Figures], None]
) -> tuple[Figures, dict[str, Figures]]:
    """What the device is, and for each key its figures, or {"failed": why}.

    `patience`: seconds that one case may take. `tell(key, figures)` is called as they come. A worker that ends before
    its time is started again with what is left; one that can't even say what the device is ends it all.
    """
    device: Figures = {}
    found: dict[str, Figures] = {}
    left = list(keys)
    while left:
        said_anything = False
        why = ""
        with tempfile.TemporaryFile("w+") as errors:
            for line in _lines(command, left, patience, errors):
                if isinstance(line, str):
                    errors.seek(0)
                    why = " ".join([line, *_last_line(errors.read())])
                    break
                said_anything = True
                if "device" in line:
                    device = line["device"]
                    continue
                key = line.pop("case")
                found[key] = line
                tell(key, line)
        left = [key for key in left if key not in found]
        if not left:
            break
        ended = left if not said_anything else left[:1]
        for key in ended:
            found[key] = {"failed": why}
            tell(key, found[key])
        left = left[len(ended) :]
    return device, found


def _lines(command: Sequence[str], keys: Sequence[str], patience: float, errors: IO[str]) -> Iterator[Figures | str]:
    """What a worker says; last, where it ended before it was done, a text that says how."""
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    reader = threading.Thread(target=_read, args=(process.stdout, lines), daemon=True)
    try:
        reader.start()
        with contextlib.suppress(BrokenPipeError), process.stdin:
            process.stdin.write("".join(f"{key}\n" for key in keys))
        count = 0
        while count < len(keys):
            try:
                line = lines.get(timeout=patience)
            except queue.Empty:
                yield f"took more than {patience:g} s"
                return
            if line is None:
                yield f"its process ended with {process.wait()}"
                return
            figures = json.loads(line)
            count += "case" in figures
            yield figures
    finally:
        process.kill()
        process.wait()
        reader.join()
        process.stdout.close()


def _read(stream: IO[str], lines: queue.SimpleQueue[str | None]) -> None:
    for line in stream:
        if line.startswith("{"):  # libraries may say something of their own
            lines.put(line)
    lines.put(None)


def _last_line(text: str) -> list[str]:
    words = [line.strip() for line in text.splitlines() if line.strip()]
    return [f"({words[-1][:300]})"] if words else []
