"""`export`: what it writes, for networks of many kinds, and that what it refuses leaves nothing and says why."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from forwardpass.errors import ExportError
from forwardpass.export import ExportedModel, export
from forwardpass.export.contract_parts import described
from forwardpass.model.contract import CONTRACT_FILE, MODEL_FILE, Contract, Tolerance
from forwardpass.model.contract_tensor import ContractTensor
from networks import (
    Attend,
    Branches,
    Cancels,
    Diverges,
    Draws,
    FixesTheBatch,
    GivesANumber,
    MeanOfRows,
    MixesRows,
    Mlp,
    NoOnnxForm,
    Single,
    Sums,
    TwoTowers,
    trained,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def answers(exported: ExportedModel, **inputs: np.ndarray[Any, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """What ONNX Runtime, as it is, makes of the file that was written."""
    session = onnxruntime.InferenceSession(exported.path / MODEL_FILE, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def test_an_exported_network_is_complete_and_true(tmp_path: Path) -> None:
    network = Mlp().train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    exported = export(network, {"x": "float32[batch,5]"}, "m", tmp_path, labels=["a", "b", "c"], source="s" * 8)
    assert exported.path == tmp_path / "m" / "1"
    assert sorted(path.name for path in exported.path.iterdir()) == [CONTRACT_FILE, MODEL_FILE]
    contract = Contract.load(exported.path / CONTRACT_FILE)
    assert contract == exported.contract
    contract.verify_files(exported.path)
    assert [(t.name, t.datatype, t.shape) for t in contract.inputs] == [("x", "FP32", [-1, 5])]
    assert [(t.name, t.datatype, t.shape, t.labels) for t in contract.outputs] == [
        ("output", "FP32", [-1, 3], ["a", "b", "c"])
    ]
    assert (contract.model, contract.version, contract.opset, contract.source) == ("m", 1, 20, "s" * 8)
    assert (contract.batchable, contract.batch_invariant, contract.rows_independent) == (True, True, True)
    assert (contract.torch, contract.onnxruntime) == (torch.__version__, onnxruntime.__version__)
    assert contract.tolerance == Tolerance(rtol=1e-4, atol=1e-5)
    assert 0 < contract.largest_difference < 1e-5
    assert exported.parameters == 5 * 10 + 10 + 10 * 3 + 3
    contract.check(answers(exported, **contract.input_arrays()))
    # The caller's module is as it was, dropout and all; what was exported is the module in evaluation mode.
    assert network.training
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    x = np.random.default_rng(1).standard_normal((4, 5)).astype(np.float32)
    with torch.no_grad():
        np.testing.assert_allclose(
            answers(exported, x=x)["output"], network.eval()(torch.from_numpy(x)), rtol=1e-5, atol=1e-6
        )


def test_the_expected_answers_are_in_float64(tmp_path: Path) -> None:
    network = Mlp()
    contract = export(network, ["x:float32[n,5]"], "m", tmp_path).contract
    with torch.no_grad():
        wide = network.double().eval()(torch.from_numpy(contract.input_arrays()["x"]).double()).numpy()
    np.testing.assert_array_equal(contract.expected_arrays()["output"], wide)
    assert contract.reference == "float64"


def test_the_same_network_gives_the_same_bytes_without_a_trace_of_this_machine(tmp_path: Path) -> None:
    network = trained()
    first, second = (export(network, ["x:float32[n,5]"], "m", tmp_path) for _ in range(2))
    assert (first.path.name, second.path.name) == ("1", "2")
    content = (first.path / MODEL_FILE).read_bytes()
    assert content == (second.path / MODEL_FILE).read_bytes()
    assert first.contract.samples == second.contract.samples
    for trace in (str(Path(__file__).parent), ".py", "stack_trace"):
        assert trace.encode() not in content


def test_several_inputs_and_outputs_of_several_dtypes(tmp_path: Path) -> None:
    # In another order than forward's: they go in by name.
    exported = export(TwoTowers(), {"item": "int64[n]", "user": "float32[n,3]"}, "m", tmp_path)
    contract = exported.contract
    assert [(t.name, t.datatype, t.shape) for t in contract.inputs] == [
        ("user", "FP32", [-1, 3]),
        ("item", "INT64", [-1]),
    ]
    assert [(t.name, t.datatype, t.shape) for t in contract.outputs] == [
        ("score", "FP32", [-1, 1]),
        ("liked", "BOOL", [-1, 1]),
        ("echo", "INT64", [-1]),
    ]
    items = contract.input_arrays()["item"]
    assert items.max() < 50  # the indices that were drawn stay inside the table
    np.testing.assert_array_equal(answers(exported, **contract.input_arrays())["echo"], items)


def test_outputs_and_labels_by_name(tmp_path: Path) -> None:
    exported = export(
        TwoTowers(),
        ["user:float32[n,3]", "item:int64[n]"],
        "m",
        tmp_path,
        outputs=["a", "b", "c"],
        labels={"b": ["likes"]},
    )
    assert [(tensor.name, tensor.labels) for tensor in exported.contract.outputs] == [
        ("a", None),
        ("b", ["likes"]),
        ("c", None),
    ]


def test_columns_and_categories_of_inputs(tmp_path: Path) -> None:
    network = TwoTowers()
    inputs = ["user:float32[n,3]", "item:int64[n]"]
    labels = {"user": ["age", "height", "weight"]}
    exported = export(network, inputs, "m", tmp_path, labels=labels, categories={"item": ["a", "b"]})
    contract = Contract.load(exported.path / CONTRACT_FILE)
    assert [(t.name, t.labels, t.categories) for t in contract.inputs] == [
        ("user", ["age", "height", "weight"], None),
        ("item", None, ["a", "b"]),
    ]
    # Older readers refuse fields that they do not know.
    assert (exported.path / CONTRACT_FILE).read_text("utf-8").count('"categories"') == 1


@pytest.mark.parametrize(
    ("labels", "categories", "text"),
    [
        ({"user": ["age"]}, None, "has 1 labels for 3 places"),
        (None, {"user": ["a"]}, "has categories and is FP32; expected integers"),
        (None, {"item": ["a", "a"]}, "expected different ones"),
        (None, {"item": []}, "expected different ones"),
        (None, {"x": ["a"]}, "categories: are for x; the inputs are user, item"),
        ({"z": ["a"]}, None, "labels: are for z; the outputs are a, b, the inputs user, item"),
    ],
)
def test_wrong_columns_and_categories_are_named(labels: Any, categories: Any, text: str) -> None:
    user = ContractTensor(name="user", datatype="FP32", shape=[-1, 3])
    item = ContractTensor(name="item", datatype="INT64", shape=[-1])
    outputs = [ContractTensor(name=name, datatype="FP32", shape=[-1, 1]) for name in "ab"]
    with pytest.raises(ExportError, match=text):
        described([user, item], outputs, labels, categories)


def test_inputs_with_names_of_their_own_go_in_order(tmp_path: Path) -> None:
    exported = export(TwoTowers(), ["features:float32[n,3]", "index:int64[n]"], "m", tmp_path)
    assert [tensor.name for tensor in exported.contract.inputs] == ["features", "index"]


def test_a_second_axis_of_any_size(tmp_path: Path) -> None:
    exported = export(Attend(), ["x:float32[batch,length,4]"], "m", tmp_path)
    assert [(t.name, t.shape) for t in exported.contract.outputs] == [
        ("output_0", [-1, -1, 4]),
        ("output_1", [-1, 4]),
    ]
    for length in (1, 2, 30):
        x = np.random.default_rng(0).standard_normal((3, length, 4)).astype(np.float32)
        assert answers(exported, x=x)["output_0"].shape == (3, length, 4)


def test_a_network_without_a_batch(tmp_path: Path) -> None:
    contract = export(MeanOfRows(), ["x:float32[7,5]"], "m", tmp_path).contract
    assert (contract.batchable, contract.batch_invariant, contract.rows_independent) == (False, None, None)
    assert (contract.inputs[0].shape, contract.outputs[0].shape, contract.samples.rows) == ([7, 5], [5], 1)


def test_rows_that_mix_are_found(tmp_path: Path) -> None:
    exported = export(MixesRows(), ["x:float32[n,5]"], "m", tmp_path)
    assert (exported.contract.batch_invariant, exported.contract.rows_independent) == (False, False)
    assert exported.row_difference is not None
    assert exported.row_difference > 0.1


def test_rows_that_differ_by_a_rounding_alone_and_in_a_batch_do_not_mix(tmp_path: Path) -> None:
    exported = export(Mlp(activation="softplus"), ["x:float32[n,5]"], "m", tmp_path)
    assert exported.contract.rows_independent
    assert exported.row_difference is not None
    assert exported.contract.batch_invariant == (exported.row_difference == 0)
    assert exported.row_difference < 1e-5


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_other_precisions_have_other_tolerances(tmp_path: Path, dtype: str) -> None:
    contract = export(Mlp().to(getattr(torch, dtype)), [f"x:{dtype}[n,5]"], "m", tmp_path).contract
    assert contract.inputs[0].datatype == contract.outputs[0].datatype == {"float16": "FP16", "float64": "FP64"}[dtype]
    assert (contract.tolerance.rtol > 1e-3) == (dtype == "float16")
    assert (contract.tolerance.rtol < 1e-8) == (dtype == "float64")


def test_a_network_that_cannot_run_in_float64_is_its_own_reference(tmp_path: Path) -> None:
    contract = export(Single(), ["x:float32[n,5]"], "m", tmp_path).contract
    assert contract.reference == "float32"


def test_answers_that_are_not_finite_are_kept(tmp_path: Path) -> None:
    x = np.array([[-1.0], [0.0], [1.0]], np.float32)
    exported = export(Diverges(), ["x:float32[n,1]"], "m", tmp_path, samples={"x": x})
    contract = Contract.load(exported.path / CONTRACT_FILE)
    np.testing.assert_array_equal(contract.expected_arrays()["output"][:3], [[np.nan], [-np.inf], [0.0]])


def test_the_callers_samples_go_into_the_contract(tmp_path: Path) -> None:
    x = np.arange(100, dtype=np.float32).reshape(20, 5)
    contract = export(Mlp(), ["x:float32[n,5]"], "m", tmp_path, samples={"x": x}).contract
    assert contract.samples.rows == 8
    np.testing.assert_array_equal(contract.input_arrays()["x"], x[:8])


def test_every_row_of_the_callers_samples_is_tried(tmp_path: Path) -> None:
    x = np.zeros((150, 1), np.float32)
    x[140] = 0.7  # the others come through unharmed
    with pytest.raises(ExportError, match=r"x \[22, 1\].* at \[12, 0\]: expected 0\.6\d*, got 0"):
        export(Cancels(), ["x:float32[n,1]"], "m", tmp_path, samples={"x": x})


@pytest.mark.parametrize("opset", [17, 21])
def test_the_opset_is_the_one_asked_for(tmp_path: Path, opset: int) -> None:
    exported = export(Mlp(), ["x:float32[n,5]"], "m", tmp_path, opset=opset)
    model = onnx.load(exported.path / MODEL_FILE)
    assert [entry.version for entry in model.opset_import if entry.domain == ""] == [opset]
    assert exported.contract.opset == opset


def test_a_version_of_the_callers_choice(tmp_path: Path) -> None:
    export(Mlp(), ["x:float32[n,5]"], "m", tmp_path, version=41)
    assert export(Mlp(), ["x:float32[n,5]"], "m", tmp_path).path.name == "42"
    with pytest.raises(ExportError, match="exists already"):
        export(Mlp(), ["x:float32[n,5]"], "m", tmp_path, version=41)
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == ["41", "42"]


def test_nothing_is_printed_and_logging_is_as_before(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    stages: list[str] = []
    logging.disable(logging.NOTSET)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        export(Mlp(), ["x:float32[n,5]"], "m", tmp_path, progress=stages.append)
        with pytest.raises(ExportError):
            export(Branches(), ["x:float32[n,5]"], "m", tmp_path)
    assert capfd.readouterr() == ("", "")
    assert not caught
    assert logging.root.manager.disable == logging.NOTSET
    assert len(stages) == 3


REFUSED: dict[str, tuple[nn.Module, list[str], dict[str, Any], list[str]]] = {
    # name: network, inputs, options, what the error must say
    "parity": (
        Cancels(),
        ["x:float32[n,5]"],
        {},
        ["answers differently", "x [1, 5]", "'output' at [0, ", "expected", "got 0", "allowed", "of 5 elements"],
    ),
    "unsupported operator": (NoOnnxForm(), ["x:float32[n,5]"], {}, ["aten._linalg_svd.default", "no form in ONNX"]),
    "control flow": (
        Branches(),
        ["x:float32[n,5]"],
        {},
        ["depends on the values of a tensor", "networks.py:", "if x.sum() > 0:"],
    ),
    "one batch size only": (FixesTheBatch(), ["x:float32[n,5]"], {}, ["fixes axis 0 of 'x' at 3", "any size"]),
    "an answer without rows": (MeanOfRows(), ["x:float32[n,5]"], {}, ["'output' has shape [5] for 2 rows", "'n'"]),
    "two sizes that must be one": (
        Sums(),
        ["x:float32[n,5]", "y:float32[m,5]"],
        {},
        ["Sums.forward failed on x [5, 5], y [7, 5]", "must match"],
    ),
    "wrong shape": (Mlp(), ["x:float32[n,6]"], {}, ["x [64, 6]", "64x6 and 5x10"]),
    "wrong dtype": (Mlp(), ["x:float64[n,5]"], {}, ["Double and Float"]),
    "too few inputs": (Sums(), ["x:float32[n,5]"], {}, ["Sums.forward", "'y'"]),
    "too many inputs": (Mlp(), ["x:float32[n,5]", "z:float32[n,5]"], {}, ["Mlp.forward", "does not take x, z"]),
    "names in another order": (Sums(), ["y:float32[n,5]", "b:float32[n,5]"], {}, ["'y' is number 1", "number 2"]),
    "random answers": (Draws(), ["x:float32[n,5]"], {}, ["other answers to the same rows"]),
    "no tensor": (GivesANumber(), ["x:float32[n,5]"], {}, ["gave a int"]),
    "opset too low": (Mlp(), ["x:float32[n,5]"], {"opset": 9}, ["opset 9", "it got to"]),
    "opset that is not yet": (Mlp(), ["x:float32[n,5]"], {"opset": 99}, ["opset 99"]),
    "too few output names": (TwoTowers(), ["user:float32[n,3]", "item:int64[n]"], {"outputs": ["a"]}, ["3 outputs"]),
    "one name for in and out": (Mlp(), ["x:float32[n,5]"], {"outputs": ["x"]}, ["twice there: x"]),
    "too few labels": (Mlp(), ["x:float32[n,5]"], {"labels": ["a"]}, ["1 labels for 3 places"]),
    "labels for no output": (Mlp(), ["x:float32[n,5]"], {"labels": {"y": ["a"]}}, ["labels: are for y", "output"]),
    "labels for one of many": (Attend(), ["x:float32[n,2,4]"], {"labels": ["a"]}, ["expected a mapping"]),
    "version": (Mlp(), ["x:float32[n,5]"], {"version": 0}, ["version 0"]),
    "name": (Mlp(), ["x:float32[n,5]"], {"name": "../m"}, ["model name '../m'"]),
    "samples": (Mlp(), ["x:float32[n,5]"], {"samples": {"x": [[1.0]]}}, ["samples: 'x' has shape [1, 1]"]),
    "no module": (len, ["x:float32[n,5]"], {}, ["expected a torch.nn.Module"]),  # type: ignore[dict-item]
    "a tolerance it does not hold": (
        Mlp(activation="softplus"),
        ["x:float32[n,5]"],
        {"tolerance": Tolerance(rtol=0, atol=0)},
        ["answers differently", "allowed 0"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_leaves_nothing_and_says_why(tmp_path: Path, case: str) -> None:
    network, inputs, options, says = REFUSED[case]
    with pytest.raises(ExportError) as refusal:
        export(network, inputs, options.pop("name", "m"), tmp_path / "repository", **options)
    text = str(refusal.value)
    for part in says:
        assert part in text
    assert len(text.splitlines()) <= 2
    assert "\033" not in text
    assert list(tmp_path.iterdir()) == []


def test_what_is_refused_leaves_the_version_before_it(tmp_path: Path) -> None:
    first = export(Mlp(), ["x:float32[n,5]"], "m", tmp_path)
    with pytest.raises(ExportError, match="answers differently"):
        export(Cancels(), ["x:float32[n,5]"], "m", tmp_path)
    assert [path.name for path in (tmp_path / "m").iterdir()] == ["1"]
    Contract.load(first.path / CONTRACT_FILE).verify_files(first.path)


# -- what a contract can show -----------------------------------------------------------------------------------------


class Function(torch.nn.Module):
    def __init__(self, function: Callable[[Any], Any]) -> None:
        super().__init__()
        self.function = function
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, x: Any) -> Any:
        return self.function(x * self.weight)


def test_a_squeeze_of_all_axes_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"'output' has shape \[\] for one row.*squeeze\(-1\)"):
        export(Function(lambda x: x.sum(1, keepdim=True).squeeze()), {"x": "float32[batch,4]"}, "m", tmp_path)


def test_answers_that_are_all_nan_are_no_contract(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"NaN or infinite, so that it would check nothing.*drawn.*samples="):
        export(Function(lambda x: (x * 0 - 1).log()), {"x": "float32[batch,4]"}, "m", tmp_path)
    samples = {"x": np.random.default_rng(0).random((8, 4), np.float32) + 1}
    exported = export(Function(torch.log), {"x": "float32[batch,4]"}, "m", tmp_path, samples=samples)
    assert exported.doubts == ()


def test_answers_that_show_little_are_doubted(tmp_path: Path) -> None:
    exported = export(Function(lambda x: x.sum(1, keepdim=True).sqrt()), {"x": "float32[batch,4]"}, "m", tmp_path)
    (doubt,) = exported.doubts
    assert re.match(
        r"\d of 8 answers 'output' of the contract hold NaN or infinity; the rows were drawn at random", doubt
    )
    exported = export(Function(lambda x: x * 0), {"x": "float32[batch,4]"}, "same", tmp_path)
    assert exported.doubts[0].startswith("all 8 answers 'output' of the contract are the same")


def test_the_absolute_tolerance_is_that_of_answers_of_their_size(tmp_path: Path) -> None:
    small = export(Function(lambda x: x * 1e-9), {"x": "float32[batch,4]"}, "small", tmp_path)
    large = export(Function(lambda x: x * 1e3), {"x": "float32[batch,4]"}, "large", tmp_path)
    assert 1e-15 < small.contract.tolerance.atol < 1e-13 and large.contract.tolerance.atol == 1e-5
