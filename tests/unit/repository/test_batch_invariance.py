"""The probe: which networks may be batched, found out by running them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper
from tests.service import models
from tests.unit.made import session, signature, tensor

from forwardpass.errors import InvalidRequest
from forwardpass.model.row_flow import Proof, RowFlow
from forwardpass.model.signature import ModelSignature, TensorSpec
from forwardpass.protocol import DATATYPES
from forwardpass.repository.batch_invariance import ROWS, Invariance, probe

FLOAT = TensorProto.FLOAT


def verdict(model: onnx.ModelProto, folder: Path, largest: int = 64, samples: Any = None) -> tuple[Invariance, str]:
    s = session(model, folder)
    return probe(s.signature, lambda arrays: s.run(arrays, tuple(range(len(s.signature.outputs)))), largest, samples)


@pytest.mark.parametrize("largest", [8, 16, 64, 100])
def test_a_chain_of_gemms_is_exact(tmp_path: Path, largest: int) -> None:
    found, why = verdict(models.chain((64, 32, 10)), tmp_path, largest)
    assert found is Invariance.EXACT and found.batches
    assert f"batches of up to {largest}" in why


@pytest.mark.parametrize(
    "model",
    [
        models.two_by_two(),
        models.relu_any_width(),
        models.table(),
        models.hold(),
        *(models.echo(e) for e in models.ELEMENTS.values()),
    ],
    ids=["two inputs", "any width", "indices", "hold", *models.ELEMENTS],
)
def test_independent_rows_are_found_so_whatever_they_are_made_of(tmp_path: Path, model: onnx.ModelProto) -> None:
    assert verdict(model, tmp_path)[0] is Invariance.EXACT


@pytest.mark.parametrize(
    "model",
    [models.quantised(), models.centred(), models.running_sum()],
    ids=["dynamically quantised", "batch mean", "cumulative"],
)
def test_neighbours_that_change_an_answer_are_caught(tmp_path: Path, model: onnx.ModelProto) -> None:
    found, why = verdict(model, tmp_path)
    assert found is Invariance.DEPENDENT and not found.batches
    assert "output 'y' differs by" in why and "in a batch of 8" in why


@pytest.mark.parametrize("largest", [16, 64, 512])
def test_what_hurts_later_rows_alone_is_caught(tmp_path: Path, largest: int) -> None:
    # The first rows of any batch always find room at their expert.
    found, why = verdict(models.capacity(least=ROWS), tmp_path, largest)
    assert found is Invariance.DEPENDENT and "output 'y' differs by" in why


def test_places_are_shuffled_and_the_largest_batch_is_the_one_that_will_be_served() -> None:
    rows, places = np.arange(ROWS * 2, dtype=np.float32).reshape(ROWS, 2) + 1e6, set()
    sizes: list[int] = []

    def run(arrays: Any) -> Any:
        sizes.append(len(arrays[0]))
        if len(arrays[0]) == 40:
            places.update(np.flatnonzero((arrays[0] >= 1e6).all(axis=1) & (arrays[0] != rows[0]).any(axis=1)).tolist())
        return [arrays[0]]

    assert probe(signature(), run, 40, [rows])[0] is Invariance.EXACT
    assert max(sizes) == 40 and max(places) >= ROWS and len(places) >= ROWS - 1


def test_real_rows_that_are_all_alike_do_not_hide_what_others_would_show(tmp_path: Path) -> None:
    alike = [np.ones((4, 12, 2), np.float32) * np.arange(4)[:, None, None].astype(np.float32), np.full(4, 12)]
    assert verdict(models.trimmed(), tmp_path, 64, alike)[0] is Invariance.DEPENDENT


def test_made_up_rows_that_the_network_refuses_count_only_where_there_are_no_real_ones(tmp_path: Path) -> None:
    assert verdict(models.table(1), tmp_path)[0] is Invariance.DEPENDENT
    found, why = verdict(models.table(1), tmp_path, 64, [np.zeros((2, 1), np.int64)])
    assert found is Invariance.EXACT and why.startswith(f"{ROWS} rows alone")


def test_made_up_rows_are_as_wide_as_real_ones(tmp_path: Path) -> None:
    sample = [np.arange(14, dtype=np.float32).reshape(2, 7)]
    assert verdict(models.relu_any_width(), tmp_path, 64, sample)[0] is Invariance.EXACT


def test_a_batch_smaller_than_the_rows_that_are_compared_is_tried_too() -> None:
    sizes: set[int] = set()

    def run(arrays: Any) -> Any:
        sizes.add(len(arrays[0]))
        return [arrays[0] * (2.0 if len(arrays[0]) == 3 else 1.0)]

    assert probe(signature(), run, 3, None)[0] is Invariance.DEPENDENT
    assert sizes == {1, 3}


def test_a_network_in_half_precision_may_round_as_such_whatever_its_outputs_are(tmp_path: Path) -> None:
    chain = session(models.chain((16, 8)), tmp_path)

    def run(off: float) -> Any:
        # As a device that picks another kernel for another batch: the same for all rows of a batch, whoever they are.
        return lambda arrays: [chain.run(arrays, (0,))[0] * np.float32(1 + off * (len(arrays[0]) > 1))]

    assert probe(chain.signature, run(1e-3), 16, None)[0] is Invariance.DEPENDENT
    assert probe(chain.signature, run(1e-3), 16, None, half=True)[0] is Invariance.ROUNDING
    assert probe(chain.signature, run(0.02), 16, None, half=True)[0] is Invariance.DEPENDENT


def test_a_network_of_bfloat16_is_compared_by_its_values() -> None:
    tensor = TensorSpec("x", DATATYPES["BF16"], (-1, 2))

    def run(off: float) -> Any:
        # As a device that picks another kernel for another batch. The bits of neighbours are far apart as integers.
        def made(arrays: Any) -> Any:
            values = tensor.datatype.widened(arrays[0]) * np.float32(1 + off * (len(arrays[0]) > 1))
            return [tensor.datatype.narrowed(values)]

        return made

    kept = ModelSignature((tensor,), (tensor,), True)
    assert probe(kept, run(0.0), 16, None)[0] is Invariance.EXACT
    assert probe(kept, run(0.01), 16, None)[0] is Invariance.ROUNDING
    assert probe(kept, run(0.5), 16, None)[0] is Invariance.DEPENDENT


def test_real_samples_are_used_where_there_are_any(tmp_path: Path) -> None:
    seen: list[NDArray[Any]] = []

    def run(arrays: Any) -> Any:
        seen.append(arrays[0])
        return [arrays[0]]

    sample = np.arange(6, dtype=np.float32).reshape(3, 2)
    assert probe(signature(), run, 20, [sample])[0] is Invariance.EXACT
    assert np.array_equal(seen[4], sample[1:2])  # the fifth row is the second sample
    assert [len(x) for x in seen[:8]] == [1] * 8 and {8, 17, 20} <= {len(x) for x in seen}
    assert {len(x) for x in seen} == {*range(1, 21)}  # of every size, for "exact" says so


@pytest.mark.parametrize(
    ("rows", "why"), [({1: 2, 8: 16}, "[16, 3]"), ({1: 5, 8: 5}, "[5, 3]"), ({1: 1, 8: 1}, "[1, 3]")]
)
def test_an_axis_that_is_no_batch_is_found_out(rows: dict[int, int], why: str) -> None:
    found, said = probe(
        signature([tensor("x", "FP32", -1, 3)], [tensor("y", "FP32", -1, 3)]),
        lambda arrays: [np.ones((rows[len(arrays[0])], 3), np.float32)],
        64,
        None,
    )
    assert found is Invariance.NONE and not found.batches
    assert said == f"output 'y' has shape {why} for 8 rows: axis 0 is not the batch"


def test_twice_the_rows_is_no_batch(tmp_path: Path) -> None:
    assert verdict(models.twice_the_rows(), tmp_path)[0] is Invariance.NONE


def test_fixed_sizes_are_no_batch(tmp_path: Path) -> None:
    assert verdict(models.echo(shape=(4, 2)), tmp_path)[0] is Invariance.NONE


def test_what_cannot_be_run_is_not_batched(tmp_path: Path) -> None:
    # Two axes that must agree, and made-up values cannot know it.
    model = models.network(
        [helper.make_node("Reshape", ["x", "s"], ["y"])],
        [("x", FLOAT, ["batch", "width"])],
        [("y", FLOAT, ["batch", 3])],
        {"s": np.array([-1, 11])},
    )
    found, why = verdict(model, tmp_path)
    assert found is Invariance.DEPENDENT and "the probe could not be run" in why


@pytest.mark.parametrize(
    ("alone", "among", "expected"),
    [
        (1.0, 1.0, Invariance.EXACT),
        (1.0, 1.0 + 2e-6, Invariance.ROUNDING),
        (1.0, 1.0 + 2e-4, Invariance.DEPENDENT),
        (np.nan, np.nan, Invariance.EXACT),
        (1.0, np.nan, Invariance.DEPENDENT),
        (np.nan, 1.0, Invariance.DEPENDENT),
        (np.inf, np.inf, Invariance.EXACT),
        (np.inf, 1.0, Invariance.DEPENDENT),
        (np.inf, -np.inf, Invariance.DEPENDENT),
        (0.0, -0.0, Invariance.ROUNDING),
    ],
)
def test_what_counts_as_rounding(alone: float, among: float, expected: Invariance) -> None:
    def run(arrays: Any) -> Any:
        value = alone if len(arrays[0]) == 1 else among
        return [np.repeat(np.array([[value, 1.0, np.inf, np.nan]], np.float32), len(arrays[0]), axis=0)]

    found = probe(signature(outputs=[tensor("y", "FP32", -1, 4)]), run, 8, None)[0]
    assert found is expected


def test_integers_may_not_differ_at_all() -> None:
    def run(arrays: Any) -> Any:
        return [np.full(len(arrays[0]), 1_000_000 + (len(arrays[0]) > 1))]

    assert probe(signature(outputs=[tensor("y", "INT64", -1)]), run, 8, None)[0] is Invariance.DEPENDENT


def test_an_answer_that_changes_from_run_to_run_is_not_batched() -> None:
    # Always within rounding of the answer alone, and yet not the same twice: something else than the row is in it.
    rng = np.random.default_rng(0)

    def run(arrays: Any) -> Any:
        return [np.asarray(arrays[0] * (1 + 1e-6 * rng.random()), np.float32)]

    assert probe(signature(), run, 8, None)[0] is Invariance.DEPENDENT


def test_a_label_that_rounding_tips_over_is_rounding_where_rows_are_proved_independent() -> None:
    """Text and whole numbers alike: they have no tolerance of their own."""
    for datatype, labels in (("BYTES", np.array(["cat", "dog"], object)), ("INT64", np.array([1, 2]))):
        of = signature(outputs=(tensor("y", datatype, -1),))

        def run(arrays: Any, labels: Any = labels) -> list[Any]:
            return [labels[(np.full(len(arrays[0]), len(arrays[0]) > 5)).astype(int)]]

        assert probe(of, run, 8, None)[0] is Invariance.DEPENDENT
        assert probe(of, run, 8, None, proof=Proof(RowFlow.INDEPENDENT))[0] is Invariance.ROUNDING


@pytest.mark.parametrize("after", [0, 1, 40, 80, 120])
def test_a_network_that_is_proved_stays_so_whichever_made_up_values_it_refuses(after: int) -> None:
    runs = iter(range(10**6))

    def run(arrays: Any) -> list[Any]:
        if next(runs) >= after:
            raise InvalidRequest("no such row")
        return [arrays[0] * 2]

    assert probe(signature(), run, 8, None, proof=Proof(RowFlow.INDEPENDENT))[0].batches
