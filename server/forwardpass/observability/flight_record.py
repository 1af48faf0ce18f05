"""One batch in the flight recorder: packed into bytes, and unpacked for a dump. Pure.

Packed, since thousands of records stay: as objects their numbers would be scattered over cold memory, and freeing the
oldest of them would cost a small request several percent of its time. Bytes are one object, which Python's cycle
collector does not look at.

    head        model, why it closed, flags, instance; matrices, requests, answered, groups; taken, run, ended, done
    matrices    rows of each
    groups      an arrival, and how many of the batch's requests, in order, share it
    deadlines   of the requests kept, inf for none; only with the flag DATED
    rows        of the requests kept; only with the flag ROWS, otherwise each has one
    ids         of the requests kept, as fields of their messages; empty if none has one

A request that ran alone, the most frequent record where it is small, has a shorter head and its id.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import chain
from struct import Struct
from typing import Any, Final, NamedTuple, Protocol

KEPT_REQUESTS: Final = 64  # requests of one batch that are recorded one by one
KEPT_ID: Final = 64  # bytes of an id that are kept
RECEIVER: Final = -1  # in place of an instance's number: the thread that received the request ran it

DATED, ROWS, SINGLE = 1, 2, 4  # flags
_HEAD = Struct("=HBBiIIIIdddd")
_ONE = Struct("=HBBiIIIIddddIdI")  # the head, one matrix, one group
_SINGLE = Struct("=HBBBddddddI")
_ID_TAG = b"\x1a"  # ModelInferRequest.id: field 3, length-delimited
_NO_ID = _ID_TAG + b"\x00"
_ID_BYTES = KEPT_REQUESTS * KEPT_ID  # of a batch; beyond that each is cut

Times = tuple[float, float, float, float]  # taken, run, ended, done: see BatchInFlight
Outcome = tuple[str, str]  # gRPC status and reason of a request that was not answered with success


class RequestInFlight(NamedTuple):
    """One request of a recorded batch."""

    arrival: float
    rows: int
    deadline: float  # inf: none
    request_id: str


class BatchInFlight(NamedTuple):
    """A recorded batch. Times are on the server's monotonic clock, in seconds."""

    model: int  # its number in the recorder
    closed: int  # as it was packed
    instance: int
    requests: int  # of which at most KEPT_REQUESTS are in `each`
    answered: int  # with success
    matrices: Sequence[int]  # rows of each
    taken: float
    run: float  # seconds in the network
    ended: float  # the run had ended and the responses were encoded
    done: float  # the responses were passed to the transport
    each: Sequence[RequestInFlight]


class Packable(Protocol):
    """A request, as `pack_single` needs it."""

    arrival: float
    deadline: float
    rows: int
    id_field: bytes


def pack_single(
    model: int, closed: int, request: Packable, ended: float, note: tuple[Any, Any, float, float, float, int]
) -> bytes:
    """A batch of one request and one matrix, run by the thread that received it. `note`: its BatchRecord."""
    _, _, taken, run, done, answered = note
    id_field = request.id_field
    return _SINGLE.pack(
        model, closed, SINGLE, answered, taken, run, ended, done, request.arrival, request.deadline, request.rows
    ) + (id_field if len(id_field) <= KEPT_ID else _cut(id_field))


