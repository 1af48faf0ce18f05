"""The contract: what it holds exactly, what it refuses and how it says so, and how answers are held against it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forwardpass.errors import ContractError
from forwardpass.model.contract import CONTRACT_FILE, Contract, Samples, Tolerance, compare, file_digest
from forwardpass.model.contract_tensor import ContractTensor

TOLERANCE = Tolerance(rtol=1e-4, atol=1e-5)
NAN, INF = float("nan"), float("inf")


def make(files: dict[str, str] | None = None, **changes: Any) -> Contract:
    """A contract of a network with two inputs and two outputs, for three rows."""
    fields: dict[str, Any] = {
        "model": "m",
        "version": 3,
        "files": files if files is not None else {"model.onnx": "0" * 64},
        "inputs": [
            ContractTensor(name="x", datatype="FP32", shape=[-1, 2]),
            ContractTensor(name="text", datatype="BYTES", shape=[-1]),
        ],
        "outputs": [
            ContractTensor(name="score", datatype="FP32", shape=[-1, 2], labels=["no", "yes"]),
            ContractTensor(name="id", datatype="INT64", shape=[-1]),
        ],
        "batchable": True,
        "batch_invariant": True,
        "opset": 20,
        "torch": "2.13.0",
        "onnxruntime": "1.32.0",
        "provider": "CPUExecutionProvider",
        "samples": Samples.from_arrays(
            3,
            {"x": np.arange(6, dtype=np.float32).reshape(3, 2), "text": np.array(["a", "", "ü"], object)},
            {"score": np.array([[0.1, 1], [NAN, INF], [-INF, 2]]), "id": np.array([2**63 - 1, -(2**63), 0])},
        ),
        "tolerance": TOLERANCE,
        "largest_difference": 1e-7,
    }
    return Contract(**{**fields, **changes})


def good_answers() -> dict[str, np.ndarray[Any, Any]]:
    return {
        "score": np.array([[0.1, 1], [NAN, INF], [-INF, 2]], np.float32),
        "id": np.array([2**63 - 1, -(2**63), 0], np.int64),
    }


def test_a_contract_comes_back_from_its_file_as_it_was(tmp_path: Path) -> None:
    contract = make()
    contract.save(tmp_path / CONTRACT_FILE)
    again = Contract.load(tmp_path / CONTRACT_FILE)
    assert again == contract
    inputs, expected = again.input_arrays(), again.expected_arrays()
    assert (inputs["x"].dtype, inputs["text"].dtype) == (np.float32, object)
    assert (expected["score"].dtype, expected["id"].dtype) == (np.float64, np.int64)
    np.testing.assert_array_equal(inputs["text"], ["a", "", "ü"])
    np.testing.assert_array_equal(expected["score"], [[0.1, 1], [NAN, INF], [-INF, 2]])
    np.testing.assert_array_equal(expected["id"], np.array([2**63 - 1, -(2**63), 0]))


def test_the_file_is_strict_json(tmp_path: Path) -> None:
    make().save(tmp_path / CONTRACT_FILE)

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    data = json.loads((tmp_path / CONTRACT_FILE).read_text("utf-8"), parse_constant=refuse)
    assert data["samples"]["expected"]["score"] == [[0.1, 1.0], ["NaN", "Infinity"], ["-Infinity", 2.0]]


@pytest.mark.parametrize(
    ("datatype", "kind", "bits"), [("FP16", np.float16, 16), ("FP32", np.float32, 32), ("FP64", np.float64, 64)]
)
def test_every_float_is_kept_to_the_last_bit(datatype: str, kind: type, bits: int) -> None:
    @settings(max_examples=200)
    @given(patterns=st.lists(st.integers(0, 2**bits - 1), min_size=1, max_size=8))
    def holds(patterns: list[int]) -> None:
        values = np.array(patterns, f"u{bits // 8}").view(kind)
        spec = ContractTensor(name="x", datatype=datatype, shape=[-1])
        samples = Samples.from_arrays(len(values), {"x": values}, {"y": values.astype(np.float64)})
        contract = make(inputs=[spec], outputs=[spec.model_copy(update={"name": "y"})], samples=samples)
        again = Contract.model_validate(json.loads(contract.model_dump_json()))
        got = again.input_arrays()["x"]
        assert got.dtype == kind
        number = ~np.isnan(values)
        assert got[number].tobytes() == values[number].tobytes()  # the sign of a zero too
        assert np.isnan(got[~number]).all()

    holds()


def _set(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        *parents, last = path.split("/")
        place: Any = data
        for part in parents:
            place = place[int(part)] if isinstance(place, list) else place[part]
        place[int(last) if isinstance(place, list) else last] = value

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_set("format", 2), "format"),
        (_set("surprise", 1), "surprise"),
        (_set("version", 0), "version"),
        (_set("version", "3"), "version"),
        (_set("tolerance/rtol", -1), "tolerance.rtol"),
        (_set("largest_difference", None), "largest_difference"),
        (_set("inputs/0/datatype", "FLOAT"), "FLOAT"),
        (_set("inputs/0/shape", [-1, -2]), "[-1, -2]"),
        (_set("inputs/0/shape", [4, 2]), "axis 0 to be the batch"),
        (_set("inputs/1/name", "x"), "twice: x"),
        (_set("outputs/0/labels", ["only"]), "1 labels for 2 places"),
        (_set("outputs", []), "outputs"),
        (_set("samples/inputs/z", [1]), "['text', 'x', 'z']"),
        (_set("samples/inputs/x", [[1, 2], [3], [4, 5]]), "samples.inputs.x"),
        (_set("samples/inputs/x", [[1, 2], [3, 4]]), "[2, 2]; expected [3, 2]"),
        (_set("samples/inputs/x", [[1, 2], [3, 1e39], [4, 5]]), "does not fit float32"),
        (_set("samples/inputs/x", [[1, 2], [3, "inf"], [4, 5]]), "'inf'"),
        (_set("samples/inputs/x", [[1, 2], [3, True], [4, 5]]), "True"),
        (_set("samples/inputs/text", ["a", 1, "b"]), "expected text"),
        (_set("samples/expected/id", [1, 2.5, 3]), "2.5"),
        (_set("samples/expected/id", [1, 2**63, 3]), "does not fit int64"),
        (_set("files", {"../model.onnx": "0" * 64}), "'../model.onnx'"),
        (_set("files", {"/etc/passwd": "0" * 64}), "'/etc/passwd'"),
        (_set("files", {"a//b": "0" * 64}), "'a//b'"),
        (_set("files", {"a\\b": "0" * 64}), "a path inside"),
        (_set("files", {"": "0" * 64}), "''"),
        (_set("files", {"a\0": "0" * 64}), "a path inside"),
        (_set("files", {CONTRACT_FILE: "0" * 64}), "its own digest"),
        (_set("files", {"model.onnx": "0" * 63}), "64 lower-case"),
    ],
)
def test_a_wrong_field_is_refused_by_name(tmp_path: Path, change: Callable[[Any], None], says: str) -> None:
    data = make().model_dump(mode="json")
    change(data)
    path = tmp_path / CONTRACT_FILE
    path.write_text(json.dumps(data), "utf-8")
    with pytest.raises(ContractError) as refusal:
        Contract.load(path)
    assert str(refusal.value).startswith(f"{path}: ")
    assert says in str(refusal.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"version": NaN}', b"[" * 100_000])
def test_a_file_that_is_no_contract_is_refused_by_its_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / CONTRACT_FILE
    path.write_bytes(content)
    with pytest.raises(ContractError) as refusal:
        Contract.load(path)
    assert str(refusal.value).startswith(f"{path}: ")


def test_no_file_is_refused_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(ContractError, match=r"nowhere\.json: cannot be read: No such file"):
        Contract.load(tmp_path / "nowhere.json")


def _version(folder: Path, **contents: bytes) -> Contract:
    """A folder with these files, and a contract that lists them (`a__b` is the file b in the folder a)."""
    files = {name.replace("__", "/"): content for name, content in contents.items()}
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    contract = make({name: hashlib.sha256(content).hexdigest() for name, content in files.items()})
    contract.save(folder / CONTRACT_FILE)
    return contract


def test_files_as_they_were_verify(tmp_path: Path) -> None:
    _version(tmp_path, model=b"network", data__weights=b"numbers").verify_files(tmp_path)


def test_a_changed_file_is_found(tmp_path: Path) -> None:
    contract = _version(tmp_path, model=b"network")
    (tmp_path / "model").write_bytes(b"netw0rk")
    with pytest.raises(ContractError, match=rf"{tmp_path / 'model'}: was changed"):
        contract.verify_files(tmp_path)


def test_a_missing_and_an_extra_file_are_found(tmp_path: Path) -> None:
    contract = _version(tmp_path, model=b"network", weights=b"numbers")
    (tmp_path / "weights").rename(tmp_path / "other")
    with pytest.raises(ContractError, match="missing weights"):
        contract.verify_files(tmp_path)
    (tmp_path / "weights").write_bytes(b"numbers")
    with pytest.raises(ContractError, match="has other, which its contract does not list"):
        contract.verify_files(tmp_path)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ContractError, match="is not a folder"):
        make().verify_files(tmp_path / "nowhere")


def test_a_mounted_volume_of_kubernetes_verifies(tmp_path: Path) -> None:
    # It swaps all files at once: every name is a link into ..data, itself a link to a folder with the date.
    stamped = tmp_path / "..2024_05_01_12_00_00.123456789"
    contract = _version(stamped, model=b"network")
    (tmp_path / "..data").symlink_to(stamped.name)
    for name in ("model", CONTRACT_FILE):
        (tmp_path / name).symlink_to(f"..data/{name}")
    contract.verify_files(tmp_path)
    (stamped / "model").write_bytes(b"netw0rk")
    with pytest.raises(ContractError, match="was changed"):
        contract.verify_files(tmp_path)


def test_a_version_folder_that_is_a_link_verifies(tmp_path: Path) -> None:
    contract = _version(tmp_path / "real", model=b"network")
    (tmp_path / "1").symlink_to("real")
    contract.verify_files(tmp_path / "1")


def test_a_link_out_of_the_folder_is_refused_even_with_the_right_content(tmp_path: Path) -> None:
    folder = tmp_path / "1"
    contract = _version(folder, model=b"network")
    (folder / "model").rename(tmp_path / "elsewhere")
    (folder / "model").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ContractError, match="outside the version's folder"):
        contract.verify_files(folder)


def test_a_ring_of_links_ends(tmp_path: Path) -> None:
    contract = _version(tmp_path, model=b"network")
    (tmp_path / "self").symlink_to(".")
    contract.verify_files(tmp_path)  # it leads to nothing that was not seen
    (tmp_path / "ring").symlink_to("ring")
    with pytest.raises(ContractError):
        contract.verify_files(tmp_path)


def test_the_digest_is_sha256(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    assert file_digest(tmp_path / "f") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_good_answers_hold() -> None:
    answers = good_answers()
    answers["score"][0, 0] += 1e-6
    difference = make().check({**answers, "hidden_1": np.zeros(1)})
    assert difference.failure is None
    assert difference.largest == pytest.approx(1e-6, rel=0.05)


def _spoil(output: str, place: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(answers: dict[str, Any]) -> None:
        answers[output][place] = value

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        # allowed: 1e-5 + 1e-4 x 2 = 2.1e-4
        (_spoil("score", (2, 1), 2.5), ["'score' at [2, 1]", "expected 2,", "got 2.5", "0.5", "0.00021", "1 of 6"]),
        (_spoil("score", (1, 0), 0.0), ["'score' at [1, 0]", "expected nan", "got 0"]),
        (_spoil("score", (2, 1), NAN), ["'score' at [2, 1]", "expected 2,", "got nan"]),
        (_spoil("score", (1, 1), -INF), ["'score' at [1, 1]", "expected inf", "got -inf"]),
        (_spoil("id", 0, 2**63 - 2), ["'id' at [0]", "9223372036854775807", "9223372036854775806", "allowed 0"]),
        (lambda a: a.pop("id"), ["'id' is missing"]),
        (lambda a: a.update(id=np.array([1, 2])), ["'id' has shape [2]", "expected [3]"]),
        (lambda a: a.update(id=a["id"].astype(np.int32)), ["'id' has dtype int32", "INT64"]),
        (lambda a: a.update(score=a["score"].astype(np.float64)), ["'score' has dtype float64", "FP32"]),
    ],
)
def test_a_wrong_answer_is_told_by_output_place_and_amount(change: Callable[[Any], Any], says: list[str]) -> None:
    answers = good_answers()
    change(answers)
    with pytest.raises(ContractError) as refusal:
        make().check(answers)
    for part in says:
        assert part in str(refusal.value)


@pytest.mark.parametrize("off", [0.99, 1.01])
def test_the_tolerance_is_absolute_plus_relative(off: float) -> None:
    expected = np.array([0.0, 100.0, -3.0])
    allowed = TOLERANCE.atol + TOLERANCE.rtol * np.abs(expected)
    for place in range(3):
        got = expected.copy()
        got[place] += off * allowed[place]
        difference = compare({"y": got}, {"y": expected}, TOLERANCE)
        assert (difference.failure is None) == (off < 1)


@pytest.mark.parametrize("dtype", [np.bool_, np.uint64, np.int8, object])
def test_what_is_no_float_must_be_equal(dtype: type) -> None:
    expected = np.array(["a", "b"] if dtype is object else [0, 1], dtype)
    assert compare({"y": expected.copy()}, {"y": expected}, TOLERANCE).failure is None
    assert compare({"y": expected[::-1]}, {"y": expected}, TOLERANCE).largest == 1


def test_the_largest_difference_of_64_bit_integers_does_not_wrap() -> None:
    low, high = np.array([-(2**63)]), np.array([2**63 - 1])
    assert compare({"y": low}, {"y": high}, TOLERANCE).largest == pytest.approx(2.0**64)


def test_empty_and_single_answers_compare() -> None:
    assert compare({"y": np.zeros((0, 3), np.float32)}, {"y": np.zeros((0, 3))}, TOLERANCE).failure is None
    assert "at []" in str(compare({"y": np.float32(1)}, {"y": np.array(2.0)}, TOLERANCE).failure)
