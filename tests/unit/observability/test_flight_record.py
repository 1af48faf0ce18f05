"""A batch as the flight recorder packs it: what is unpacked is what was packed, up to what is bounded."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace

import pytest

from forwardpass.observability.flight_record import (
    KEPT_ID,
    KEPT_REQUESTS,
    RECEIVER,
    BatchInFlight,
    RequestInFlight,
    Times,
    pack,
    pack_single,
    unpack,
)
from forwardpass.protocol.wire import varint

TIMES = (10.5, 0.25, 10.875, 11.0)  # taken, run, ended, done


def single(
    model: int, closed: int, answered: int, times: Times, its: tuple[float, float, int], id_field: bytes
) -> bytes:
    taken, run, ended, done = times
    arrival, deadline, rows = its
    request = SimpleNamespace(arrival=arrival, deadline=deadline, rows=rows, id_field=id_field)
    return pack_single(model, closed, request, ended, ((), (), taken, run, done, answered))


def field(text: str) -> bytes:
    """An id as its field in a ModelInferRequest."""
    data = text.encode()
    return b"\x1a" + varint(len(data)) + data if data else b""


@pytest.mark.parametrize("seed", range(50))
def test_what_is_unpacked_is_what_was_packed(seed: int) -> None:
    rng = random.Random(seed)
    count = rng.choice((1, 2, 7, 63, 64, 65, 300))
    groups = []
    while sum(n for _, n in groups) < count:
        groups.append((rng.random() * 1e6, rng.randint(1, count - sum(n for _, n in groups))))
    kept = min(count, KEPT_REQUESTS)
    ids = [rng.choice(("", "a", "ü€😀", "x" * rng.choice((1, 63)))) for _ in range(kept)]
    rows = rng.choice((None, [rng.randint(1, 1 << 20) for _ in range(kept)]))
    deadlines = rng.choice((None, [rng.choice((math.inf, rng.random() * 1e6)) for _ in range(kept)]))
    matrices = [rng.randint(0, 4096) for _ in range(rng.choice((0, 1, 1, 5, 2 * count)))]
    packed = pack(
        3, 5, 2, TIMES, matrices=matrices, requests=count, answered=count - 1, groups=groups, deadlines=deadlines,
        rows=rows, id_fields=[field(i) for i in ids],
    )  # fmt: skip
    arrivals = [arrival for arrival, n in groups for _ in range(n)][:kept]
    each = [
        RequestInFlight(a, rows[i] if rows else 1, deadlines[i] if deadlines else math.inf, ids[i])
        for i, a in enumerate(arrivals)
    ]
    assert unpack(packed) == BatchInFlight(3, 5, 2, count, count - 1, tuple(matrices), *TIMES, each)


@pytest.mark.parametrize("text", ["", "one", "x" * 300])
def test_a_single_request(text: str) -> None:
    found = unpack(single(1, 6, 0, TIMES, (9.5, 12.0, 4), field(text)))
    seen = text if len(text) < KEPT_ID else "x" * KEPT_ID + "…"
    assert found == BatchInFlight(1, 6, RECEIVER, 1, 0, (4,), *TIMES, [RequestInFlight(9.5, 4, 12.0, seen)])


def test_long_ids_are_cut_and_the_record_stays_small() -> None:
    ids = [field("ä" * 100_000), b"", field("short"), *[field("y" * 5000)] * 61]
    packed = pack(
        0, 0, 0, TIMES, matrices=[64], requests=64, answered=64, groups=[(1.0, 64)], deadlines=None, rows=None,
        id_fields=ids,
    )  # fmt: skip
    assert len(packed) < 100 + KEPT_REQUESTS * (KEPT_ID + 3)
    names = [request.request_id for request in unpack(packed).each]
    assert names == ["ä" * (KEPT_ID // 2) + "…", "", "short", *["y" * KEPT_ID + "…"] * 61]
