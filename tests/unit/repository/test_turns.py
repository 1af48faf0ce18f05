"""Changes of one model take turns, those of others go on."""

from __future__ import annotations

import threading

from forwardpass.repository.turns import Turns


def test_one_name_has_one_turn_at_a_time_and_others_do_not_wait() -> None:
    turns = Turns()
    began, ended = threading.Event(), threading.Event()
    order: list[str] = []

    def second() -> None:
        began.set()
        with turns.of("a"):
            order.append("second")
        ended.set()

    with turns.of("a"):
        thread = threading.Thread(target=second)
        thread.start()
        assert began.wait(10)
        with turns.of("b"), turns.of("a"):  # again, by the thread that has it
            order.append("first")
        assert not ended.is_set()
    thread.join(10)
    assert order == ["first", "second"]
    assert not turns._used  # nothing is kept of names that are not in use


def test_a_turn_ends_with_an_error_too() -> None:
    turns = Turns()
    for _ in range(2):
        try:
            with turns.of("a"):
                raise ValueError
        except ValueError:
            pass
    assert not turns._used
