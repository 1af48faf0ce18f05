"""The last errors: bounded, merged where they repeat, and without values."""

from __future__ import annotations

from forwardpass.errors import Reason
from forwardpass.observability.recent_errors import KEPT, LONGEST, MERGE_SECONDS, RecentErrors


class Ring:
    """Recent errors, with a clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.errors = RecentErrors(lambda: self.now)

    def told(self) -> list[tuple[str, str, int]]:
        return [(e.reason, e.text, e.times) for e in self.errors.list()]


def test_errors_of_one_kind_at_once_share_an_entry() -> None:
    ring = Ring()
    ring.errors.add("RESOURCE_EXHAUSTED", Reason.QUEUE_ROWS, "64 rows wait", 10)
    ring.errors.add("INVALID_ARGUMENT", Reason.INVALID, "no x")
    ring.now += MERGE_SECONDS
    ring.errors.add("RESOURCE_EXHAUSTED", Reason.QUEUE_ROWS, "65 rows wait", 3)
    assert ring.told() == [("invalid", "no x", 1), ("queue_rows", "65 rows wait", 13)]
    ring.now += 1.01 * MERGE_SECONDS
    ring.errors.add("RESOURCE_EXHAUSTED", Reason.QUEUE_ROWS, "66 rows wait")
    assert ring.told()[1:] == [("queue_rows", "65 rows wait", 13), ("queue_rows", "66 rows wait", 1)]
    assert [e.at for e in ring.errors.list()] == [1000.0, 1001.0, ring.now]


def test_a_flood_does_not_wash_out_the_rest() -> None:
    ring = Ring()
    ring.errors.add("INTERNAL", Reason.RUN_FAILED, "the run failed")
    for number in range(10_000):
        ring.now += 0.01
        ring.errors.add("RESOURCE_EXHAUSTED", Reason.QUEUE_ROWS, f"{number} rows wait")
    assert ring.told() == [("run_failed", "the run failed", 1), ("queue_rows", "9999 rows wait", 10_000)]
    for number in range(3 * KEPT):
        ring.now += 2 * MERGE_SECONDS
        ring.errors.add("INTERNAL", Reason.ERROR, str(number))
    assert len(ring.told()) == KEPT and ring.told()[-1] == ("error", str(3 * KEPT - 1), 1)


def test_texts_are_short_printable_and_quote_no_values() -> None:
    ring = Ring()
    ring.errors.add("INVALID_ARGUMENT", Reason.INVALID, "\x1b[31m" + "x" * 10_000)
    ring.errors.add(
        "INVALID_ARGUMENT", Reason.TOO_LARGE, "the network cannot be run on these values: indices element idx=4711 out"
    )
    first, second = ring.told()
    assert first[1].startswith("\\x1b[31m") and len(first[1]) <= LONGEST + 10
    assert second[1] == "the network cannot be run on these values; the client has the details"
