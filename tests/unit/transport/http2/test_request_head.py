"""What a call's header fields say: its deadline, its encoding, its metadata, and whether it is gRPC at all."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forwardpass.transport.http2.request_head import RequestHead

CALL = (
    (b":method", b"POST"),
    (b":scheme", b"http"),
    (b":path", b"/inference.GRPCInferenceService/ModelInfer"),
    (b":authority", b"localhost:8001"),
    (b"te", b"trailers"),
    (b"content-type", b"application/grpc"),
    (b"user-agent", b"tester/1"),
    (b"grpc-accept-encoding", b"identity, gzip"),
)


def test_what_a_head_says() -> None:
    head = RequestHead(
        (*CALL, (b"grpc-timeout", b"20m"), (b"grpc-encoding", b"gzip"), (b"x-a", b"1"), (b"x-b-bin", b"AAE,/w=="))
    )
    assert head.path == b"/inference.GRPCInferenceService/ModelInfer" and not head.problem and not head.http_status
    assert head.timeout == pytest.approx(0.02) and head.encoding == b"gzip" and not head.timings
    assert head.metadata == (("user-agent", "tester/1"), ("x-a", "1"), ("x-b-bin", b"\0\1"), ("x-b-bin", b"\xff"))
    assert RequestHead((*CALL, (b"forwardpass-timings", b"1"))).timings
    assert not RequestHead((*CALL, (b"forwardpass-timings", b"0"))).timings


@pytest.mark.parametrize(
    ("text", "seconds"),
    [(b"1H", 3600.0), (b"2M", 120.0), (b"3S", 3.0), (b"40m", 0.04), (b"99999999n", 0.099999999), (b"5u", 5e-6)],
)
def test_a_timeout(text: bytes, seconds: float) -> None:
    head = RequestHead((*CALL, (b"grpc-timeout", text)))
    assert not head.problem and head.timeout == pytest.approx(seconds)


@pytest.mark.parametrize("text", [b"", b"m", b"20", b"20x", b"-1m", b"123456789m", b"1.5S", "٣m".encode()])
def test_a_timeout_that_is_none(text: bytes) -> None:
    head = RequestHead((*CALL, (b"grpc-timeout", text)))
    assert head.timeout is None and "grpc-timeout: expected" in head.problem


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ([(b":method", b"GET"), *CALL[1:]], 405),
        ([f for f in CALL if f[0] != b"content-type"], 415),
        ([*CALL[:5], (b"content-type", b"text/html")], 415),
        ([*CALL[:5], (b"content-type", b"application/grpc+proto")], 0),
        ([*CALL[:5], (b"content-type", b"application/grpc;x=1")], 0),
        ([*CALL[:5], (b"content-type", b"application/grpc-web")], 415),
    ],
)
def test_what_is_no_call_of_grpc(fields: Any, status: int) -> None:
    assert RequestHead(tuple(fields)).http_status == status


@given(st.lists(st.tuples(st.sampled_from([b"x-a", b"x-b", b"te"]), st.binary(max_size=40)), max_size=12))
def test_the_size_is_http2s(more: list[tuple[bytes, bytes]]) -> None:
    """Names, values and 32 bytes each, repeated ones included."""
    fields = (*CALL, *more)
    assert RequestHead(fields).nbytes == sum(len(name) + len(value) + 32 for name, value in fields)


def test_metadata_keeps_its_order_and_what_repeats() -> None:
    head = RequestHead((*CALL, (b"x-a", b"1"), (b"x-b", b"\xff"), (b"x-a", b"2")))
    assert head.metadata[1:] == (("x-a", "1"), ("x-b", "\ufffd"), ("x-a", "2"))
    assert head.field(b"user-agent") == b"tester/1" and head.field(b"x-none") == b""
