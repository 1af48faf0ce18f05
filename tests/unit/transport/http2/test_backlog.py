"""Calls that waited unread: how long is too long, and that the engine's rejections lose and confuse nothing."""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.service import http2_frames as http2
from tests.unit.transport.http2.test_connection import PATH, Peer

from forwardpass.transport.http2 import arrivals as module
from forwardpass.transport.http2.arrivals import PROMPT, Arrivals
from forwardpass.transport.http2.backlog import LEAST, Patience, is_late, rejections
from forwardpass.transport.http2.peer import Peer as Client

LATE = 10.0  # seconds, longer than any call here may wait
REFUSED = (7).to_bytes(4, "big")


@pytest.mark.parametrize("timeout", [1e-3, 20e-3, 50e-3, 1.0])
def test_what_is_left_decides(timeout: float) -> None:
    assert not is_late(timeout, 0.0) and not is_late(timeout / 2, timeout / 2)
    assert is_late(0.0, timeout) and is_late(-1.0, timeout)
    least = next(left for left in (timeout * i / 1000 for i in range(1001)) if not is_late(left, timeout - left))
    assert least == pytest.approx(min(timeout / 4, 20e-3), rel=0.05)


def test_a_connection_is_as_patient_as_its_most_patient_call() -> None:
    patience = Patience(2.0)
    assert patience.seconds == pytest.approx(1.975)  # nothing is known of it
    patience.note(0.04)
    assert patience.seconds == pytest.approx(0.025)
    patience.note(10.0)
    patience.note(0.04)
    assert patience.seconds == pytest.approx(9.975)
    patience.roll()
    patience.note(0.04)
    assert patience.seconds == pytest.approx(9.975)
    for _ in range(3):
        patience.roll()  # without calls it does not forget
    assert patience.seconds == pytest.approx(0.025)
    patience.note(1e-4)
    patience.roll()
    assert patience.seconds == LEAST


def clients(count: int) -> list[Any]:
    made: list[Any] = [Client.__new__(Client) for _ in range(count)]
    for client in made:
        client.unprocessed, client.held, client.arrivals = 0, False, deque()
    return made


def test_bytes_are_as_old_as_the_poll_before_they_came() -> None:
    (client,) = clients(1)
    arrivals = Arrivals(0.0)
    arrivals.polled(1.0, 1.0)
    arrivals.polled(1.5, 2.0)  # it waited: what it found has just come
    arrivals.add(client, b"aa")
    arrivals.polled(3.0, 3.0 + PROMPT / 2)  # it was there already
    arrivals.add(client, b"b")
    assert client.unprocessed == 3
    first = arrivals.take()
    assert first == (client, b"aa", 2.0)
    arrivals.hold(*first)
    assert not arrivals and client.unprocessed == 3
    arrivals.add(client, b"c")
    assert not arrivals
    arrivals.resume(client)
    assert [arrivals.take()[1:] for _ in range(3)] == [(b"aa", 2.0), (b"b", 2.0), (b"c", 2.0)]
    assert not arrivals and client.unprocessed == 0


def test_clients_take_turns() -> None:
    first, second, third = clients(3)
    arrivals = Arrivals(0.0)
    for data in b"abc":
        arrivals.add(first, bytes([data]))
    arrivals.add(second, b"x")
    arrivals.add(third, b"y")
    arrivals.add(third, b"")
    arrivals.forget(second)
    taken = []
    while arrivals:
        taken.append(arrivals.take()[1])
    assert taken == [b"a", b"y", b"b", b"", b"c"]


def test_what_is_kept_is_bounded_and_all_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST", 10)
    monkeypatch.setattr(module, "MOST_OF_ALL", 15)
    first, second, third = clients(3)
    arrivals = Arrivals(0.0)
    arrivals.add(first, bytes(9))
    assert arrivals.has_room(first)
    arrivals.add(first, bytes(1))
    assert not arrivals.has_room(first) and arrivals.has_room(second)
    arrivals.add(second, bytes(5))
    assert not arrivals.has_room(second) and arrivals.has_room(third)
    arrivals.hold(*arrivals.take())  # still kept
    assert not arrivals.has_room(second)
    arrivals.forget(first)
    assert arrivals.has_room(second) and arrivals._nbytes == 5