def pack(
    model: int,
    closed: int,
    instance: int,
    times: Times,
    *,
    matrices: Sequence[int],
    requests: int,
    answered: int,
    groups: Sequence[tuple[float, int]],
    deadlines: Sequence[float] | None,
    rows: Sequence[int] | None,
    id_fields: Sequence[bytes],
) -> bytes:
    """A batch. `deadlines`, `rows` and `id_fields` are of the first KEPT_REQUESTS of its `requests`.

    `groups`: arrivals in the order of the requests, each with how many in a row share it.
    """
    flags = (DATED if deadlines is not None else 0) | (ROWS if rows is not None else 0)
    if len(matrices) == len(groups) == 1:
        head = _ONE.pack(model, closed, flags, instance, 1, requests, answered, 1, *times, matrices[0], *groups[0])
    else:
        head = b"".join(
            (
                _HEAD.pack(model, closed, flags, instance, len(matrices), requests, answered, len(groups), *times),
                _words(len(matrices)).pack(*matrices),
                _pairs(len(groups)).pack(*chain.from_iterable(groups)),
            )
        )
    if deadlines is not None:
        head += _times(len(deadlines)).pack(*deadlines)
    if rows is not None:
        head += _words(len(rows)).pack(*rows)
    ids = b"".join(id_fields)
    if not ids:
        return head
    if len(ids) > _ID_BYTES:
        ids = b"".join([_cut(field) or _NO_ID for field in id_fields])
    elif b"" in id_fields:
        ids = b"".join([field or _NO_ID for field in id_fields])
    return head + ids


@lru_cache(256)
def _words(count: int) -> Struct:
    return Struct(f"={count}I")


@lru_cache(256)
def _times(count: int) -> Struct:
    return Struct(f"={count}d")


@lru_cache(256)
def _pairs(count: int) -> Struct:
    return Struct("=" + "dI" * count)


def _cut(field: bytes) -> bytes:
    """The field of an id, which is then at most KEPT_ID bytes long."""
    text = _text(field)
    return field if len(text) <= KEPT_ID else _ID_TAG + bytes((KEPT_ID,)) + text[:KEPT_ID]


def id_of(field: bytes) -> str:
    """The id in a field, at most KEPT_ID bytes of it and … if there are more; empty for no field."""
    return next(_ids(_cut(field), 0), "") if field else ""


def _text(field: bytes) -> bytes:
    start = 1
    while start < len(field) and field[start] & 0x80:
        start += 1
    return field[start + 1 :]


def unpack(data: bytes) -> BatchInFlight:
    """The batch that was packed."""
    if data[3] & SINGLE:
        model, closed, _, answered, taken, run, ended, done, arrival, deadline, size = _SINGLE.unpack_from(data)
        name = next(_ids(data, _SINGLE.size), "")
        one = RequestInFlight(arrival, size, deadline, name)
        return BatchInFlight(model, closed, RECEIVER, 1, answered, (size,), taken, run, ended, done, [one])
    head = _HEAD.unpack_from(data)
    model, closed, flags, instance, sizes, requests, answered, groups, taken, run, ended, done = head
    at = _HEAD.size
    matrices = _words(sizes).unpack_from(data, at)
    at += 4 * sizes
    pairs = _pairs(groups).unpack_from(data, at)
    at += 12 * groups
    arrivals = list(chain.from_iterable([a] * n for a, n in zip(pairs[::2], pairs[1::2], strict=True)))
    kept = min(requests, KEPT_REQUESTS)
    deadlines: Sequence[float] = (math.inf,) * kept
    if flags & DATED:
        deadlines = _times(kept).unpack_from(data, at)
        at += 8 * kept
    rows: Sequence[int] = (1,) * kept
    if flags & ROWS:
        rows = _words(kept).unpack_from(data, at)
        at += 4 * kept
    ids = list(_ids(data, at)) or [""] * kept
    each = [RequestInFlight(*of) for of in zip(arrivals[:kept], rows, deadlines, ids, strict=True)]
    return BatchInFlight(model, closed, instance, requests, answered, matrices, taken, run, ended, done, each)


def _ids(data: bytes, at: int) -> Iterator[str]:
    """The ids in the fields that begin at `at`, up to the end."""
    while at < len(data):
        length = shift = 0
        at += 1
        while data[at] & 0x80:
            length |= (data[at] & 0x7F) << shift
            at, shift = at + 1, shift + 7
        length |= data[at] << shift
        at += 1
        cut = "…" if length >= KEPT_ID else ""
        yield data[at : at + min(length, KEPT_ID)].decode("utf-8", "replace") + cut
        at += length
