"""Who gets how much of the memory for messages and answers."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from forwardpass.transport.memory_budget import Holding, MemoryBudget, Share


def test_a_connection_gets_what_is_free_for_the_others() -> None:
    budget = MemoryBudget(100)
    greedy, second, third = (Share(budget) for _ in range(3))
    while greedy.take(1):
        pass
    while second.take(1):
        pass
    assert (greedy.nbytes, second.nbytes) == (50, 25)
    assert third.take(25)  # one answer alone may have all that is left
    assert not Share(budget).take(1)
    greedy.add(-greedy.nbytes)
    assert budget.nbytes == 50 and second.take(12)


def test_one_answer_may_be_larger_than_the_bound_where_nothing_else_is_held() -> None:
    budget = MemoryBudget(100)
    assert Share(budget).take(1000)
    assert not Share(budget).take(1)


def test_one_message_alone_may_take_all_the_room() -> None:
    budget = MemoryBudget(100)
    share = Share(budget)
    share.add(90)
    assert not share.exceeded(alone=90) and share.exceeded(alone=40)
    share.add(20)
    assert share.exceeded(alone=110)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(-50, 150)), max_size=60))
def test_no_order_of_calls_exceeds_the_bound_or_loses_a_byte(steps: list[tuple[int, int]]) -> None:
    budget = MemoryBudget(100)
    shares = [Share(budget) for _ in range(4)]
    holdings: list[list[Holding]] = [[], [], [], []]
    for place, size in steps:
        if size >= 0:
            holding = Holding(shares[place])
            alone = not budget.nbytes
            if holding.resize(size):
                assert alone or not size or budget.nbytes <= 100
                holdings[place].append(holding)
        elif holdings[place]:
            holding = holdings[place].pop()
            assert holding.resize(-size) or budget.nbytes == sum(share.nbytes for share in shares)
            holding.release()
            assert holding.resize(10)  # which does nothing any more
        assert budget.nbytes == sum(share.nbytes for share in shares) >= 0
    for held in holdings:
        for holding in held:
            holding.release()
    assert budget.nbytes == 0
