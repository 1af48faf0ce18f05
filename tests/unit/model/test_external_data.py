"""Weights beside an ONNX file: found wherever the file names them, opened only where they lie in the model's folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from tests.service.models import FLOAT, chain, network

from forwardpass.errors import ModelError
from forwardpass.model.external_data import check, locations


def outside(value: str, name: str = "w") -> TensorProto:
    """A tensor of one float whose bytes are said to be in the file `value`."""
    tensor = numpy_helper.from_array(np.zeros(1, np.float32), name)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="offset", value="0")
    tensor.external_data.add(key="location", value=value)
    return tensor


def apart(folder: Path, location: str = "weights.bin") -> Path:
    """A network of some size with its weights in a file of their own; the network's file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.onnx"
    onnx.save(chain((4, 64, 3)), str(path), save_as_external_data=True, location="weights.bin", size_threshold=0)
    if location != "weights.bin":
        model = onnx.load(str(path), load_external_data=False)
        for tensor in model.graph.initializer:
            next(e for e in tensor.external_data if e.key == "location").value = location
        path.write_bytes(model.SerializeToString())
    return path


def test_names_are_found_wherever_a_tensor_may_be(tmp_path: Path) -> None:
    inner = helper.make_graph([], "inner", [], [], [outside("in_a_branch")])
    constant = helper.make_node("Constant", [], ["c"], value=outside("in_a_constant"))
    branch = helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner)
    sparse = helper.make_sparse_tensor(outside("values"), outside("indices"), [3])
    several = helper.make_node("Odd", [], ["z"])
    several.attribute.append(helper.make_attribute("many", [outside("one"), outside("two")]))
    graph = helper.make_graph([constant, branch, several], "g", [], [], [outside("initial"), outside("initial", "v")])
    graph.sparse_initializer.append(sparse)
    model = helper.make_model(graph)
    model.functions.append(
        helper.make_function("d", "f", [], ["c"], [constant.__class__.FromString(constant.SerializeToString())], [])
    )
    model.functions[0].node[0].attribute[0].t.external_data[1].value = "in_a_function"
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    assert locations(path) == {
        "in_a_branch", "in_a_constant", "values", "indices", "one", "two", "initial", "in_a_function",
    }  # fmt: skip


def test_a_network_in_one_file_names_none(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(chain(), str(path))
    assert locations(path) == set()
    check(path, tmp_path)


def plain(model_folder: Path) -> Path:
    return apart(model_folder / "1")


def in_a_folder_below(model_folder: Path) -> Path:
    path = apart(model_folder / "1", "deep/weights.bin")
    (model_folder / "1" / "deep").mkdir()
    (model_folder / "1" / "weights.bin").rename(model_folder / "1" / "deep" / "weights.bin")
    return path


def as_kubernetes_mounts_folders(model_folder: Path) -> Path:
    apart(model_folder / "..2024" / "1")
    (model_folder / "..data").symlink_to("..2024")
    (model_folder / "1").symlink_to("..data/1")
    return model_folder / "1" / "model.onnx"


def as_kubernetes_mounts_files(model_folder: Path) -> Path:
    apart(model_folder / "1" / "..2024")
    (model_folder / "1" / "..data").symlink_to("..2024")
    for name in ("model.onnx", "weights.bin"):
        (model_folder / "1" / name).symlink_to(f"..data/{name}")
    return model_folder / "1" / "model.onnx"


def by_a_linked_home(model_folder: Path) -> Path:
    apart(model_folder.parent / "elsewhere" / "1")
    model_folder.rmdir()
    model_folder.symlink_to("elsewhere")
    return model_folder / "1" / "model.onnx"


@pytest.mark.parametrize(
    "layout",
    [plain, in_a_folder_below, as_kubernetes_mounts_folders, as_kubernetes_mounts_files, by_a_linked_home],
)
def test_weights_within_the_models_folder_are_taken(tmp_path: Path, layout: Callable[[Path], Path]) -> None:
    model_folder = tmp_path / "home"
    model_folder.mkdir()
    path = layout(model_folder)
    check(path, model_folder)
    x = np.ones((1, 4), np.float32)
    (got,) = onnxruntime.InferenceSession(path).run(None, {"x": x})  # and the runtime takes them as well
    onnx.save(chain((4, 64, 3)), str(tmp_path / "one.onnx"))
    (expected,) = onnxruntime.InferenceSession(tmp_path / "one.onnx").run(None, {"x": x})
    assert got.tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("../weights.bin", "expected one in its folder"),
        ("deep/../../weights.bin", "expected one in its folder"),
        ("..\\weights.bin", "expected one in its folder"),
        ("/etc/passwd", "expected one in its folder"),
        ("", "expected one in its folder"),
        ("a\0b", "expected one in its folder"),
        ("missing.bin", "which is not there"),
        ("link.bin", "a link out of the model's folder"),
        ("linked/weights.bin", "a link out of the model's folder"),
        ("ring", "which is not there"),
        ("folder", "which is not a file"),
        ("x" * 5000, "which is not there"),
    ],
)
def test_weights_anywhere_else_are_refused(tmp_path: Path, location: str, reason: str) -> None:
    model_folder = tmp_path / "home"
    path = apart(model_folder / "1", location)
    shutil.copy(model_folder / "1" / "weights.bin", tmp_path / "weights.bin")
    shutil.copy(model_folder / "1" / "weights.bin", model_folder / "weights.bin")
    (model_folder / "1" / "link.bin").symlink_to(tmp_path / "weights.bin")
    (model_folder / "1" / "linked").symlink_to(tmp_path)
    (model_folder / "1" / "ring").symlink_to("ring")
    (model_folder / "1" / "folder").mkdir()
    with pytest.raises(ModelError) as caught:
        check(path, model_folder)
    assert reason in str(caught.value)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 400


@pytest.mark.parametrize("data", [b"", b"garbage, no network", b"\x3a\x05\x01"])
def test_what_is_no_onnx_file_is_told(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(data)
    with pytest.raises(ModelError, match=r"model\.onnx is (empty|not an ONNX file)"):
        check(path, tmp_path)
    with pytest.raises(ModelError, match="cannot be read"):
        check(tmp_path / "other.onnx", tmp_path)


@hypothesis_settings(max_examples=200)
@given(st.data())
def test_whatever_is_cut_or_changed_ends_in_an_answer_or_a_model_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    whole = network(
        [helper.make_node("Add", ["x", "w"], ["y"])],
        [("x", FLOAT, [1])],
        [("y", FLOAT, [1])],
        {"w": np.ones(1, np.float32)},
    )
    whole.graph.initializer.append(outside("w.bin", "v"))
    original = whole.SerializeToString()
    changed = bytearray(original[: data.draw(st.integers(1, len(original)))])
    for place in data.draw(st.lists(st.integers(0, len(changed) - 1), max_size=3)):
        changed[place] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "changed.onnx"
    path.write_bytes(changed)
    try:
        found = locations(path)
    except ModelError:
        return
    # What onnx itself can read names the same files, or none that we don't know of.
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception:
        return
    named = {_text(e.value) for t in model.graph.initializer for e in t.external_data if e.key == "location"}
    assert named <= found


def _text(value: str | bytes) -> str:
    """As protobuf's library gives it where it is not UTF-8: bytes."""
    return value if isinstance(value, str) else value.decode("utf-8", "surrogateescape")
