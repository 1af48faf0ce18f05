"""HPACK without a table: what we write and what we read, against the examples of RFC 7541."""

from __future__ import annotations

import pytest

from forwardpass.loadtest.generator import headers
from forwardpass.loadtest.generator.headers import HeaderError, Reader, Text


@pytest.mark.parametrize(
    ("text", "code"),
    [("www.example.com", "f1e3c2e5f23a6ba0ab90f4ff"), ("302", "6402"), ("private", "aec3771a4b"), ("307", "640eff")],
)
def test_huffman_is_that_of_the_standard(text: str, code: str) -> None:
    assert headers.huffman(text).hex() == code
    assert Text(bytes.fromhex(code), True).read() == text


def test_an_unreadable_symbol_ends_a_text() -> None:
    assert Text(headers.huffman("ab") + b"\xff\xff\xff", True).read().startswith("a")


def test_a_refusal_is_read_whether_plain_or_coded() -> None:
    plain = b"\x88\x00\x0bgrpc-status\x018\x00\x0cgrpc-message\x09a%20b%3Ac"
    said = Reader().read(plain)
    assert (said.http, said.grpc) == (200, 8)
    assert said.message is not None and said.message.read() == "a b:c"
    name, value = headers.huffman("grpc-status"), headers.huffman("14")
    coded = b"\x40" + bytes([0x80 | len(name)]) + name + bytes([0x80 | len(value)]) + value
    assert Reader().read(coded) == (None, 14, None)


def test_a_change_of_the_table_size_and_other_headers_are_passed_over() -> None:
    # size 0, :status 200, content-type by its static name, grpc-status 0
    block = b"\x20\x88\x5f\x10application/grpc\x0f\x10\x03abc\x00\x0bgrpc-status\x010"
    assert Reader().read(block) == (200, 0, None)


@pytest.mark.parametrize("block", [b"\xbe", b"\x00\x05ab", b"\x40", b"\x00\x0bgrpc-status\x01x"])
def test_what_is_no_block_is_an_error(block: bytes) -> None:
    with pytest.raises(HeaderError):
        Reader().read(block)


def test_a_deadline_always_takes_nine_characters() -> None:
    assert {len(headers.timeout_text(us)) for us in (-5, 0, 1, 50_000, 10**12)} == {9}
    assert headers.timeout_text(50_000) == "00050000u"
    assert headers.request_block("/s/m", "h:1", 50_000).endswith(b"00050000u")


def test_long_values_carry_their_length() -> None:
    block = headers.request_block("/s/m", "a" * 300, None)
    assert b"\x7f\xad\x01" + b"a" * 300 in block  # 300 = 127 + 173
