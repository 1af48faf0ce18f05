"""Files to arrays and back: what is read, what is refused with the place in the file, and what is written exactly."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from forwardpass.client.arrays import TensorInfo, fit
from forwardpass.console.array_files import Arrays, plain, read, save
from forwardpass.errors import ForwardpassError

X = TensorInfo("x", "FP32", (-1, 2))
IDS = TensorInfo("ids", "INT64", (-1,))
WORDS = TensorInfo("words", "BYTES", (-1, 2))
FLAGS = TensorInfo("flags", "BOOL", (-1, 2))


def read_text(folder: Path, name: str, text: str, *tensors: TensorInfo) -> Arrays:
    path = folder / name
    path.write_text(text, "utf-8")
    return read(path, None, tensors or (X,))


@pytest.mark.parametrize(
    ("text", "tensor", "expected"),
    [
        ("1,2\n3,4.5\n", X, [[1, 2], [3, 4.5]]),
        ("a,b\n1,2\n", X, [[1, 2]]),  # a header
        ("1e3, -0.5\r\n\r\n inf,1\r\n", X, [[1000, -0.5], [np.inf, 1]]),
        ("\ufeffa,b\n1,2\n", X, [[1, 2]]),  # as spreadsheets save it
        ('"1","2"\n', X, [[1, 2]]),
        ("1,\n", X, [[1, np.nan]]),  # an empty cell is a missing value
        ("id\n1\n9007199254740993\n", IDS, [1, 9007199254740993]),  # one column for one axis; beyond double's integers
        ("a,b\nc,\n", WORDS, [["a", "b"], ["c", ""]]),  # texts: no line is a header
        ("1,0\n0,1\n", FLAGS, [[True, False], [False, True]]),
        ("1,2,3,4\n", TensorInfo("x", "FP32", (-1, 2, 2)), [[[1, 2], [3, 4]]]),
        ("1,2,3\n", TensorInfo("x", "FP32", (-1, -1)), [[1, 2, 3]]),
    ],
)
def test_csv(tmp_path: Path, text: str, tensor: TensorInfo, expected: list[Any]) -> None:
    got = read_text(tmp_path, "a.csv", text, tensor)
    assert list(got) == [tensor.name]
    np.testing.assert_array_equal(got[tensor.name], np.array(expected))
    fit(got[tensor.name], tensor)


@pytest.mark.parametrize(
    ("name", "text", "tensors", "said"),
    [
        ("a.csv", "1,2\n3\n", (X,), "a.csv, line 2: has 1 cells; expected 2"),
        ("a.csv", "1,2\n3,x\n", (X,), "a.csv, line 2, cell 2: expected a number, got 'x'"),
        ("a.csv", "1_0,2\n1_0,2\n", (X,), "a.csv, line 2, cell 1: expected a number, got '1_0'"),
        ("a.csv", "id\n1.5\n", (IDS,), "a.csv, line 2, cell 1: expected a whole number, got '1.5'"),
        ("a.csv", "id\n1\n\n\n\n ,\n", (IDS,), "line 6: has 2 cells; expected 1"),
        ("a.csv", "", (X,), "a.csv: has no rows"),
        ("a.csv", "a,b\n", (X,), "a.csv: has no rows"),
        ("a.csv", "1,2\n", (X, IDS), "the model has the inputs x, ids: choose one by NAME="),
        ("a.json", "[[1,2],[3]]", (X,), "a.json: its rows differ in length"),
        ("a.json", "[[1,2", (X,), "a.json: is not JSON: "),
        ("a.json", '{"y": [[1,2]]}', (X,), "a.json: has 'y'; expected x"),
        ("a.json", '{"x": [null]}', (X,), "a.json: x: expected numbers or texts in nested lists, got object"),
        ("a.json", "[[1,2]]", (X, IDS), "the model has the inputs x, ids"),
        ("a.npy", "not numpy's", (X,), "a.npy: "),
        ("a.npz", "not numpy's", (X,), "a.npz: "),
        ("a.txt", "1 2", (X,), r"a.txt: cannot read '.txt' files; expected one of .npy, .npz, .csv, .json"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_place(
    tmp_path: Path, name: str, text: str, tensors: tuple[TensorInfo, ...], said: str
) -> None:
    with pytest.raises(ForwardpassError, match=said.replace(".", r"\.")) as refused:
        read_text(tmp_path, name, text, *tensors)
    assert "\n" not in str(refused.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    for name in ("a.npy", "a.npz", "a.csv", "a.json"):
        with pytest.raises(ForwardpassError, match=f"{name}: No such file or directory"):
            read(tmp_path / name, None, (X,))


def test_no_objects_are_unpickled(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([{}], object), allow_pickle=True)
    with pytest.raises(ForwardpassError, match=r"a\.npy: Object arrays cannot be loaded"):
        read(tmp_path / "a.npy", None, (X,))


def test_names_come_from_the_file_or_from_the_model(tmp_path: Path) -> None:
    x, ids = np.ones((1, 2), np.float32), np.array([7])
    np.save(tmp_path / "a.npy", x)
    np.savez(tmp_path / "unnamed.npz", x)
    np.savez(tmp_path / "named.npz", ids=ids, x=x)
    assert read(tmp_path / "a.npy", None, (X,))["x"].dtype == np.float32
    assert list(read(tmp_path / "unnamed.npz", None, (X,))) == ["x"]
    assert {name: a.tolist() for name, a in read(tmp_path / "named.npz", None, (X, IDS)).items()} == {
        "ids": [7], "x": [[1, 1]],
    }  # fmt: skip
    assert read_text(tmp_path, "a.json", '{"ids": [7], "x": [[1, 1]]}', X, IDS)["ids"].tolist() == [7]
    assert read(Path("-"), io.StringIO("[[1, NaN]]"), (X,))["x"].tolist()[0][0] == 1
    with pytest.raises(ForwardpassError, match="stdin: is not JSON"):
        read(Path("-"), io.StringIO(""), (X,))


@settings(max_examples=50)
@example(np.array([[1 << 63, 0]], np.uint64))
@given(
    hnp.arrays(
        st.sampled_from([np.dtype(name) for name in ("f2", "f4", "f8", "i8", "u8", "i1")]),
        hnp.array_shapes(min_dims=2, max_dims=2),
    )
)
def test_numbers_come_back_exactly_from_every_format(
    tmp_path_factory: pytest.TempPathFactory, array: np.ndarray
) -> None:
    folder = tmp_path_factory.mktemp("saved")
    names = {"f2": "FP16", "f4": "FP32", "f8": "FP64", "i8": "INT64", "u8": "UINT64", "i1": "INT8"}
    tensor = TensorInfo("x", names[array.dtype.str[1:]], (-1, -1))
    for name in ("a.npy", "a.npz", "a.csv", "a.json"):
        save(folder / name, {"x": array}, {})
        if name == "a.json" and array.dtype.kind == "f" and not np.isfinite(array).all():
            continue  # words, which stand for numbers only to those who know: see below
        got = fit(read(folder / name, None, (tensor,))["x"], tensor)
        assert got.dtype == array.dtype and got.shape == array.shape
        np.testing.assert_array_equal(got, array, err_msg=name)


def test_what_is_written_can_be_read_by_people_and_strict_parsers(tmp_path: Path) -> None:
    logits = np.array([[0.1, np.nan], [-np.inf, 2]], np.float32)
    save(tmp_path / "a.csv", {"y": logits}, {"y": ("no", "yes")})
    assert (tmp_path / "a.csv").read_text() == "y_no,y_yes\n0.1,nan\n-inf,2.0\n"
    texts = np.array(["a", b"\xff"], object)
    save(tmp_path / "a.json", {"y": logits, "t": texts}, {})
    said = json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail)
    assert said == {"y": [[0.1, "NaN"], ["-Infinity", 2.0]], "t": ["a", "\xff"]}
    save(tmp_path / "a.npy", {"t": np.array([["a", "bcd"]], object)}, {})
    assert np.load(tmp_path / "a.npy").tolist() == [["a", "bcd"]]
    save(tmp_path / "a.csv", {"y": np.array([3, 4])}, {})
    assert (tmp_path / "a.csv").read_text().split() == ["y_0", "3", "4"]
    assert plain(np.float32(0.1).reshape(())) == 0.1


def test_outputs_of_any_name_go_into_an_archive(tmp_path: Path) -> None:
    outputs = {"file": np.arange(3), "allow_pickle": np.ones((1, 2), np.float32)}
    save(tmp_path / "a.npz", outputs, {})
    with np.load(tmp_path / "a.npz") as found:
        assert {name: found[name].tolist() for name in found.files} == {n: a.tolist() for n, a in outputs.items()}


def test_what_cannot_be_written(tmp_path: Path) -> None:
    two = {"y": np.ones(1), "z": np.ones(1)}
    for name in ("a.npy", "a.csv"):
        with pytest.raises(ForwardpassError, match="holds one output, got y, z; choose one, or save as"):
            save(tmp_path / name, two, {})
    with pytest.raises(ForwardpassError, match=r"cannot write '\.txt' files; expected one of"):
        save(tmp_path / "a.txt", two, {})
    with pytest.raises(ForwardpassError, match="No such file or directory"):
        save(tmp_path / "nowhere" / "a.json", two, {})
    assert list(tmp_path.iterdir()) == []
