"""Half precision: what is converted and what stays, the tolerance that is measured, and networks it is not for."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper
from torch import Tensor, nn

from forwardpass.errors import ExportError
from forwardpass.export import ExportedModel, export
from forwardpass.export.fp16_tolerance import MARGIN, RELATIVE, Rounded
from forwardpass.model.contract import CONTRACT_FILE, MODEL_FILE, Contract, Tolerance
from networks import Cancels, Mlp, TwoTowers

pytestmark = pytest.mark.usefixtures("one_thread")

MODELS = Path(__file__).parents[3] / "models"
RECIPES = {"document": "FeedForwardNet", "digits": "Digits", "mnist": "Mnist"}


def halved(module: nn.Module, inputs: list[str], folder: Path, **options: Any) -> ExportedModel:
    return export(module, inputs, "m", folder, precision="fp16", **options)


def answers(exported: ExportedModel, **inputs: NDArray[Any]) -> dict[str, NDArray[Any]]:
    session = onnxruntime.InferenceSession(exported.path / MODEL_FILE, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def graph(exported: ExportedModel) -> onnx.GraphProto:
    return onnx.load(exported.path / MODEL_FILE).graph


def of_recipe(name: str, file: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"{name}_{file}", MODELS / name / f"{file}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Standardised(nn.Module):
    """Features of any magnitude -> standardised -> two layers, as the recipes do it."""

    def __init__(self, mean: float, scale: float) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((5,), mean))
        self.register_buffer("scale", torch.full((5,), scale))
        self.layers = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 3))

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.layers((x - self.mean) * self.scale)
        return answer


class Headed(nn.Module):
    """Layers of many kinds: a convolution, normalisation, GELU, softmax, and the index of the largest."""

    def __init__(self) -> None:
        super().__init__()
        self.taps = nn.Conv1d(1, 4, 3, padding=1)
        self.norm = nn.LayerNorm(16)
        self.out = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = nn.functional.gelu(self.norm(self.taps(x.unsqueeze(1)).flatten(1)))
        chances = torch.softmax(self.out(hidden), -1)
        return {"chances": chances, "best": chances.argmax(-1)}


class Offset(nn.Module):
    """The interesting part of z is small beside a constant: half precision has no bits left for it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = (self.layer(x) + 4000.0) - 4000.0
        return answer


def scaled(factor: float) -> Mlp:
    network = Mlp()
    with torch.no_grad():
        network.hidden.weight *= factor
    return network


# -- what is converted ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["document", "digits", pytest.param("mnist", marks=pytest.mark.slow)])
def test_the_recipes_networks_hold_in_half_precision(tmp_path: Path, name: str) -> None:
    (learnt, _), (x, _) = of_recipe(name, "data").training(), of_recipe(name, "data").held_out()
    network = getattr(of_recipe(name, "network"), RECIPES[name])()
    network.mean.copy_(torch.from_numpy(learnt.mean(0)))
    network.scale.copy_(torch.from_numpy(1 / np.maximum(learnt.std(0), 1e-2)))
    exported = halved(network, [f"x:float32[batch,{x.shape[1]}]"], tmp_path, outputs=["logits"], samples={"x": x})
    contract = Contract.load(exported.path / CONTRACT_FILE)
    assert (contract.precision, contract.reference) == ("fp16", "float64")
    # Clients go on sending and getting float32.
    assert [(t.name, t.datatype) for t in (*contract.inputs, *contract.outputs)] == [("x", "FP32"), ("logits", "FP32")]
    its = graph(exported)
    stored = {tensor.name: tensor.data_type for tensor in its.initializer}
    assert stored.pop("mean") == stored.pop("scale") == TensorProto.FLOAT
    assert set(stored.values()) == {TensorProto.FLOAT16}
    assert len(stored) == len(list(network.parameters()))
    operators = [node.op_type for node in its.node]
    assert operators[:3] == ["Sub", "Mul", "Cast"]  # standardised first, then rounded
    assert operators[-1] == "Cast"
    assert operators.count("Cast") == 2
    with torch.no_grad():
        expected = network.eval().double()(torch.from_numpy(x).double()).numpy()
    difference = np.abs(answers(exported, x=x)["logits"] - expected)
    assert (difference <= contract.tolerance.atol + contract.tolerance.rtol * np.abs(expected)).all()


