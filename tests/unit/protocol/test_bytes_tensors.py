"""BYTES elements as raw contents: what is packed comes back, and what is cut off is noticed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forwardpass.protocol.bytes_tensors import pack, unpack


@given(st.lists(st.binary(max_size=300)))
def test_what_is_packed_comes_back(elements: list[bytes]) -> None:
    data = pack(elements)
    assert len(data) == sum(4 + len(element) for element in elements)
    assert list(unpack(data)) == elements
    assert [bytes(element) for element in unpack(memoryview(data))] == elements


def test_lengths_are_little_endian() -> None:
    assert pack([b"ab", b""]) == b"\x02\0\0\0ab\0\0\0\0"


@pytest.mark.parametrize("cut", range(1, 6))
def test_an_element_that_is_cut_off_is_refused_after_those_before_it(cut: int) -> None:
    rest = unpack(pack([b"first", b"ab"])[:-cut])
    assert next(rest) == b"first"
    missing = f"claims 2 bytes, {2 - cut} are left" if cut <= 2 else f"has {6 - cut} bytes of its 4-byte length"
    with pytest.raises(ValueError, match=f"^element 1 {missing}$"):
        next(rest)
