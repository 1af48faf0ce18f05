"""Links of documents rewritten for other places, and diagrams that have a drawing of what they are now."""

from __future__ import annotations

import pytest
from tests.publish.publish_modules import ROOT, in_a_clone, load

links = load("links")
diagrams = load("diagrams")

HOST = links.on_a_host("https://host/owner/name/", "v1")
NOWHERE = links.on_a_host("", "v1")


@pytest.mark.parametrize(
    ("text", "with_host", "without"),
    [
        ("see [it](other.md#part).", "see [it](https://host/owner/name/blob/v1/docs/other.md#part).", "see it."),
        ("[up](../tests/x.py)", "[up](https://host/owner/name/blob/v1/tests/x.py)", "up"),
        ("[root](..)", "[root](https://host/owner/name)", "root"),
        ("![seen](images/x.png)", "![seen](https://host/owner/name/raw/v1/docs/images/x.png)", ""),
        ("[a [b] c](x.md)", "[a [b] c](https://host/owner/name/blob/v1/docs/x.md)", "a [b] c"),
        ("[here](#part)", "[here](#part)", "[here](#part)"),
        ("[far](https://else/where.md)", "[far](https://else/where.md)", "[far](https://else/where.md)"),
        (
            "`[code](x.md)` [a](b.md)",
            "`[code](x.md)` [a](https://host/owner/name/blob/v1/docs/b.md)",
            "`[code](x.md)` a",
        ),
        ("```\n[code](x.md)\n```\n", "```\n[code](x.md)\n```\n", "```\n[code](x.md)\n```\n"),
    ],
)
def test_links(text: str, with_host: str, without: str) -> None:
    assert links.mapped(text, "docs/page.md", HOST) == with_host
    assert links.mapped(text, "docs/page.md", NOWHERE) == without


def test_a_picture_keeps_its_sources_or_goes() -> None:
    picture = '<picture>\n<source media="m" srcset="i/dark.png">\n<img alt="It" src="i/light.png">\n</picture>\n'
    raw = "https://host/owner/name/raw/v1/i"
    there = links.mapped(picture, "README.md", HOST)
    assert there == picture.replace("i/dark.png", f"{raw}/dark.png").replace("i/light.png", f"{raw}/light.png")
    assert links.mapped(picture, "README.md", NOWHERE).strip() == ""


def test_a_link_out_of_the_repository_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"\.\./\.\./x\.md leads out of the repository"):
        links.mapped("[x](../../x.md)", "docs/page.md", HOST)


@in_a_clone
def test_every_diagram_has_its_drawing_and_no_other_is_kept() -> None:
    sources = diagrams.sources()
    assert sources, "the documents have no diagram any more: remove the drawings and their script"
    for name, source in sources.items():
        assert diagrams.drawing(source).stem == name, "run `make diagrams`"
    assert {path.stem for path in diagrams.FOLDER.glob("*.svg")} == sources.keys(), "run `make diagrams`"


def test_a_changed_diagram_is_noticed() -> None:
    source = next(iter(diagrams.sources().values()))
    with pytest.raises(diagrams.Stale, match="make diagrams"):
        diagrams.drawing(source + "    more --> arrows\n")


def test_drawings_load_nothing() -> None:
    for path in (ROOT / "docs" / "images" / "diagrams").glob("*.svg"):
        text = path.read_text("utf-8").replace("http://www.w3.org/", "")
        assert "http:" not in text and "https:" not in text and "<script" not in text, path
