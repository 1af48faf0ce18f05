"""Connections go to whoever has the fewest, and moving them makes counts even."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from forwardpass.processes.spread import excess, least_loaded

COUNTS = st.dictionaries(st.integers(0, 20), st.integers(0, 100), min_size=1, max_size=16)


@given(COUNTS)
def test_one_after_the_other_they_become_even(counts: dict[int, int]) -> None:
    needed = max(counts.values()) * len(counts) - sum(counts.values())
    for _ in range(needed):
        chosen = least_loaded(counts, counts)
        assert chosen is not None
        counts[chosen] += 1
    assert len(set(counts.values())) == 1


def test_ties_go_to_the_one_with_the_fewest_in_all_then_to_the_first() -> None:
    assert least_loaded({"a": 1, "b": 1}, {"a": 5, "b": 2}) == "b"
    assert least_loaded({"a": 1, "b": 1}, {"a": 2, "b": 2}) == "a"
    assert least_loaded({}, {}) is None


@given(COUNTS)
def test_what_is_given_away_is_what_evenness_takes(counts: dict[int, int]) -> None:
    given_away = excess(counts)
    if max(counts.values()) - min(counts.values()) < 2:
        assert given_away == {}
        return
    after = {process: count - given_away.get(process, 0) for process, count in counts.items()}
    for _ in range(sum(given_away.values())):  # their clients connect anew
        chosen = least_loaded(after, after)
        assert chosen is not None
        after[chosen] += 1
    assert max(after.values()) - min(after.values()) <= 1
    assert all(count > 0 for count in given_away.values())
    assert excess(after) == {}
