"""Timings as trailing metadata: what one end writes the other reads, and what is missing is None."""

from __future__ import annotations

from forwardpass.protocol.timings import Timings, read_timings, write_timings


def test_what_is_written_is_read() -> None:
    trailing = write_timings(queue=0.0000124, run=1.5, total=1.6, rows=7)
    assert read_timings(trailing) == Timings(queue_us=12, run_us=1_500_000, total_us=1_600_000, batch_rows=7)


def test_what_a_server_does_not_say_is_none() -> None:
    assert read_timings([("elsewhere", "x")]) == Timings(None, None, None, None)
    assert read_timings([("forwardpass-run-us", "34.5")]) == Timings(None, 34.5, None, None)