def test_raw_features_may_be_beyond_what_half_precision_holds(tmp_path: Path) -> None:
    x = (3e6 + 1e5 * np.random.default_rng(0).standard_normal((100, 5))).astype(np.float32)
    network = Standardised(3e6, 1e-5)
    exported = halved(network, ["x:float32[n,5]"], tmp_path, samples={"x": x})
    with torch.no_grad():
        expected = network(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(
        answers(exported, x=x)["output"], expected, rtol=0.01, atol=exported.contract.tolerance.atol
    )


def test_what_loses_by_it_stays_in_float32(tmp_path: Path) -> None:
    its = graph(halved(Headed(), ["x:float32[n,4]"], tmp_path))
    types = {
        v.name: v.type.tensor_type.elem_type
        for v in onnx.shape_inference.infer_shapes(onnx.helper.make_model(its)).graph.value_info
    }
    types.update({value.name: value.type.tensor_type.elem_type for value in (*its.input, *its.output)})
    by_operator = {node.op_type: types[node.output[0]] for node in its.node if node.op_type != "Cast"}
    assert by_operator["Conv"] == by_operator["Gemm"] == by_operator["Gelu"] == TensorProto.FLOAT16
    assert by_operator["LayerNormalization"] == by_operator["Softmax"] == TensorProto.FLOAT
    assert by_operator["ArgMax"] == TensorProto.INT64


def test_a_table_that_indices_look_up_is_converted_too(tmp_path: Path) -> None:
    exported = halved(TwoTowers(), ["user:float32[n,3]", "item:int64[n]"], tmp_path)
    tables = [t for t in graph(exported).initializer if list(t.dims) == [50, 4]]
    assert [table.data_type for table in tables] == [TensorProto.FLOAT16]
    assert [(t.name, t.datatype) for t in exported.contract.outputs] == [
        ("score", "FP32"), ("liked", "BOOL"), ("echo", "INT64"),
    ]  # fmt: skip


def test_hidden_outputs_are_float32_too(tmp_path: Path) -> None:
    network = Mlp()
    exported = halved(network, ["x:float32[n,5]"], tmp_path, expose_hidden=True)
    assert [(t.name, t.datatype) for t in exported.contract.hidden] == [("a1", "FP32")]
    x = exported.contract.input_arrays()["x"]
    with torch.no_grad():
        a1 = torch.relu(network.hidden(torch.from_numpy(x))).numpy()
    np.testing.assert_allclose(answers(exported, x=x)["a1"], a1, rtol=2e-3, atol=2e-3)


def test_a_constant_that_two_precisions_want_is_stored_in_both(tmp_path: Path) -> None:
    class Shares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.full((5,), 0.5))
            self.layer = nn.Linear(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            answer: Tensor = self.layer(x * self.scale) * self.scale
            return answer

    its = graph(halved(Shares(), ["x:float32[n,5]"], tmp_path))
    stored = {t.name: numpy_helper.to_array(t) for t in its.initializer if t.name.startswith("scale")}
    assert {name: value.dtype for name, value in stored.items()} == {"scale": np.float32, "scale.half": np.float16}


def test_native_is_what_it_was(tmp_path: Path) -> None:
    exported = export(Mlp(), ["x:float32[n,5]"], "m", tmp_path)
    assert exported.contract.precision == "native"
    assert {t.data_type for t in graph(exported).initializer} == {TensorProto.FLOAT}


@pytest.mark.slow
def test_the_same_network_gives_the_same_bytes(tmp_path: Path) -> None:
    network = Mlp()
    first, second = (halved(network, ["x:float32[n,5]"], tmp_path) for _ in range(2))
    assert (first.path / MODEL_FILE).read_bytes() == (second.path / MODEL_FILE).read_bytes()


# -- the tolerance ----------------------------------------------------------------------------------------------------


def test_every_operator_rounds_once(tmp_path: Path) -> None:
    network = Mlp(features=64, hidden=300, classes=10)
    exported = halved(network, ["x:float32[n,64]"], tmp_path)
    x = np.random.default_rng(5).standard_normal((17, 64)).astype(np.float32)
    w1, b1, w2, b2 = (p.detach().numpy().astype(np.float16).astype(np.float32) for p in network.parameters())

    def rounded(z: NDArray[np.float32]) -> NDArray[np.float32]:
        return z.astype(np.float16).astype(np.float32)

    by_hand = rounded(np.maximum(rounded(rounded(x) @ w1.T + b1), 0) @ w2.T + b2)
    (got,) = Rounded((exported.path / MODEL_FILE).read_bytes()).run({"x": x}).values()
    # Sums in another order may fall on the other side of a rounding, and then differ by one place of the answer.
    assert (np.abs(got - by_hand) <= np.spacing(np.abs(by_hand).astype(np.float16)).astype(np.float32)).all()
    assert (got == by_hand).mean() > 0.9
    # The provider that serves on CPUs rounds less; had it been asked, the tolerance would be far too small.
    exact = np.abs(answers(exported, x=x)["output"] - by_hand).max()
    assert exact > 1e-4


def test_the_tolerance_is_what_was_measured_with_a_margin(tmp_path: Path) -> None:
    contract = halved(Mlp(), ["x:float32[n,5]"], tmp_path).contract
    assert contract.tolerance.rtol == RELATIVE
    assert MARGIN <= contract.tolerance.atol / contract.largest_difference < 1.11 * MARGIN  # two digits, rounded up
    assert 1e-5 < contract.largest_difference < 1e-2
    assert Contract.load(tmp_path / "m" / "1" / CONTRACT_FILE).tolerance == contract.tolerance


@pytest.mark.slow
def test_a_tolerance_of_the_callers_is_held(tmp_path: Path) -> None:
    wide = Tolerance(rtol=0.0, atol=0.5)
    assert halved(Mlp(), ["x:float32[n,5]"], tmp_path, tolerance=wide).contract.tolerance == wide
    with pytest.raises(ExportError, match="half precision: the network answers differently"):
        halved(Mlp(), ["x:float32[n,5]"], tmp_path, tolerance=Tolerance(rtol=0.0, atol=1e-7))
    assert [path.name for path in (tmp_path / "m").iterdir()] == ["1"]


def test_a_contract_from_before_is_native(tmp_path: Path) -> None:
    path = export(Mlp(), ["x:float32[n,5]"], "m", tmp_path).path / CONTRACT_FILE
    lines = [line for line in path.read_text().splitlines() if '"precision"' not in line]
    path.write_text("\n".join(lines))
    assert Contract.load(path).precision == "native"


# -- what it is not for -----------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[nn.Module, str, dict[str, Any], list[str]]] = {
    # name: network, dtype, options, what the error must say
    "an activation beyond its range": (scaled(1e5), "float32", {}, ["overflows: 'linear' (Gemm)", "beyond 65504"]),
    "features that nobody standardises": (
        scaled(1e-6),
        "float32",
        {"samples": {"x": np.full((3, 5), 1e5, np.float32)}},
        ["overflows: 'x' (Cast)", "scale its features"],
    ),
    "a weight beyond its range": (scaled(1e7), "float32", {}, ["'hidden.weight' has the value", "at most"]),
    "a small difference of large numbers": (Offset(), "float32", {}, ["'output' is off by up to", "answers reach"]),
    "nothing to convert": (Cancels(), "float32", {}, ["no matrix product"]),
    "float64": (Mlp().double(), "float64", {}, ["expected a network in float32, got float64"]),
    "float16 already": (Mlp().half(), "float16", {}, ["expected a network in float32, got float16"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_is_not_for_is_said_and_leaves_nothing(tmp_path: Path, case: str) -> None:
    network, dtype, options, says = REFUSED[case]
    with pytest.raises(ExportError) as refusal:
        halved(network, [f"x:{dtype}[n,5]"], tmp_path / "repository", **options)
    for part in (*says, "half precision"):
        assert part in str(refusal.value)
    assert len(str(refusal.value).splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_an_infinity_that_is_right_is_no_overflow(tmp_path: Path) -> None:
    class Gated(nn.Module):
        """-inf where a feature is negative, as a mask has it."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.where(x[:, :3] < 0, float("-inf"), self.layer(x))

    contract = halved(Gated(), ["x:float32[n,5]"], tmp_path).contract
    assert np.isneginf(contract.expected_arrays()["output"]).any()
