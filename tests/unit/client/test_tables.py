"""Tables to inputs: data frames of three libraries, and what is wrong with a table, by its column and row."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest

from forwardpass.client.arrays import TensorInfo
from forwardpass.client.errors import InvalidArgument
from forwardpass.client.tables import arrays_of, columns_in, expected_columns, is_array, is_table, is_text

polars = pytest.importorskip("polars", reason="polars is not installed (the extra dev)")
pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed (the extra tables)")

NUMBERS = TensorInfo("numbers", "FP32", (-1, 2), labels=("weight", "power"))
CYLINDERS = TensorInfo("cylinders", "INT64", (-1,), categories=("3", "4", "8"))
ORIGIN = TensorInfo("origin", "INT64", (-1, 1), categories=("USA", "Europe"))
NAME = TensorInfo("name", "BYTES", (-1, 1))
INPUTS = (NUMBERS, CYLINDERS, ORIGIN, NAME)
COLUMNS: dict[str, Any] = {
    "origin": ["Europe", "USA"],
    "name": ["golf", "mustang"],
    "power": [90, 210],
    "cylinders": [4, 8],
    "weight": [1985.0, 3400.5],
}
ARRAYS = {
    "numbers": np.array([[1985, 90], [3400.5, 210]], np.float32),
    "cylinders": np.array([1, 2]),
    "origin": np.array([[1], [0]]),
    "name": np.array([["golf"], ["mustang"]], object),
}


def made(table: Any, inputs: tuple[TensorInfo, ...] = INPUTS) -> dict[str, np.ndarray]:
    columns = columns_in(table, inputs)
    assert columns is not None
    return arrays_of(columns, "cars", inputs)


def categorical(columns: dict[str, Any]) -> Any:
    return pd.DataFrame(columns).astype({"origin": "category", "cylinders": "Int64", "weight": "float32"})


def words(columns: dict[str, Any]) -> Any:
    return pd.DataFrame({**columns, "cylinders": [str(value) for value in columns["cylinders"]]}, index=[7, 7])


def dictionary(columns: dict[str, Any]) -> Any:
    return pyarrow.table({**columns, "origin": pyarrow.array(columns["origin"]).dictionary_encode()})


FORMS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "pandas": pd.DataFrame,
    "pandas with categories and Int64": categorical,
    "pandas with words, and an index of its own": words,
    "polars": polars.DataFrame,
    "pyarrow": pyarrow.table,
    "pyarrow with a dictionary": dictionary,
    "a batch of pyarrow": lambda columns: pyarrow.table(columns).to_batches()[0],
    "a mapping of Series": lambda columns: {name: pd.Series(values) for name, values in columns.items()},
    "a mapping of lists": dict,
    "records": lambda columns: [{name: values[row] for name, values in columns.items()} for row in range(2)],
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_table_makes_the_same_inputs(form: str) -> None:
    arrays = made(FORMS[form](COLUMNS))
    assert arrays.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert arrays[name].dtype == array.dtype and arrays[name].shape == array.shape, name
        assert (arrays[name] == array).all(), name


def test_one_record_is_one_row() -> None:
    arrays = made({name: values[0] for name, values in COLUMNS.items()})
    assert all((arrays[name] == ARRAYS[name][:1]).all() for name in ARRAYS)


def test_arrays_by_input_name_are_no_table() -> None:
    assert columns_in(ARRAYS, INPUTS) is None
    assert columns_in({"numbers": [[1.0, 2.0]], "cylinders": [0]}, INPUTS) is None
    assert columns_in(np.zeros((2, 2)), INPUTS) is None
    assert not is_table([[1.0, 2.0]]) and is_array([[1.0, 2.0]]) and is_array(pd.Series([1.0, 2.0]))
    assert not is_array(ARRAYS) and not is_array(pd.DataFrame(COLUMNS))


def test_the_columns_and_which_of_them_are_words() -> None:
    assert expected_columns(INPUTS) == ["weight", "power", "cylinders", "origin", "name"]
    assert [name for name in expected_columns(INPUTS) if is_text(name, INPUTS)] == ["cylinders", "origin", "name"]


def test_a_model_without_names_of_columns_takes_them_in_their_order() -> None:
    frame = pd.DataFrame([[1.0, 2.0], [3.0, 4.0]])
    for width in (2, -1):
        array = made(frame, (TensorInfo("x", "FP32", (-1, width)),))["x"]
        assert array.tolist() == [[1, 2], [3, 4]] and array.dtype == np.float32
    with pytest.raises(InvalidArgument, match="takes the columns 'x'; the table has no 'x', and has '0', '1'"):
        made(frame, (TensorInfo("x", "FP32", (-1, 3)),))


def test_lists_in_cells_fill_an_input_of_several_axes() -> None:
    inputs = (TensorInfo("e", "FP32", (-1, 2)), TensorInfo("age", "FP32", (-1,)))
    for table in (
        pyarrow.table({"e": [[1.0, 2.0], [3.0, 4.0]], "age": [1, 2]}),
        pd.DataFrame({"e": [[1.0, 2.0], [3.0, 4.0]], "age": [1, 2]}),
    ):
        assert made(table, inputs)["e"].tolist() == [[1, 2], [3, 4]]


def spoilt(**columns: Any) -> Any:
    return pd.DataFrame({**COLUMNS, **columns})


WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "a column less": (
        lambda: pd.DataFrame(COLUMNS).drop(columns="origin"),
        r"model 'cars' takes the columns 'weight', 'power', 'cylinders', 'origin', 'name'; the table has no 'origin'",
    ),
    "another case": (
        lambda: pd.DataFrame(COLUMNS).rename(columns={"origin": " Origin"}),
        r"the table has no 'origin', and has ' Origin'; is ' Origin' meant by 'origin'\?",
    ),
    "a slip": (
        lambda: pd.DataFrame(COLUMNS).rename(columns={"cylinders": "cylnders"}),
        r"is 'cylnders' meant by 'cylinders'\?",
    ),
    "a column more": (lambda: spoilt(mpg=[30, 15]), r"the table has 'mpg' too: leave out what the model does not take"),
    "a column twice": (
        lambda: pd.concat([pd.DataFrame(COLUMNS), pd.DataFrame({"power": [1, 2]})], axis=1),
        "expected columns of different names, got 'power' more than once",
    ),
    "NaN": (lambda: spoilt(power=[90, np.nan]), r"column 'power', row 1: expected a value, got NaN: fill or leave out"),
    "None": (lambda: spoilt(name=[None, "mustang"]), r"column 'name', row 0: expected a value, got (nan|None)"),
    "NA": (
        lambda: spoilt(cylinders=pd.array([4, None], "Int64")),
        r"column 'cylinders', row 1: expected a value, got (NaN|<NA>)",
    ),
    "NA among records": (
        lambda: [{name: v[0] for name, v in COLUMNS.items()}, {"origin": "USA"}],
        r"column 'weight', row 1: expected a value, got None",
    ),
    "text for numbers": (
        lambda: spoilt(weight=["heavy", "light"]),
        r"column 'weight': expected numbers \(FP32\), got text, 'heavy' in row 0",
    ),
    "numbers for text": (
        lambda: spoilt(name=[1, 2]),
        r"column 'name': expected text \(BYTES\), got int64, as 1 in row",
    ),
    "both": (
        lambda: spoilt(power=[90, "many"]),
        r"column 'power': expected numbers or text, got both: 'many' in row 1, 90 in row 0",
    ),
    "a date": (
        lambda: spoilt(power=pd.to_datetime(["2020-01-01", "2020-01-02"])),
        r"column 'power': expected FP32, got datetime64.*: convert it to a number",
    ),
    "another category": (
        lambda: spoilt(origin=["Europe", "Euorpe"]),
        r"column 'origin', row 1: expected one of 'USA', 'Europe', got 'Euorpe'; is 'Europe' meant\?",
    ),
    "another number": (
        lambda: spoilt(cylinders=[4, 5]),
        r"column 'cylinders', row 1: expected one of '3', '4', '8', got '5'",
    ),
    "codes for words": (
        lambda: spoilt(origin=[1, 0]),
        r"column 'origin': expected one of the words 'USA', 'Europe', got int64: send words; codes are sent as a numpy",
    ),
    "no rows": (lambda: pd.DataFrame(COLUMNS)[:0], "expected a table with rows, got one without"),
    "lengths": (
        lambda: {**{name: pd.Series(v) for name, v in COLUMNS.items()}, "power": pd.Series([1])},
        "expected columns of as many rows, got 'weight' 2, 'power' 1",
    ),
    "another record": (
        lambda: [{"weight": 1}, {"weight": 1, "size": 2}],
        "row 1: has 'size', which row 0 has not",
    ),
    "no record": (lambda: [{"weight": 1}, 2], "row 1: expected a record of values by column, got int"),
    "lists": (lambda: spoilt(power=[[1, 2], [3, 4]]), "column 'power': expected one value in a cell, got a list"),
    "ragged lists": (lambda: spoilt(power=[[1, 2], [3]]), "column 'power': expected numbers, text, or lists of the"),
    "lazy": (
        lambda: polars.DataFrame(COLUMNS).lazy(),
        r"got a LazyFrame, which has no values yet: call its",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_an_error_names_what_was_expected_what_came_and_what_to_do(case: str) -> None:
    table, text = WRONG[case]
    with pytest.raises(InvalidArgument, match=text):
        made(table())


def test_an_input_of_several_axes_is_not_filled_by_values() -> None:
    with pytest.raises(InvalidArgument, match=r"column 'image': expected lists of shape \[\?,28,28\]"):
        made({"image": pd.Series([1.0])}, (TensorInfo("image", "FP32", (-1, 28, 28)),))


def test_the_client_imports_no_library_of_tables() -> None:
    code = (
        "import sys\nimport forwardpass.client\nfrom forwardpass.client import tables\n"
        "assert tables.is_table([{'a': 1}])\n"
        "assert not {'pandas', 'polars', 'pyarrow'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
