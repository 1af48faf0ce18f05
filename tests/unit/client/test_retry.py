"""Which failures are tried again, after which pause, and never beyond the deadline."""

from __future__ import annotations

import pytest

from forwardpass.client.errors import CallError, ResourceExhausted, Unavailable
from forwardpass.client.retry import LONGEST, LONGEST_ASKED, Retrying
from forwardpass.errors import Status

FULL = ResourceExhausted("full", retry_after=0.2)
LOADING = Unavailable("loading", retry_after=0.5)


def retrying(attempts: int = 4, full: bool = False, chance: float = 0.0) -> Retrying:
    return Retrying(attempts, full, lambda: chance)


@pytest.mark.parametrize("cls", CallError.__subclasses__(), ids=lambda cls: cls.__name__)
def test_unavailable_alone_is_tried_again(cls: type[CallError]) -> None:
    assert (retrying().pause(cls("why"), 1, None) is not None) is (cls.status is Status.UNAVAILABLE)
    assert (retrying(full=True).pause(cls("why"), 1, None) is not None) is (cls.status is Status.UNAVAILABLE)


def test_a_full_server_is_asked_again_by_those_who_said_so_and_were_told_when() -> None:
    assert retrying().pause(FULL, 1, None) is None
    assert retrying(full=True).pause(FULL, 1, None) == 0.2
    assert retrying(full=True).pause(ResourceExhausted("the message is too large"), 1, None) is None


def test_pauses_grow_to_a_bound_and_are_shortened_by_chance() -> None:
    error = Unavailable("gone")
    assert [retrying(attempts=10).pause(error, n, None) for n in range(1, 6)] == pytest.approx(
        [0.05, 0.15, 0.45, LONGEST, LONGEST]
    )
    assert retrying(chance=0.999).pause(error, 1, None) == pytest.approx(0.025, rel=0.01)


def test_the_server_says_how_long_and_nobody_comes_before() -> None:
    assert retrying().pause(LOADING, 1, None) == 0.5
    assert retrying(chance=0.999).pause(LOADING, 3, None) == pytest.approx(0.55, rel=0.01)
    assert retrying().pause(Unavailable("see you tomorrow", retry_after=LONGEST_ASKED + 1), 1, None) is None


def test_attempts_are_counted_in_all() -> None:
    assert [retrying(attempts=3).pause(LOADING, n, None) is not None for n in (1, 2, 3)] == [True, True, False]
    assert retrying(attempts=1).pause(LOADING, 1, None) is None


def test_no_pause_reaches_beyond_the_deadline() -> None:
    assert retrying().pause(LOADING, 1, 0.6) == 0.5
    assert retrying().pause(LOADING, 1, 0.5) is None
    assert retrying().pause(Unavailable("gone"), 1, 0.01) is None
    assert retrying().pause(Unavailable("gone"), 1, -1.0) is None
