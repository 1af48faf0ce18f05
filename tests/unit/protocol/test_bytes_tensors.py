"""BYTES elements as raw contents: what is packed comes back, and what is cut off is noticed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forwardpass.protocol.bytes_tensors import are_text, ends, pack, unpack


@given(st.lists(st.binary(max_size=300)))
def test_what_is_packed_comes_back(elements: list[bytes]) -> None:
    data = pack(elements)
    assert len(data) == sum(4 + len(element) for element in elements)
    assert unpack(data) == unpack(memoryview(data)) == elements


@given(st.integers(0, 3), st.integers(60, 70), st.integers(0, 70), st.binary(max_size=5))
def test_a_run_of_equal_lengths_with_one_that_differs(size: int, count: int, place: int, other: bytes) -> None:
    elements = [bytes([i]) * size for i in range(count)]
    assert unpack(pack(elements)) == elements
    elements.insert(place, other)
    assert unpack(pack(elements)) == elements
    assert len(ends(pack(elements), 10)) == 11  # no more are looked at than it takes to know


@given(st.lists(st.binary(max_size=5) | st.text(max_size=3).map(str.encode), max_size=80))
def test_text_is_told_element_by_element(elements: list[bytes]) -> None:
    def is_text(element: bytes) -> bool:
        try:
            element.decode()
        except UnicodeDecodeError:
            return False
        return True

    data = pack(elements)
    assert are_text(memoryview(data), ends(data, len(data))) == all(map(is_text, elements))


def test_a_character_that_reaches_from_one_element_into_the_next_is_no_text() -> None:
    data = pack(["é".encode()[:1], "é".encode()[1:]])
    assert not are_text(data, ends(data, 2))


def test_lengths_are_little_endian() -> None:
    assert pack([b"ab", b""]) == b"\x02\0\0\0ab\0\0\0\0"


@pytest.mark.parametrize("cut", range(1, 6))
def test_an_element_that_is_cut_off_is_refused(cut: int) -> None:
    missing = f"claims 2 bytes, {2 - cut} are left" if cut <= 2 else f"has {6 - cut} bytes of its 4-byte length"
    with pytest.raises(ValueError, match=f"^element 1 {missing}$"):
        unpack(pack([b"first", b"ab"])[:-cut])
