"""Who shares a request and when it is sent: the policy driven by hand, and then by chance, with a clock that stands."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from forwardpass.client.arrays import TensorInfo
from forwardpass.client.coalescer import (
    ALONE,
    SEND,
    WAIT,
    WATCH,
    Coalesce,
    CoalescedBatch,
    Coalescer,
    Group,
    GroupKey,
    Rows,
    may_share,
)
from forwardpass.client.errors import CallError, Cancelled, Internal
from forwardpass.client.results import ModelInfo

FOUR = GroupKey("m", "", None, 0, (4,), np.dtype(np.float32), 5)


class Bell:
    """Keeps whom it was rung for."""

    def __init__(self) -> None:
        self.rung: list[Sequence[Rows]] = []

    def ring(self, settled: Sequence[Rows]) -> None:
        self.rung.append(settled)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def coalescer(**options: Any) -> Coalescer:
    return Coalescer(Coalesce(**options), Clock(), Bell)


def rows(value: float = 0.0, count: int = 1, deadline: float = math.inf) -> Rows:
    return Rows(np.full((count, 4), value, np.float32), count, deadline)


def crowded(policy: Coalescer) -> Group:
    """A group in which everybody gathers, and one request is under way."""
    group = policy.group(FOUR)
    group.crowd = 64.0
    assert policy.offer(group, rows()) is SEND
    assert policy.take(group) is not None
    return group


def values(batch: CoalescedBatch | None) -> list[float]:
    assert batch is not None
    return [float(np.frombuffer(each.data, np.float32)[0]) for each in batch.rows]


def test_who_is_alone_goes_alone() -> None:
    policy = coalescer(in_flight=2)
    group = policy.group(FOUR)
    for _ in range(10):
        mine = rows()
        assert policy.offer(group, mine) is ALONE
        assert isinstance(mine.data, np.ndarray), "copied for nothing"
        assert not policy.ended(group)
    assert policy.offer(group, rows()) is ALONE
    assert policy.offer(group, rows()) is ALONE
    assert policy.offer(group, rows()) is WAIT
    assert (policy.rows, policy.requests) == (0, 0)


def test_what_waits_goes_together_when_one_who_was_alone_is_back() -> None:
    policy = coalescer(in_flight=1)
    group = policy.group(FOUR)
    assert policy.offer(group, rows()) is ALONE
    assert [policy.offer(group, rows(i)) for i in range(3)] == [WAIT] * 3
    assert policy.ended(group)
    assert values(policy.take(group)) == [0, 1, 2]
    assert not policy.ended(group)
    assert (policy.rows, policy.requests) == (3, 1)


def test_a_crowd_gathers_even_when_nothing_is_under_way() -> None:
    # The first of sixty who come back at the same time must not run off alone.
    policy = coalescer()
    group = crowded(policy)
    assert not policy.ended(group)
    assert policy.offer(group, rows(0)) is SEND
    assert [policy.offer(group, rows(i)) for i in range(1, 60)] == [WAIT] * 59
    assert len(values(policy.take(group))) == 60


def test_a_crowd_that_has_gone_is_forgotten() -> None:
    policy = coalescer()
    group = crowded(policy)
    policy.ended(group)
    for _ in range(10):
        turn = policy.offer(group, rows())
        if turn is ALONE:
            return
        policy.take(group)
        policy.ended(group)
    raise AssertionError("somebody who was alone ten times is still sent by a sender")


def test_rows_wait_for_a_request_under_way_but_not_for_long() -> None:
    policy = coalescer(in_flight=2, max_wait=0.5)
    group = crowded(policy)
    first = rows(1)
    assert policy.offer(group, first) is WATCH
    assert policy.offer(group, rows(2)) is WAIT
    assert policy.overdue(group, first)
    assert policy.offer(group, rows(3)) is WAIT
    assert values(policy.take(group)) == [1, 2, 3]
    # There is no room for a third request: what waits then waits for an end.
    second = rows(4)
    assert policy.offer(group, second) is WAIT
    assert not policy.overdue(group, second)
    assert policy.ended(group)
    assert values(policy.take(group)) == [4]


def test_one_who_watches_and_is_late_starts_nothing() -> None:
    policy = coalescer()
    group = crowded(policy)
    first = rows()
    assert policy.offer(group, first) is WATCH
    assert policy.ended(group)
    assert not policy.overdue(group, first), "a sender comes already"
    policy.take(group)
    assert not policy.overdue(group, first), "its rows are on their way"


def test_without_a_wait_requests_go_side_by_side() -> None:
    policy = coalescer(in_flight=3, max_wait=0.0)
    group = crowded(policy)
    for value in (1, 2):
        assert policy.offer(group, rows(value)) is SEND
        assert values(policy.take(group)) == [value]
    assert policy.offer(group, rows(3)) is WAIT


def test_a_full_request_waits_for_nobody() -> None:
    policy = coalescer(max_rows=8)
    group = crowded(policy)
    assert policy.offer(group, rows(1, count=3)) is WATCH
    assert policy.offer(group, rows(2, count=4)) is WAIT
    assert policy.offer(group, rows(3, count=2)) is SEND
    batch = policy.take(group)
    assert values(batch) == [1, 2]
    assert batch is not None and batch.more, "there is room beside it for what did not fit"
    assert values(policy.take(group)) == [3]


def test_a_request_is_bounded_in_bytes() -> None:
    policy = coalescer(max_bytes=64, in_flight=1)  # four rows of four floats
    group = policy.group(FOUR)
    assert policy.offer(group, rows()) is ALONE
    for value in range(6):
        policy.offer(group, rows(value))
    assert policy.ended(group)
    batch = policy.take(group)
    assert values(batch) == [0, 1, 2, 3] and batch is not None and not batch.more
    assert policy.ended(group)
    assert values(policy.take(group)) == [4, 5]


def test_rows_are_copied_when_they_wait() -> None:
    policy = coalescer(in_flight=1)
    for dtype in (np.float32, object):
        group = policy.group(FOUR._replace(dtype=np.dtype(dtype)))
        assert policy.offer(group, rows()) is ALONE
        array = np.ones(4, dtype)
        mine = Rows(array, 1, math.inf)
        assert policy.offer(group, mine) is WAIT
        array[:] = 9
        held = np.frombuffer(mine.data, dtype) if isinstance(mine.data, bytes) else mine.data
        assert held.tolist() == [1, 1, 1, 1]


def test_who_is_late_or_gone_is_not_sent() -> None:
    policy = coalescer(in_flight=1)
    group = policy.group(FOUR)
    policy.offer(group, rows())
    late, gone, good = rows(1, deadline=5.0), rows(2), rows(3, deadline=20.0)
    for each in (late, gone, good):
        policy.offer(group, each)
    assert policy.gone(gone)
    policy._clock.now = 10.0  # type: ignore[attr-defined]
    assert policy.ended(group)
    assert values(policy.take(group)) == [3]
    assert not policy.ended(group)
    # Nobody is left: the sender finds nothing and holds no place any more.
    policy.offer(group, rows())
    last = rows()
    policy.offer(group, last)
    policy.gone(last)
    assert policy.ended(group) and policy.take(group) is None
    assert group.sending == 0


def test_everybody_gets_their_own_rows_by_one_ring() -> None:
    policy = coalescer(in_flight=1)
    group = policy.group(FOUR)
    policy.offer(group, rows())
    callers = [rows(count=1 + i % 3) for i in range(5)]
    for each in callers:
        policy.offer(group, each)
    policy.ended(group)
    batch = policy.take(group)
    assert batch is not None
    answer = np.arange(9)
    policy.settle(batch.rows, answer)
    assert [answer[each.place : each.place + each.count].tolist() for each in callers] == [
        [0], [1, 2], [3, 4, 5], [6], [7, 8],
    ]  # fmt: skip
    (bell,) = {each.bell for each in callers}
    assert bell.rung == [callers]
    assert not policy.gone(callers[0]), "it has its answer"


def test_an_error_reaches_those_who_have_nothing_yet() -> None:
    policy = coalescer(in_flight=1)
    group = policy.group(FOUR)
    policy.offer(group, rows())
    callers = [rows() for _ in range(4)]
    for each in callers:
        policy.offer(group, each)
    policy.ended(group)
    batch = policy.take(group)
    assert batch is not None
    together = callers[0].bell
    first, second = policy.apart(batch.rows, 2)
    assert together.rung == [()], "they wait for other bells now, and must look"
    policy.settle(first, np.arange(2))
    policy.gone(callers[3])
    error = Internal("why")
    policy.fail(batch.rows, error)
    assert [each.outcome is error for each in callers] == [False, False, True, False]
    assert second[0].bell.rung == [[callers[2]]]
    assert first[0].bell.rung == [first]


def test_closing_fails_what_waits_and_refuses_what_comes() -> None:
    policy = coalescer(in_flight=1)
    group = policy.group(FOUR)
    policy.offer(group, rows())
    waiting = rows()
    policy.offer(group, waiting)
    policy.close()
    assert isinstance(waiting.outcome, Cancelled)
    with pytest.raises(ValueError, match="the client is closed"):
        policy.offer(group, rows())
    assert not policy.ended(group)


def test_groups_that_nobody_uses_are_dropped() -> None:
    policy = coalescer()
    busy = policy.group(FOUR)
    policy.offer(busy, rows())
    for width in range(3000):
        policy.group(FOUR._replace(tail=(width,)))
    assert len(policy._groups) <= 1024
    assert policy.group(FOUR) is busy
    policy.drop(busy)
    assert policy.group(FOUR) is not busy and not busy.shares


@pytest.mark.parametrize(
    ("option", "value"), [("max_rows", 1), ("in_flight", 0), ("max_bytes", 0), ("max_wait", -1), ("max_wait", math.nan)]
)
def test_options_that_make_no_sense_are_refused(option: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{option}: expected at least"):
        Coalesce(**{option: value})  # type: ignore[arg-type]


def test_only_models_whose_rows_are_independent_are_shared() -> None:
    tensor = TensorInfo("x", "FP32", (-1, 4))

    def info(inputs: tuple[TensorInfo, ...], **parameters: Any) -> ModelInfo:
        return ModelInfo("m", ("1",), "", inputs, (), parameters)

    assert may_share(info((tensor,), max_batch_size=8), 1)
    assert not may_share(info((tensor,), max_batch_size=0), 1)
    assert not may_share(info((tensor,), max_batch_size="many"), 1)
    assert not may_share(info((tensor,)), 1), "a server that does not tell"
    assert not may_share(info((tensor, tensor), max_batch_size=8), 1)
    assert not may_share(info((tensor,), max_batch_size=8), 2)


class Callers(RuleBasedStateMachine):
    """Callers, senders and a clock in any order; what is promised holds after each step.

    Does what the drivers do: a sender that is to be started is started sooner or later, and takes, and ends.
    """

    callers: Bundle[Rows] = Bundle("callers")
    requests: Bundle[tuple[Group, list[Rows]]] = Bundle("requests")

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.policy = Coalescer(Coalesce(max_rows=4, in_flight=2, max_wait=1.0), self.clock, Bell)
        self.groups = [self.policy.group(FOUR), self.policy.group(FOUR._replace(priority=1))]
        self.to_start: list[Group] = []
        self.alone: list[Group] = []
        self.under_way: list[tuple[Group, list[Rows]]] = []
        self.waiting: dict[Rows, Group] = {}
        self.watching: dict[Rows, Group] = {}
        self.order: dict[Rows, int] = {}

    @rule(group=st.sampled_from([0, 1]), count=st.integers(1, 3), wait=st.sampled_from([2.0, 5.0, math.inf]))
    def come(self, group: int, count: int, wait: float) -> None:
        found = self.groups[group]
        mine = rows(count=count, deadline=self.clock.now + wait)
        turn = self.policy.offer(found, mine)
        if turn is ALONE:
            self.alone.append(found)
            return
        self.order[mine] = len(self.order)
        self.waiting[mine] = found
        if turn is WATCH:
            self.watching[mine] = found
        if turn is SEND:
            self.to_start.append(found)

    @rule(seconds=st.sampled_from([0.5, 1.0, 3.0]))
    def time_passes(self, seconds: float) -> None:
        self.clock.now += seconds
        for mine, group in list(self.watching.items()):
            del self.watching[mine]
            if self.policy.overdue(group, mine):
                self.to_start.append(group)
        for mine in [each for each in self.waiting if each.deadline <= self.clock.now]:
            self.leave(mine)

    @rule(data=st.data())
    def somebody_leaves(self, data: st.DataObject) -> None:
        if self.waiting:
            self.leave(data.draw(st.sampled_from(list(self.waiting))))

    def leave(self, mine: Rows) -> None:
        group = self.waiting.pop(mine)
        assert self.policy.gone(mine)
        if self.watching.pop(mine, None) is not None and self.policy.overdue(group, mine):
            self.to_start.append(group)

    @rule(data=st.data())
    def a_sender_starts(self, data: st.DataObject) -> None:
        if self.to_start:
            group = data.draw(st.sampled_from(self.to_start))
            self.to_start.remove(group)
            self.take(group)

    def take(self, group: Group) -> None:
        batch = self.policy.take(group)
        if batch is None:
            return
        assert sum(each.count for each in batch.rows) <= 4
        assert all(self.waiting[each] is group for each in batch.rows)
        order = [self.order[each] for each in batch.rows]
        ahead = [self.order[each] for each, where in self.waiting.items() if where is group and each not in batch.rows]
        taken = {each for _, rest in self.under_way for each in rest}
        ahead = [place for place in ahead if not any(self.order[each] == place for each in taken)]
        assert order == sorted(order) and not any(place < order[-1] for place in ahead)
        if batch.more:
            self.to_start.append(group)
        self.under_way.append((group, batch.rows))

    @rule(data=st.data(), outcome=st.sampled_from(["answer", "error"]))
    def a_request_ends(self, data: st.DataObject, outcome: str) -> None:
        if not self.under_way:
            return
        group, batch = self.under_way.pop(data.draw(st.integers(0, len(self.under_way) - 1)))
        assert all(each.outcome is None for each in batch)
        if outcome == "answer":
            self.policy.settle(batch, np.arange(sum(each.count for each in batch)))
        else:
            self.policy.fail(batch, Internal("why"))
        for each in batch:
            if not each.gone:
                assert isinstance(each.outcome, CallError if outcome == "error" else np.ndarray)
                assert sum(each in settled for settled in each.bell.rung) == 1
            self.waiting.pop(each, None)
            self.watching.pop(each, None)
        if self.policy.ended(group):
            self.take(group)

    @rule(data=st.data())
    def somebody_alone_is_back(self, data: st.DataObject) -> None:
        if self.alone:
            group = self.alone.pop(data.draw(st.integers(0, len(self.alone) - 1)))
            if self.policy.ended(group):
                self.to_start.append(group)

    @invariant()
    def no_more_are_under_way_than_may_be(self) -> None:
        for group in self.groups:
            held = sum(where is group for where, _ in self.under_way) + self.alone.count(group)
            assert held + self.to_start.count(group) == group.sending <= 2

    @invariant()
    def nobody_waits_for_a_sender_that_never_comes(self) -> None:
        taken = {each for _, batch in self.under_way for each in batch}
        for mine, group in self.waiting.items():
            if mine not in taken:
                assert group.sending == 2 or group in self.to_start or any(
                    where is group for where in self.watching.values()
                ) or mine.deadline <= self.clock.now, "room for a request, and nobody to start it"  # fmt: skip


Callers.TestCase.settings = settings(max_examples=200, stateful_step_count=40)
TestCallers = Callers.TestCase
