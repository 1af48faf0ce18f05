"""A dump of the flight recorder, read from its file and checked. Times become seconds since the dump's first event."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from forwardpass.errors import ForwardpassError
from forwardpass.observability.flight_recorder import FORMAT, FORMAT_VERSION


@dataclass(frozen=True, slots=True)
class FlownRequest:
    """One request of a batch."""

    arrival: float
    rows: int
    request_id: str
    deadline: float  # inf: none
    outcome: str  # status and reason; empty: answered with success


@dataclass(frozen=True, slots=True)
class FlownBatch:
    """A batch from the queue's first arrival to its answer, in seconds."""

    model: str
    version: str
    instance: int  # -1: the thread that received the requests
    closed: str
    requests: int
    answered: int
    matrices: Sequence[int]
    taken: float
    run: float
    ended: float
    done: float
    each: Sequence[FlownRequest]

    @property
    def rows(self) -> int:
        """Of its first matrix, or of all that one large request was run in."""
        first = self.matrices[0] if self.matrices else 0
        return sum(self.matrices) if self.requests == 1 and self.answered else first

    @property
    def arrived(self) -> float:
        """When its first request did."""
        return min([request.arrival for request in self.each], default=self.taken)


@dataclass(frozen=True, slots=True)
class FlownRefusal:
    """Requests rejected or failed together."""

    time: float
    model: str
    version: str
    reason: str
    requests: int


@dataclass(frozen=True, slots=True)
class Dump:
    """A whole dump. `began`: seconds since 1970 at time 0; `span`: seconds from there to the last event."""

    cause: str
    server: str
    began: float
    span: float
    batches: Sequence[FlownBatch]
    refused: Sequence[FlownRefusal]
    models: Mapping[tuple[str, str], Mapping[str, Any]] = field(default_factory=dict)


def read(path: Path) -> Dump:
    """Raises ForwardpassError for a file that cannot be read, or that is no dump of this format."""
    try:
        data = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ForwardpassError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ForwardpassError(f"{path}: expected JSON, as SIGUSR1 has a server write it: {error}") from None
    found = (data.get("format"), data.get("format_version")) if isinstance(data, dict) else (None, None)
    if found != (FORMAT, FORMAT_VERSION):
        raise ForwardpassError(f"{path}: expected {FORMAT} version {FORMAT_VERSION}, got {found[0]} version {found[1]}")
    try:
        return _dump(data)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ForwardpassError(f"{path}: a dump with something missing or of another kind: {error!r}") from None


def _dump(data: Mapping[str, Any]) -> Dump:
    starts = [b["taken"] for b in data["batches"]] + [r["arrival"] for b in data["batches"] for r in b["each"]]
    starts += [r["time"] for r in data["refused"]]
    zero = min(starts, default=data["at"])
    batches = sorted((_batch(b, zero) for b in data["batches"]), key=lambda b: b.taken)
    refused = [
        FlownRefusal(r["time"] - zero, r["model"], r["version"], f"{r['status']}: {r['reason']}", r["requests"])
        for r in data["refused"]
    ]
    ends = [b.done for b in batches] + [r.time for r in refused]
    models = {(m["model"], m["version"]): m for m in data["models"]}
    server = f"forwardpass {data.get('forwardpass', '?')}, process {data.get('pid', '?')}"
    return Dump(data["cause"], server, data["unix_offset"] + zero, max(ends, default=0.0), batches, refused, models)


def _batch(found: Mapping[str, Any], zero: float) -> FlownBatch:
    return FlownBatch(
        found["model"],
        found["version"],
        int(found["instance"]),
        found["closed"],
        int(found["requests"]),
        int(found["answered"]),
        [int(rows) for rows in found["matrices"]],
        found["taken"] - zero,
        float(found["run"]),
        found["ended"] - zero,
        found["done"] - zero,
        [
            FlownRequest(
                r["arrival"] - zero,
                int(r["rows"]),
                r.get("id", ""),
                r.get("deadline", math.inf) - zero,
                f"{r['status']}: {r['reason']}" if "status" in r else "",
            )
            for r in found["each"]
        ],
    )
