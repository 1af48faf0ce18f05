"""Layers drawn from the file alone: the same graph that onnx reads, and what is not drawn."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import onnx
import pytest
from onnx import helper
from tests.service import models

from forwardpass.errors import ModelError
from forwardpass.model import onnx_graph
from forwardpass.status import drawing

ROWS = 7


def same_shapes(path: Path) -> list[str]:
    """Check every shape that is drawn against onnx's own inference; returns the names of tensors without one."""
    ours, theirs = drawing.read_graph(path), onnx_graph.open_graph(path, ROWS)
    assert [n.name for n in ours.nodes if n.op != "Constant"] == [n.name for n in theirs.nodes]
    assert [n.layer for n in ours.nodes if n.op != "Constant"] == [n.layer for n in theirs.nodes]
    assert ours.labels == theirs.labels and ours.inputs == theirs.inputs and ours.fixed >= theirs.fixed
    unknown = []
    for node in theirs.nodes:
        for name in node.outputs:
            shape = ours.shapes.get(name)
            if shape is None:
                unknown.append(name)
            else:
                assert tuple(ROWS if size < 0 else size for size in shape) == theirs.shapes[name], name
    return unknown


def test_a_chain_is_drawn_with_its_sizes(tmp_path: Path) -> None:
    path = models.save(tmp_path, "m", models.chain((6, 20, 3))) / "model.onnx"
    assert same_shapes(path) == []
    picture = drawing.draw(path, "<m> & 1")
    root = ElementTree.fromstring(picture)
    texts = [element.text for element in root.iter() if element.text]
    assert "<m> & 1" in texts and root.get("aria-label") == "<m> & 1"
    assert [t for t in dict.fromkeys(texts) if t.startswith("[")] == ["[B,6]", "[B,20]", "[B,3]"]
    assert texts.count("Gemm") == 2 and "140 stored" in texts and "63 stored" in texts
    assert "what runs" not in picture  # nothing was run


def test_trained_networks_have_every_shape(digits_repository: Path, document_repository: Path) -> None:
    for path in (*digits_repository.glob("*/*/model.onnx"), *document_repository.glob("*/*/model.onnx")):
        assert same_shapes(path) == []


@pytest.mark.parametrize("make", [models.two_by_two, models.relu_any_width, models.quantised, models.table])
def test_other_networks_are_drawn_too(tmp_path: Path, make: object) -> None:
    path = models.save(tmp_path, "m", make()) / "model.onnx"  # type: ignore[operator]
    ElementTree.fromstring(drawing.draw(path, "m"))


def test_shapes_that_are_not_known_stay_so(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("NonZero", ["x"], ["places"]),
        helper.make_node("Cast", ["places"], ["y"], to=models.FLOAT),
    ]
    model = models.network(nodes, [("x", models.FLOAT, ["b", 2])], [("y", models.FLOAT, [2, "n"])])
    path = models.save(tmp_path, "m", model) / "model.onnx"
    assert drawing.read_graph(path).shapes.get("places") is None
    assert ">?<" in drawing.draw(path, "m")


def test_a_large_network_is_not_drawn_nor_is_what_is_none(tmp_path: Path) -> None:
    path = models.save(tmp_path, "large", models.chain([4] * 60)) / "model.onnx"
    with pytest.raises(ModelError, match=r"117 operators are too many .* `forwardpass trace`"):
        drawing.draw(path, "large")
    path.write_bytes(b"no network")
    with pytest.raises(ModelError, match="is not an ONNX file"):
        drawing.draw(path, "none")
    constant = models.network(
        [helper.make_node("Identity", ["c"], ["y"])],
        [("x", models.FLOAT, ["b", 2])],
        [("y", models.FLOAT, [2])],
        {"c": np.zeros(2, np.float32)},
    )
    with pytest.raises(ModelError, match="depends on no input"):
        drawing.draw(models.save(tmp_path, "fixed", constant) / "model.onnx", "fixed")


def test_no_weight_is_read(tmp_path: Path) -> None:
    path = models.save(tmp_path, "m", models.chain((400, 500, 3))) / "model.onnx"
    model = onnx.load(str(path))
    graph = drawing.read_graph(path)
    weight = graph.constants[model.graph.initializer[0].name]
    assert weight.shape == (500, 400) and weight.strides == (0, 0)
