"""The lines of fields in protobuf's text format, however it is written."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forwardpass.model.pbtxt_lines import TextNode, read_lines


def lines(nodes: list[TextNode]) -> list[int]:
    return [node.line for node in nodes]


def test_fields_lists_and_messages_are_found() -> None:
    root = read_lines(
        """# name: "not this"
name: "a"   # nor { this
list: [ 1,
  2 ] other: [] message {
  inner < deep: 'x' "y"
    deep: 7 >
}
message: { inner: [ { deep: -1.5e3 }, {
  deep: FLAG; } ] }"""
    )
    assert lines(root.children["name"]) == [2] and root.children["name"][0].value == "a"
    assert lines(root.children["list"]) == [3, 4]
    assert root.children["other"] == []
    assert lines(root.children["message"]) == [4, 8]
    first, second = root.children["message"]
    assert lines(first.children["inner"]) == [5]
    assert lines(first.children["inner"][0].children["deep"]) == [5, 6]
    assert [n.children["deep"][0].line for n in second.children["inner"]] == [8, 9]
    assert [n.children["deep"][0].value for n in second.children["inner"]] == ["-1.5e3", "FLAG"]


def test_marks_within_quotes_are_text() -> None:
    root = read_lines("""a: "{ [ \\" ] }" b { c: '}' }\nd: 1""")
    assert lines(root.children["d"]) == [2]
    assert root.children["b"][0].children["c"][0].value == "}"


def test_entries_of_a_map_are_found_by_their_key() -> None:
    root = read_lines('m { key: "a" value: 1 }\nm { key: "b" value: 2 }\nm: [ { key: 3 } ]')
    assert (root.child("m", "b"), root.child("m", "3")) == (root.children["m"][1], root.children["m"][2])
    assert root.child("m", "c") is None and root.child("m", 5) is None and root.child("n") is None


@given(st.text(alphabet="ab:{}<>[],;\"'\\#\n 1-"))
@pytest.mark.parametrize("nothing", [None])
def test_nothing_makes_it_fail(nothing: None, text: str) -> None:
    root = read_lines(text)
    assert all(1 <= node.line <= text.count("\n") + 1 for nodes in root.children.values() for node in nodes)
