"""An agreement on what a reload may serve: nobody serves before all have voted or ended."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from forwardpass.processes.group_models import Agreement


def run(votes: dict[int, dict[str, str]], dropped: tuple[int, ...] = ()) -> list[Mapping[str, str]]:
    """What each voter learns, in the order of the votes."""

    async def agree() -> list[Mapping[str, str]]:
        agreement = Agreement([*votes, *dropped])
        waiting = []
        for process, failed in votes.items():
            assert not any(task.done() for task in waiting)
            waiting.append(asyncio.ensure_future(agreement.vote(process, failed)))
            await asyncio.sleep(0.001)
        for process in dropped:
            assert not any(task.done() for task in waiting)
            agreement.drop(process)
        return await asyncio.gather(*waiting)

    return asyncio.run(agree())


def test_all_serve_once_all_have_loaded() -> None:
    assert run({1: {}, 2: {}, 3: {}}) == [{}, {}, {}]


def test_what_one_cannot_load_none_serves() -> None:
    failed = {"2": "its file is broken", "3": "no memory"}
    assert run({1: {}, 2: {"2": "its file is broken"}, 3: {"3": "no memory"}}) == [failed] * 3


def test_nobody_waits_for_a_process_that_ended() -> None:
    assert run({1: {}, 2: {}}, dropped=(3, 4)) == [{}, {}]


def test_a_process_that_takes_no_part_is_not_held_up() -> None:
    async def ask() -> Mapping[str, str]:
        return await Agreement([1, 2]).vote(3, {"1": "of its own"})

    assert asyncio.run(ask()) == {}
