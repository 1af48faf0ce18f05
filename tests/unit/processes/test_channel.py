"""Calls between two processes, here between two ends in one: answers, errors, and an end that goes away."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import pytest

from forwardpass.errors import Draining, ForwardpassError, Overloaded, Reason, UnknownModel
from forwardpass.processes.channel import Channel


@contextlib.asynccontextmanager
async def ends(functions: Mapping[str, Callable[..., Any]]) -> AsyncIterator[tuple[Channel, Channel]]:
    """Two ends, of which the second has `functions`."""
    one, other = socket.socketpair()
    first, second = Channel(one, {}), Channel(other, functions)
    await first.open()
    await second.open()
    try:
        yield first, second
    finally:
        first.close()
        second.close()
        await asyncio.sleep(0)


def test_functions_and_coroutines_are_called_side_by_side() -> None:
    async def check() -> None:
        go = asyncio.Event()

        async def slow(x: int) -> int:
            await go.wait()
            return x

        async with ends({"slow": slow, "add": lambda a, b: a + b, "go": go.set}) as (first, _):
            waiting = asyncio.ensure_future(first.call("slow", 7))
            assert await first.call("add", b"x" * 5_000_000, b"y") == b"x" * 5_000_000 + b"y"
            first.tell("go")
            assert await waiting == 7
            assert await asyncio.to_thread(first.call_from_thread, "add", 1, 2) == 3

    asyncio.run(check())


def test_errors_come_through_with_all_they_carry() -> None:
    def refuse() -> None:
        raise Overloaded("full", reason=Reason.MODEL_CONTROL, retry_after=2.0)

    def miss() -> None:
        raise UnknownModel("there is none")

    def fail() -> None:
        raise ZeroDivisionError("of ours")

    async def check() -> None:
        async with ends({"refuse": refuse, "miss": miss, "fail": fail}) as (first, _):
            with pytest.raises(Overloaded, match="full") as error:
                await first.call("refuse")
            assert (error.value.reason, error.value.retry_after) == (Reason.MODEL_CONTROL, 2.0)
            with pytest.raises(UnknownModel):
                await first.call("miss")
            with pytest.raises(ForwardpassError, match="fail failed: of ours"):
                await first.call("fail")

    asyncio.run(check())


def test_whoever_waits_hears_that_the_other_is_gone() -> None:
    async def forever() -> None:
        await asyncio.Event().wait()

    async def check() -> None:
        async with ends({"forever": forever}) as (first, second):
            waiting = asyncio.ensure_future(first.call("forever"))
            await asyncio.sleep(0.01)
            second.close()
            with pytest.raises(Draining):
                await waiting
            await first.ended.wait()
            with pytest.raises(Draining):
                await first.call("forever")
            first.tell("forever")  # nobody is there to hear it, and that is no error

    asyncio.run(check())
