"""Networks opened from a copy that several processes map: the same bits, one copy, and none of what was replaced."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from forwardpass.execution import shared_weights
from forwardpass.execution.placement import CPU, Placement
from forwardpass.execution.providers import open_session
from forwardpass.execution.shared_weights import NETWORK, WEIGHTS, SharedWeights

PLACEMENT = Placement(CPU, 0, 1, "", False)
WIDTH = 96


def save(path: Path, seed: int, external: bool = False) -> Path:
    """A network of two products with its weights in it, or beside it."""
    rng = np.random.default_rng(seed)
    weights = [rng.normal(0, 0.1, (WIDTH, WIDTH)).astype(np.float32) for _ in range(2)]
    nodes = [
        helper.make_node("Gemm", ["x", "w0", "b"], ["h"], transB=1),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "w1"], ["y"]),
    ]
    constants = [numpy_helper.from_array(w, f"w{i}") for i, w in enumerate(weights)]
    constants.append(numpy_helper.from_array(np.ones(WIDTH, np.float32), "b"))
    shape = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", WIDTH]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "g", shape[:1], shape[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    path.parent.mkdir(exist_ok=True, parents=True)
    onnx.save(model, path, save_as_external_data=external, location="weights.bin", size_threshold=0)
    return path


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SharedWeights:
    monkeypatch.setattr(shared_weights, "LEAST", 1000)
    (tmp_path / "shared").mkdir()
    return SharedWeights(tmp_path / "shared")


def copies(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "shared").glob(f"*/*/{NETWORK}"))


@pytest.mark.parametrize("external", [False, True])
def test_answers_are_the_same_bits_from_one_copy(tmp_path: Path, shared: SharedWeights, external: bool) -> None:
    path = save(tmp_path / "m" / "model.onnx", 1, external)
    x = np.random.default_rng(2).normal(0, 1, (7, WIDTH)).astype(np.float32)
    (right,) = open_session(path, PLACEMENT).run([x], (0,))
    for _ in range(2):
        (found,) = shared.open(path, PLACEMENT).run([x], (0,))
        assert found.tobytes() == right.tobytes()
    (copy,) = copies(tmp_path)
    # The matrices as they are and as they are packed; nothing is in the process alone.
    assert copy.with_name(WEIGHTS).stat().st_size >= 2 * 2 * WIDTH * WIDTH * 4
    session = shared.open(path, PLACEMENT)
    assert str(copy.with_name(WEIGHTS)) in Path("/proc/self/maps").read_text()
    del session


def test_a_network_that_changed_has_a_copy_of_its_own_and_the_old_one_goes(
    tmp_path: Path, shared: SharedWeights
) -> None:
    path = save(tmp_path / "m" / "model.onnx", 1)
    x = np.ones((1, WIDTH), np.float32)
    old = shared.open(path, PLACEMENT)
    (before,) = old.run([x], (0,))
    (first,) = copies(tmp_path)
    save(path, 9)
    (after,) = shared.open(path, PLACEMENT).run([x], (0,))
    assert after.tobytes() != before.tobytes()
    assert len(copies(tmp_path)) == 1 and copies(tmp_path) != [first]
    assert old.run([x], (0,))[0].tobytes() == before.tobytes()  # what it mapped stays


def test_many_at_once_make_one_copy(tmp_path: Path, shared: SharedWeights) -> None:
    path = save(tmp_path / "m" / "model.onnx", 1)
    opened: list[object] = []
    threads = [threading.Thread(target=lambda: opened.append(shared.open(path, PLACEMENT))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(opened) == 6
    assert len(copies(tmp_path)) == 1
    assert not list((tmp_path / "shared").glob("*/making-*"))


def test_small_networks_and_a_folder_that_is_gone_are_opened_as_they_are(
    tmp_path: Path, shared: SharedWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path / "m" / "model.onnx", 1)
    monkeypatch.setattr(shared_weights, "LEAST", 1 << 30)
    x = np.ones((1, WIDTH), np.float32)
    assert shared.open(path, PLACEMENT).run([x], (0,))
    assert not copies(tmp_path)
    monkeypatch.setattr(shared_weights, "LEAST", 1000)
    assert SharedWeights(tmp_path / "nowhere").open(path, PLACEMENT).run([x], (0,))


def test_copies_of_what_is_served_no_more_go(tmp_path: Path, shared: SharedWeights) -> None:
    paths = [save(tmp_path / "m" / version / "model.onnx", int(version)) for version in "123"]
    for path in paths:
        shared.open(path, PLACEMENT)
    shared.remove([paths[0].parent])
    assert len(copies(tmp_path)) == 2
    paths[1].unlink()
    shared.remove([])
    (copy,) = copies(tmp_path)
    shared.open(paths[2], PLACEMENT)
    assert copies(tmp_path) == [copy]
    shared.open(paths[0], PLACEMENT)  # it is asked for again
    assert len(copies(tmp_path)) == 2


def test_a_start_removes_what_killed_servers_left_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_weights.tempfile, "tempdir", str(tmp_path))
    left, other = tmp_path / "forwardpass-weights-left", tmp_path / "forwardpass-weights-being-made"
    (left / "home").mkdir(parents=True)
    (left / "in-use").touch()
    other.mkdir()
    with shared_weights.temporary_folder() as living:
        assert {*tmp_path.iterdir()} == {other, living}
        with shared_weights.temporary_folder() as another:
            assert {*tmp_path.iterdir()} == {other, living, another}
    assert {*tmp_path.iterdir()} == {other}
