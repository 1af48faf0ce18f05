"""What is drawn and printed: that the picture of a graph is sound, and numbers are written as they are meant."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from tests.unit.insight.made import chain, odd
from tests.unit.insight.test_separability import accuracy

from forwardpass.console import tables
from forwardpass.insight import graph_svg
from forwardpass.insight.batch_sizes import parse
from forwardpass.insight.represent import _page
from forwardpass.model import onnx_graph

SVG = "{http://www.w3.org/2000/svg}"


def draw(found: onnx_graph.Graph, title: str = "a network") -> ElementTree.Element:
    ran = [graph_svg.ExecutedStep(node.op, (node.name,), "1 µs, 10%") for node in found.nodes]
    return ElementTree.fromstring(graph_svg.svg(found, title, ran, {node.name: 5 for node in found.nodes}))


def words(picture: ElementTree.Element) -> list[str]:
    return [text.text or "" for text in picture.iter(f"{SVG}text")]


@pytest.mark.parametrize("model", [chain(4, 8, 3), chain(4, *[30] * 12, 3), odd()], ids=["short", "long", "branched"])
def test_everything_is_inside_the_picture(model: object) -> None:
    picture = draw(onnx_graph.build(model, 4))  # type: ignore[arg-type]
    height = float(picture.attrib["height"])
    assert picture.attrib["width"] == "800"
    for circle in picture.iter(f"{SVG}circle"):
        assert 6 <= float(circle.attrib["cx"]) <= 794
        assert 50 <= float(circle.attrib["cy"]) <= height - 6
    for path in picture.iter(f"{SVG}path"):
        assert all(0 <= float(x) <= 800 for x in re.findall(r"[ML](\d+) ", path.attrib["d"]))
    assert all(float(text.attrib["y"]) < height for text in picture.iter(f"{SVG}text"))


def test_tensors_operators_and_times_are_named() -> None:
    shown = words(draw(onnx_graph.build(chain(4, 8, 3), 6), "<a> & b"))
    assert shown[0] == "<a> & b"
    assert {"x", "z1", "a1", "z2", "[6,4]", "[6,8]", "[6,3]", "Gemm", "Relu", "1 µs, 10%", "5 stored"} <= set(shown)


def test_a_unit_for_every_place_where_there_is_room() -> None:
    small = draw(onnx_graph.build(chain(4, 10, 3), 1))
    assert len([c for c in small.iter(f"{SVG}circle") if c.attrib["r"] == "6"]) == 4 + 10 + 10 + 3
    # Of 256, nine and a gap of three small dots.
    large = draw(onnx_graph.build(chain(4, 256, 3), 1))
    assert len([c for c in large.iter(f"{SVG}circle") if c.attrib["r"] == "6"]) == 4 + 9 + 9 + 3
    assert len([c for c in large.iter(f"{SVG}circle") if c.attrib["r"] == "1.6"]) == 3 + 3


def test_a_long_network_goes_on_below() -> None:
    assert float(draw(onnx_graph.build(chain(4, 8, 3), 1)).attrib["height"]) < 450
    assert float(draw(onnx_graph.build(chain(4, *[8] * 5, 3), 1)).attrib["height"]) > 700


def test_dark_and_light_are_both_provided_for() -> None:
    style = draw(onnx_graph.build(chain(4, 8, 3), 1)).find(f"{SVG}style")
    assert style is not None and "prefers-color-scheme: dark" in (style.text or "")


def test_the_page_stands_alone_and_names_every_row(tmp_path: Path) -> None:
    classes = np.array([0, 1, 1])
    page = _page("a <model>", [accuracy("x", 0.5), accuracy("z1", 0.75)], classes, ["no", "yes & more"])
    assert "a &lt;model&gt;" in page and "yes &amp; more" in page
    assert page.count("<circle") == 6 and page.count("<title>row 2: yes &amp; more</title>") == 2
    assert not re.findall(r"(?:src|href)=|https?://", page)


@pytest.mark.parametrize(
    ("number", "written"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (12_345, "12.3 kB"),
        (999_990, "1 MB"),
        (4.56e9, "4.56 GB"),
        (0.00078, "780 µB"),
        (3.2e-9, "3.2 nB"),
        (138e12, "138 TB"),
    ],
)
def test_numbers_with_prefixes(number: float, written: str) -> None:
    assert tables.si(number, "B") == written


def test_columns_line_up() -> None:
    text = tables.table(["name", "µs"], [["a", "1.5"], ["longer", "10"]], left=(0,))
    assert text.splitlines() == ["name     µs", "a       1.5", "longer   10"]


def test_batch_sizes() -> None:
    assert parse("64,1, 8,8") == (1, 8, 64)
    for wrong in ("", "0", "-1,4", "many"):
        with pytest.raises(Exception, match="expected numbers of rows from 1"):
            parse(wrong)
