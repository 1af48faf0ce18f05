"""Who goes when memory is short, and when a failed load is tried again: whatever the sizes, the order, the times."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forwardpass.errors import ModelUnusable
from forwardpass.repository.memory_policy import FIRST_PAUSE, LONGEST_PAUSE, BackOff, ModelMemory, Use

NAMES = tuple("abcdefgh")
STATES = st.sampled_from(("idle", "busy", "fresh", "loading"))
STEPS = st.lists(
    st.tuples(st.sampled_from(NAMES), st.integers(0, 120), st.dictionaries(st.sampled_from(NAMES), STATES)), max_size=40
)


@given(limit=st.integers(1, 100), steps=STEPS)
def test_the_limit_holds_and_only_the_oldest_idle_ones_go(limit: int, steps: list) -> None:  # type: ignore[type-arg]
    memory = ModelMemory(limit)
    sizes: dict[str, int] = {}  # what must be counted, kept here by other means
    last: dict[str, float] = {}
    for now, (name, nbytes, states) in enumerate(steps):
        last[name] = float(now)
        uses = {
            other: Use(last[other], states.get(other) == "busy", states.get(other) == "fresh")
            for other in sizes
            if states.get(other) != "loading"
        }
        before = dict(sizes)
        plan = memory.plan(name, nbytes, uses)
        may_go = {o for o, use in uses.items() if o != name and not use.busy and not use.fresh}
        rest = sum(size for other, size in sizes.items() if other != name)
        if not plan.fits:
            assert not plan.victims and memory.names == before.keys() and memory.total == sum(before.values())
            assert plan.never == (nbytes > limit)
            assert plan.never or nbytes + rest - sum(sizes[o] for o in may_go) > limit
            assert plan.never or plan.taken == rest - sum(sizes[o] for o in may_go)
            continue
        victims = set(plan.victims)
        assert victims <= may_go
        for victim in plan.victims:
            del sizes[victim]
        sizes[name] = nbytes
        assert memory.total == sum(sizes.values()) <= limit and memory.names == sizes.keys()
        # Nobody that stays, and takes something, was used before somebody who goes.
        stay = [last[o] for o in may_go - victims if before[o]]
        assert not victims or not stay or max(last[v] for v in victims) < min(stay)
        # Without the last of them it would not have fitted.
        assert not victims or memory.total + before[plan.victims[-1]] > limit


def test_without_a_limit_nobody_goes() -> None:
    memory = ModelMemory(0)
    assert all(memory.plan(name, 1 << 50, {}).fits for name in NAMES)
    assert memory.total == len(NAMES) << 50


def test_failures_are_tried_again_after_pauses_that_double_to_a_bound() -> None:
    back_off, now = BackOff(), 100.0
    pauses = []
    for number in range(10):
        error = ModelUnusable(f"failure {number}")
        pauses.append(back_off.failed("m", error, now))
        assert back_off.error("m", now) is error and back_off.error("m", now + pauses[-1] - 1e-3) is error
        now += pauses[-1]
        assert back_off.error("m", now) is None and "m" in back_off
    assert pauses == [min(LONGEST_PAUSE, FIRST_PAUSE * 2**i) for i in range(10)]
    assert back_off.failed("m", ModelUnusable("busy"), now, grows=False) == FIRST_PAUSE
    back_off.worked("m")
    assert back_off.error("m", now) is None and "m" not in back_off
    assert back_off.failed("m", ModelUnusable("again"), now) == FIRST_PAUSE


@pytest.mark.parametrize("state", ["busy", "fresh"])
def test_a_model_that_is_needed_stays_and_the_figures_say_so(state: str) -> None:
    memory = ModelMemory(10)
    assert memory.plan("a", 6, {}).fits
    plan = memory.plan("b", 6, {"a": Use(0.0, state == "busy", state == "fresh")})
    assert (plan.fits, plan.never, plan.taken, plan.victims) == (False, False, 6, ())
    assert memory.plan("b", 6, {"a": Use(0.0, False)}).victims == ("a",)
