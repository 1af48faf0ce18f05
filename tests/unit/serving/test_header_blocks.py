"""Header blocks against the library hpack: whatever its encoder writes is read as it was meant, table and all."""

from __future__ import annotations

from typing import Any

import hpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forwardpass.serving.header_blocks import OVERSIZED, Head, HeaderDecoder, HeaderError

CALL = [
    (b":method", b"POST"),
    (b":scheme", b"http"),
    (b":path", b"/inference.GRPCInferenceService/ModelInfer"),
    (b":authority", b"localhost:8001"),
    (b"te", b"trailers"),
    (b"content-type", b"application/grpc"),
    (b"user-agent", b"tester/1"),
    (b"grpc-accept-encoding", b"identity, gzip"),
]

texts = st.binary(max_size=40)
names = st.one_of(st.sampled_from([name for name, _ in CALL]), st.from_regex(rb"\A[a-z][a-z0-9-]{0,20}\Z"))
fields = st.lists(st.tuples(names, texts, st.sampled_from(["table", "no table", "never"])), max_size=12)


def block(encoder: hpack.Encoder, fields: Any, huffman: bool = True) -> bytes:
    written: bytes = encoder.encode(fields, huffman)
    return written


def decoded(decoder: HeaderDecoder, data: bytes) -> list[tuple[bytes, bytes]]:
    return decoder._fields(data)[0]


@given(st.lists(st.tuples(fields, st.booleans(), st.sampled_from([None, 0, 100, 4096])), max_size=8))
def test_what_hpack_writes_is_read_block_after_block(blocks: Any) -> None:
    """Over one connection: entries that come and go, and tables that shrink and grow, keep both sides in step."""
    encoder, decoder = hpack.Encoder(), HeaderDecoder(1 << 20)
    for listed, huffman, size in blocks:
        if size is not None:
            encoder.header_table_size = size
        wanted = [(name, value) for name, value, _ in listed]
        told = [
            hpack.NeverIndexedHeaderTuple(name, value) if how == "never" else hpack.HeaderTuple(name, value)
            for name, value, how in listed
        ]
        assert decoded(decoder, block(encoder, told, huffman)) == wanted


@given(st.lists(st.binary(max_size=60), max_size=4))
def test_bytes_that_are_no_block_are_refused_or_read_and_nothing_else(blocks: list[bytes]) -> None:
    """As hpack itself judges them, but for limits that differ."""
    ours, theirs = HeaderDecoder(1 << 20), hpack.Decoder(1 << 20)
    for data in blocks:
        try:
            found = decoded(ours, data)
        except HeaderError:
            return
        try:
            expected = [(bytes(name), bytes(value)) for name, value in theirs.decode(data, raw=True)]
        except hpack.HPACKError:
            return
        assert found == expected


def test_a_block_that_changes_nothing_is_walked_once() -> None:
    """The same head, the very same object, until the table is another one."""
    encoder, decoder = hpack.Encoder(), HeaderDecoder(16384)
    first = decoder.head(block(encoder, CALL))
    again = block(encoder, CALL)
    second, third = decoder.head(again), decoder.head(again)
    assert second is third and second.path == first.path
    decoder.head(block(encoder, [*CALL, (b"x-new", b"1")]))  # the table has one entry more: every index means another
    moved = decoder.head(block(encoder, CALL))
    assert moved is not third and moved.path == third.path and moved.metadata == third.metadata


def test_what_a_head_says() -> None:
    head = Head(
        [*CALL, (b"grpc-timeout", b"20m"), (b"grpc-encoding", b"gzip"), (b"x-a", b"1"), (b"x-b-bin", b"AAE,/w==")]
    )
    assert head.path == b"/inference.GRPCInferenceService/ModelInfer" and head.sound
    assert head.timeout == pytest.approx(0.02) and head.encoding == b"gzip" and not head.timings
    assert head.metadata == (("user-agent", "tester/1"), ("x-a", "1"), ("x-b-bin", b"\0\1"), ("x-b-bin", b"\xff"))
    assert Head([*CALL, (b"forwardpass-timings", b"1")]).timings
    assert not Head([*CALL, (b"forwardpass-timings", b"0")]).timings


@pytest.mark.parametrize(
    ("text", "seconds"),
    [(b"1H", 3600.0), (b"2M", 120.0), (b"3S", 3.0), (b"40m", 0.04), (b"99999999n", 0.099999999), (b"5u", 5e-6)],
)
def test_a_timeout(text: bytes, seconds: float) -> None:
    head = Head([*CALL, (b"grpc-timeout", text)])
    assert head.sound and head.timeout == pytest.approx(seconds)


@pytest.mark.parametrize("text", [b"", b"m", b"20", b"20x", b"-1m", b"123456789m", b"1.5S", "٣m".encode()])
def test_a_timeout_that_is_none(text: bytes) -> None:
    head = Head([*CALL, (b"grpc-timeout", text)])
    assert not head.sound and head.timeout is None and "grpc-timeout: expected" in head.problem


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
    assert Head(fields).http_status == status


def test_a_block_that_says_much_is_not_remembered() -> None:
    """It may be a few bytes long and say thousands, and there is room for hundreds of blocks."""
    encoder, decoder = hpack.Encoder(), HeaderDecoder(1 << 20)
    large = [*CALL, (b"a-bin", b"," * 3000)]
    decoder.head(block(encoder, large))
    again = block(encoder, large)
    assert len(again) < 20
    first, second = decoder.head(again), decoder.head(again)
    assert first is not second and len(first.metadata) < 20


def test_more_metadata_than_may_be_keeps_the_table_in_step() -> None:
    """It is refused, and the next call is read as it was meant."""
    encoder, decoder = hpack.Encoder(), HeaderDecoder(1000)
    large = [*CALL, (b"x-large", b"v" * 900), (b"x-after", b"1")]
    assert decoder.head(block(encoder, large)) is OVERSIZED
    assert decoder.head(block(encoder, [*CALL, (b"x-after", b"1")])).metadata[-1] == ("x-after", "1")


@pytest.mark.parametrize(
    "data",
    [
        b"\x80",  # index 0
        b"\xff\x80\x80\x80\x80\x80\x01",  # an index beyond all use
        b"\xbf",  # an entry that was never made
        b"\x00\x05ab",  # a name that ends too early
        b"\x00\x01a\x85\xff\xff\xff\xff\xff",  # not the Huffman code
        b"\x3f\xe2\x1f",  # a table of more than 4,096 bytes
        b"\x88\x20",  # a table's size behind a field
        b"\x40",
    ],
)
def test_a_block_that_is_none(data: bytes) -> None:
    with pytest.raises(HeaderError):
        HeaderDecoder(16384).head(data)
