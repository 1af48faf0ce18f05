"""The grammar of inputs, which symbol is the batch, and a caller's samples fitted to them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from forwardpass.errors import ExportError
from forwardpass.export.input_spec import InputSpec, batch_symbol, draw, fit_samples, parse_inputs, symbols


@pytest.mark.parametrize(
    ("text", "name", "dtype", "dims"),
    [
        ("x:float32[batch,64]", "x", "float32", ("batch", 64)),
        (" ids : int64 [ n , length ] ", "ids", "int64", ("n", "length")),
        ("a.b-c_1:bool[3]", "a.b-c_1", "bool", (3,)),
        ("scalar:float64[]", "scalar", "float64", ()),
        ("x:uint8[n,3,224,224]", "x", "uint8", ("n", 3, 224, 224)),
    ],
)
def test_a_spec_is_read(text: str, name: str, dtype: str, dims: tuple[int | str, ...]) -> None:
    spec = InputSpec.parse(text)
    assert (spec.name, spec.dtype.name, spec.dims) == (name, dtype, dims)
    assert InputSpec.parse(str(spec)) == spec


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("x", "NAME:DTYPE[DIM,...]"),
        ("x:float32", "NAME:DTYPE[DIM,...]"),
        ("x:float32[2][3]", "NAME:DTYPE[DIM,...]"),
        (":float32[2]", "NAME:DTYPE[DIM,...]"),
        ("x y:float32[2]", "NAME:DTYPE[DIM,...]"),
        ("x:float[2]", "'float'; expected one of bool, uint8"),
        ("x:object[2]", "'object'"),
        ("x:bfloat16[2]", "'bfloat16'"),
        ("x:float32[n,0]", "'0'"),
        ("x:float32[n,-1]", "'-1'"),
        ("x:float32[n,]", "''"),
        ("x:float32[2*n]", "'2*n'"),
    ],
)
def test_what_is_no_spec_is_refused(text: str, says: str) -> None:
    with pytest.raises(ExportError) as refusal:
        InputSpec.parse(text)
    assert repr(text) in str(refusal.value)
    assert says in str(refusal.value)


def test_inputs_come_as_a_mapping_or_one_by_one() -> None:
    one_by_one = parse_inputs(["x:float32[n,2]", InputSpec("y", np.dtype(np.int64), ("n",))])
    assert parse_inputs({"x": "float32[n,2]", "y": "int64[n]"}) == one_by_one


@pytest.mark.parametrize("inputs", [[], {}, "x:float32[n,2]", ["x:float32[n]", "x:int64[n]"]])
def test_inputs_that_are_no_list_or_have_one_name_twice_are_refused(inputs: Any) -> None:
    with pytest.raises(ExportError):
        parse_inputs(inputs)


@pytest.mark.parametrize(
    ("inputs", "batch"),
    [
        (["x:float32[batch,2]"], "batch"),
        (["x:float32[n,2]", "y:int64[n]"], "n"),
        (["x:float32[n,length]", "y:int64[n,length]"], "n"),
        (["x:float32[n,2]", "y:int64[m]"], None),  # two sizes: rows do not belong together
        (["x:float32[n,n]"], None),  # a square is no batch of rows
        (["x:float32[n,2]", "y:float32[2,n]"], None),
        (["x:float32[4,2]"], None),
        (["x:float32[n,2]", "y:float32[]"], None),
    ],
)
def test_the_batch_is_axis_0_of_every_input_and_nothing_else(inputs: list[str], batch: str | None) -> None:
    assert batch_symbol(parse_inputs(inputs)) == batch


def test_a_symbol_has_one_size_in_all_inputs() -> None:
    specs = parse_inputs(["x:float32[n,length]", "mask:bool[n,length]", "ids:int8[length]"])
    assert symbols(specs) == ["n", "length"]
    values = draw(specs, {"n": 3, "length": 5}, 4, np.random.default_rng(0))
    assert {name: (value.shape, value.dtype.name) for name, value in values.items()} == {
        "x": ((3, 5), "float32"),
        "mask": ((3, 5), "bool"),
        "ids": ((5,), "int8"),
    }
    assert values["ids"].min() >= 0
    assert values["ids"].max() < 4


def test_samples_take_the_dtype_and_give_the_symbols_their_sizes() -> None:
    specs = parse_inputs(["x:float32[n,k]", "ids:int64[n]"])
    values, sizes = fit_samples(specs, {"x": [[0.1, 2.0]] * 3, "ids": np.array([1, 2, 3], np.int16)})
    assert sizes == {"n": 3, "k": 2}
    assert (values["x"].dtype, values["ids"].dtype) == (np.float32, np.int64)


@pytest.mark.parametrize(
    ("samples", "says"),
    [
        ({"x": [[1.0, 2]]}, "['x']; expected ['ids', 'x']"),
        ({"x": [1.0, 2], "ids": [1]}, "'x' has shape [2]"),
        ({"x": [[1.0, 2]], "ids": [1, 2]}, "n = 1"),
        ({"x": [[1.0, 2, 3]], "ids": [1]}, "expected x:float32[n,2], 2"),
        ({"x": np.zeros((0, 2)), "ids": []}, "'x' has shape [0, 2]"),
        ({"x": [[1.0, 2]], "ids": [1.5]}, "'ids' holds float64 values that do not fit int64"),
        ({"x": [[1.0, 2]], "ids": np.array([2**63], np.uint64)}, "uint64 values that do not fit int64"),
    ],
)
def test_samples_that_do_not_fit_are_refused(samples: dict[str, Any], says: str) -> None:
    with pytest.raises(ExportError) as refusal:
        fit_samples(parse_inputs(["x:float32[n,2]", "ids:int64[n]"]), samples)
    assert says in str(refusal.value)
