"""The native door's receiving thread, fed with groups as its transport gives them when a client of many calls goes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pygrpc_native = pytest.importorskip("pygrpc_native", reason="the native door needs the package pygrpc-native")

from forwardpass.serving.admission import Admission  # noqa: E402 - after the check that it can be had
from forwardpass.serving.intake import Intake  # noqa: E402
from forwardpass.serving.metrics import ModelMetrics  # noqa: E402
from forwardpass.serving.native_front import CANCELLED_GROUPS, GROUP, NativeFront  # noqa: E402
from forwardpass.serving.repository import Repository  # noqa: E402
from forwardpass.serving.threads import Cores  # noqa: E402
from forwardpass.settings import Settings  # noqa: E402


class Feed:
    """In the transport's place: gives out groups, then says that it is closed; keeps what was answered."""

    def __init__(self, groups: Iterator[list[Any]]) -> None:
        self._groups = groups
        self.answered: list[int] = []

    def recv_batch_details(self, most: int, timeout: int | None = None) -> list[Any] | None:
        return next(self._groups, None)

    def respond(self, call: int, answer: bytes, *_: Any) -> bool:
        raise AssertionError(f"call {call} cannot have an answer, got {answer!r}")

    def fail(self, call: int, code: int, text: str, trailers: Any) -> bool:
        self.answered.append(call)
        return True


def test_no_call_is_lost_among_any_number_of_cancelled_ones(tmp_path: Path) -> None:
    admission = Admission(100, 1 << 20)
    repository = Repository(Settings(repository=tmp_path), Cores(1, ""), admission)
    front = NativeFront(
        "127.0.0.1:0", 1, 100, 1 << 14,
        lambda door: Intake(door, repository, admission, ModelMetrics("", ""), 1 << 20),
    )  # fmt: skip
    count = 2 * CANCELLED_GROUPS + 3
    cancelled = [(pygrpc_native.EVENT_CANCEL, 1_000_000 + i, 0, None, None, None) for i in range(GROUP - 1)]
    groups = [
        [*cancelled, (pygrpc_native.EVENT_CALL, i, 0, b"not a request", None, ((), "peer", None))] for i in range(count)
    ]
    real, feed = front._front, Feed(iter(groups))
    front._front = feed
    front._receive()
    real.close()
    assert feed.answered == list(range(count))
