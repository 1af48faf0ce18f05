"""Links of the project's documents, rewritten for places that have a document without the repository around it.

The documents link to each other and to files as a code host follows links: relative to the file. The site and the
packages' description must rewrite them: to an address, or to plain text where there is none. Reads no file, so it does
not know whether a target exists.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable
from dataclasses import dataclass

# A target's new address; None: there is none, so that the text stays without a link, and an image is left out.
Place = Callable[["Target"], str | None]
# A link's text for a place, from the text it has.
Words = Callable[[str, "Target"], str]

_FENCE = re.compile(r"^ *(```|~~~).*?^ *\1 *$\n?", re.DOTALL | re.MULTILINE)
_MERMAID = re.compile(r"^```mermaid\n(.*?)^```$\n?", re.DOTALL | re.MULTILINE)
_CODE = r"`+[^`]*`+"
_TEXT = r"(?:[^\[\]]|\[[^\[\]]*\])*"
_LINK = re.compile(rf"({_CODE})|(!?)\[({_TEXT})\]\(([^()\s]+)\)")
_PICTURE = re.compile(r"<picture>.*?</picture>|<img\b[^>]*>", re.DOTALL)
_ATTRIBUTE = re.compile(r'\b(src|srcset|href)="([^"]+)"')


@dataclass(frozen=True, slots=True)
class Target:
    """What a link leads to: a path below the repository's root ("" for the root itself) and a heading in it."""

    path: str
    heading: str  # "#name", or ""
    image: bool


def mapped(text: str, document: str, place: Place, words_of: Words = lambda words, _: words) -> str:
    """`text`, Markdown of the file `document` (a path below the root), with its relative links as `place` has them.

    Code and addresses stay as they are, as do links within the document. Raises ValueError for a link that leaves the
    repository.
    """
    folder = posixpath.dirname(document)

    def target_of(link: str, image: bool) -> Target | None:
        if link.startswith(("#", "/")) or re.match(r"[a-z][a-z0-9+.-]*:", link):
            return None
        path, hash_, heading = link.partition("#")
        path = posixpath.normpath(posixpath.join(folder, path))
        if path == ".." or path.startswith("../"):
            raise ValueError(f"{link} leads out of the repository")
        return Target("" if path == "." else path, hash_ + heading, image)

    def link(match: re.Match[str]) -> str:
        code, image, words, address = match.groups()
        target = None if code else target_of(address, bool(image))
        if target is None:
            return str(match[0])
        words = words_of(words, target)
        found = place(target)
        if found is not None:
            return f"{image}[{words}]({found})"
        return "" if image else words

    def attribute(match: re.Match[str]) -> str:
        target = target_of(match[2], match[1] != "href")
        if target is None:
            return str(match[0])
        found = place(target)
        return "" if found is None else f'{match[1]}="{found}"'

    def picture(match: re.Match[str]) -> str:
        changed = _ATTRIBUTE.sub(attribute, match[0])
        return changed if "src=" in changed else ""

    def prose(part: str) -> str:
        return _LINK.sub(link, _PICTURE.sub(picture, part))

    result, end = [], 0
    for fence in _FENCE.finditer(text):
        result += [prose(text[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*result, prose(text[end:])])


def on_a_host(url: str, ref: str) -> Place:
    """Targets in the repository at `url`, as a code host shows them at the commit, branch or tag `ref`.

    The form is that of GitHub, which others redirect from. Without a `url` there are none.
    """

    def place(target: Target) -> str | None:
        if not url:
            return None
        kind = "raw" if target.image else "blob"
        path = "" if not target.path else f"/{kind}/{ref}/{target.path}"
        return f"{url.rstrip('/')}{path}{target.heading}"

    return place


def with_diagrams(text: str, drawing: Callable[[str], str]) -> str:
    """`text` with each of its mermaid blocks as `drawing` makes it of the block's source."""
    return _MERMAID.sub(lambda match: drawing(match[1]), text)
