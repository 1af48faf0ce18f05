"""Locates each field of a protobuf text file, for error messages and for editing a field in place.

Protobuf parses the values. The file has been parsed before, so its structure is valid; unexpected text is skipped
without an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

_TOKEN = re.compile(
    r"""(?P<skip>\s+|\#[^\n]*)|(?P<quoted>"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*')|(?P<word>[-+]?[\w.][\w.+-]*)|(?P<mark>.)""",
    re.VERBOSE | re.DOTALL,
)
_OPEN = {"{": "}", "<": ">"}
_MARKS = frozenset("{}<>[]:,;")


@dataclass(slots=True)
class TextNode:
    """One field: the line of its name (counted from 1), its value if it is a scalar, and its subfields.

    Its text is `[start:end]`; for an entry of a list, only the entry's. `inner`: where the text in its braces begins,
    if it has braces.
    """

    line: int
    value: str = ""
    children: dict[str, list[TextNode]] = field(default_factory=dict)
    start: int = 0
    end: int = 0
    inner: int = 0

    def child(self, name: str, place: int | str = 0) -> TextNode | None:
        """The `place`-th field of a name, or the map entry whose key is `place`; None if there is none."""
        found = self.children.get(name, [])
        if isinstance(place, str):
            keyed = (n for n in found if (key := n.child("key")) is not None and key.value == place)
            return next(keyed, None)
        return found[place] if place < len(found) else None


class _Token(NamedTuple):
    text: str
    line: int
    quoted: bool
    start: int
    end: int


def read_lines(text: str) -> TextNode:
    """Parse every field of a text-format message, by name, in the order of the file."""
    root = TextNode(1)
    _fields(list(_tokens(text)), 0, root, "")
    return root


def _tokens(text: str) -> Iterator[_Token]:
    line = 1
    for match in _TOKEN.finditer(text):
        if match.lastgroup != "skip":
            quoted = match.lastgroup == "quoted"
            text_of = match.group()[1:-1] if quoted else match.group()
            yield _Token(text_of, line, quoted, match.start(), match.end())
        line += match.group().count("\n")


def _fields(tokens: list[_Token], at: int, into: TextNode, end: str) -> int:
    """Read fields until `end`. Returns the index of the token after it."""

    def here(mark: str) -> bool:
        return at < len(tokens) and tokens[at].text == mark and not tokens[at].quoted

    while at < len(tokens):
        name = tokens[at]
        if here(end):
            return at + 1
        at += 1
        if name.quoted or name.text in _MARKS:  # the rest of a string in several pieces, or punctuation
            continue
        if here(":"):
            at += 1
        found = into.children.setdefault(name.text, [])
        if not here("["):
            found.append(TextNode(name.line, start=name.start, end=name.end))
            at = _value(tokens, at, found[-1])
            continue
        at += 1
        while at < len(tokens) and not here("]"):
            if here(","):
                at += 1
                continue
            found.append(TextNode(tokens[at].line, start=tokens[at].start))
            at = _value(tokens, at, found[-1])
        at += 1
    return at


def _value(tokens: list[_Token], at: int, node: TextNode) -> int:
    if at >= len(tokens):
        return at
    token = tokens[at]
    node.inner = token.end
    if not token.quoted and token.text in _OPEN:
        at = _fields(tokens, at + 1, node, _OPEN[token.text])
    else:
        node.value = token.text
        at += 1
    node.end = tokens[min(at, len(tokens)) - 1].end
    return at