def refused(peer: Peer) -> list[int]:
    """The calls that were rejected; nothing else was sent about any."""
    found = []
    for kind, _, stream, payload in peer.frames.take():
        assert kind in (http2.RST_STREAM, http2.WINDOW_UPDATE), "the client heard of a setting"
        if kind == http2.RST_STREAM:
            assert payload == REFUSED
            found.append(stream)
    return found


@settings(max_examples=150)
@given(
    sizes=st.lists(st.integers(0, 3000), min_size=1, max_size=20),
    cuts=st.lists(st.tuples(st.integers(1, 4000), st.booleans()), min_size=1, max_size=12),
)
def test_a_call_arrives_whole_or_is_rejected(sizes: list[int], cuts: list[tuple[int, bool]]) -> None:
    """However the bytes are cut, and whichever pieces come too late. Each call's headers refer to those of others."""
    peer = Peer(max_streams=1000)
    messages = {2 * i + 1: bytes([i]) * size for i, size in enumerate(sizes)}
    data = b"".join(
        peer.headers(n, PATH, (b"x-number", str(n).encode()))
        + http2.frame(http2.DATA, 1, n, http2.MESSAGE_STRUCT.pack(0, len(message)) + message)
        for n, message in messages.items()
    )
    position = 0
    while data:
        size, late = cuts[position % len(cuts)]
        peer.connection.receive(data[:size], LATE if late else 0.0)
        data, position = data[size:], position + 1
    arrived = {stream.number: (message, stream) for stream, message in peer.connection.arrived}
    gone = refused(peer)
    assert sorted([*arrived, *gone]) == list(messages) and peer.connection.shed == len(gone)
    for number, (message, stream) in arrived.items():
        assert message == messages[number] and stream.head.field(b"x-number") == str(number).encode()
    assert not set(gone) & set(peer.connection.streams)
    if all(late for _, late in cuts):
        assert not arrived
    if not any(late for _, late in cuts):
        assert not gone
    # As before for what follows.
    peer.connection.receive(peer.call(9999, b"after"))
    assert [message for _, message in peer.connection.arrived[len(arrived) :]] == [b"after"]
    assert peer.connection.out.share.nbytes == 0


def test_calls_under_way_go_on() -> None:
    """What is rejected is new calls: a message that has begun ends, and a cancelled call is cancelled."""
    peer = Peer()
    body = http2.MESSAGE_STRUCT.pack(0, 6) + b"abcdef"
    peer.connection.receive(peer.headers(1) + http2.frame(http2.DATA, 0, 1, body[:7]) + peer.headers(3))
    peer.connection.receive(http2.frame(http2.DATA, 1, 1, body[7:]) + http2.reset(3, 8) + peer.call(5, b"new"), LATE)
    assert [(stream.number, message) for stream, message in peer.connection.arrived] == [(1, b"abcdef")]
    assert [stream.number for stream in peer.connection.cancelled] == [3]
    assert refused(peer) == [5] and peer.connection.shed == 1


def test_a_client_that_reads_nothing_is_not_shed() -> None:
    """Its rejections would only pile up; its calls are looked at one by one."""
    peer = Peer()
    peer.frames.full = True
    peer.connection.receive(http2.frame(http2.PING, 0, 0, bytes(8)))
    peer.connection.receive(peer.call(1, b"m"), LATE)
    assert len(peer.connection.arrived) == 1 and not peer.connection.shed


def test_overload_for_minutes_leaves_the_connection_as_it_was() -> None:
    peer = Peer(max_streams=1000)
    for first in range(1, 200_000, 1000):
        peer.connection.receive(b"".join(peer.call(n, b"m") for n in range(first, first + 1000, 2)), LATE)
        assert len(refused(peer)) == 500
    assert peer.connection.shed == 100_000 and not peer.connection.closed
    peer.connection.receive(peer.call(200_001, b"m"))
    assert len(peer.connection.arrived) == 1


def test_rejections_are_counted_among_other_frames() -> None:
    reset = http2.reset(1, 7)
    data = (
        http2.frame(http2.DATA, 0, 3, reset * 3) + reset + http2.reset(5, 8) + http2.frame(http2.PING, 1, 0, bytes(8))
    )
    assert rejections(data) == 1 and rejections(b"") == 0
