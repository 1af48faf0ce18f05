"""The first end is made up for at once; a process that keeps ending is started ever more seldom."""

from __future__ import annotations

from forwardpass.processes.restarts import LONGEST_WAIT, SETTLED_SECONDS, RestartPolicy


def test_waits_grow_while_it_keeps_ending() -> None:
    policy = RestartPolicy()
    waits = [policy.ended(0.0) for _ in range(12)]
    assert waits[:6] == [0.0, 0.5, 1.0, 2.0, 4.0, 8.0]
    assert waits[-1] == LONGEST_WAIT
    assert waits == sorted(waits)


def test_one_that_served_for_long_is_no_loop() -> None:
    policy = RestartPolicy()
    for _ in range(5):
        policy.ended(1.0)
    assert policy.ended(SETTLED_SECONDS) == 0.0
    assert policy.ended(1.0) > 0.0


def test_thousands_of_ends_are_no_overflow() -> None:
    policy = RestartPolicy()
    assert {policy.ended(0.0) for _ in range(5000)} >= {LONGEST_WAIT}
