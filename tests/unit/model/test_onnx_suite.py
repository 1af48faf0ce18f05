"""ONNX's own backend cases with axis 0 made a batch: no operator that is called independent mixes rows.

Every case that ONNX Runtime takes is run: five rows together, each alone.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from forwardpass.execution.onnx_runtime import ort
from forwardpass.model.row_flow import RowFlow, prove

ROWS = 5


def batched(case: Any) -> onnx.ModelProto | None:
    """The case's model with a symbolic axis 0 everywhere; None where something has no axis."""
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in constants]
    for value in (*inputs, *model.graph.output):
        kind = value.type.tensor_type
        if not value.type.HasField("tensor_type") or not kind.HasField("shape") or not kind.shape.dim:
            return None
        kind.shape.dim[0].ClearField("dim_value")
        kind.shape.dim[0].dim_param = "batch"
    del model.graph.value_info[:]
    return model if inputs else None


def close(one: Any, other: Any) -> bool:
    one, other = np.asarray(one), np.asarray(other)
    if one.shape != other.shape:
        return False
    if one.dtype.kind not in "fc":
        return bool((one == other).all())
    wide = 2e-2 if one.dtype == np.float16 else 1e-4
    return bool(np.allclose(one.astype(np.float64), other.astype(np.float64), rtol=wide, atol=wide, equal_nan=True))


def truth(session: Any, arrays: list[Any]) -> str:
    """What running says: independent, dependent, no batch, or that it cannot be run."""
    names = [value.name for value in session.get_inputs()]

    def run(given: list[Any]) -> list[Any]:
        return [np.asarray(found) for found in session.run(None, dict(zip(names, given, strict=True)))]

    try:
        together = run(arrays)
        alone = [run([array[i : i + 1] for array in arrays]) for i in range(ROWS)]
    except Exception:
        return "cannot be run"
    if any(not output.ndim or len(output) != ROWS for output in together):
        return "no batch"
    same = all(
        len(alone[i][k]) == 1 and close(output[i], alone[i][k][0])
        for k, output in enumerate(together)
        for i in range(ROWS)
    )
    return "independent" if same else "dependent"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_no_operator_that_is_called_independent_mixes_rows(tmp_path: Path) -> None:
    from onnx.backend.test.case.node import collect_testcases

    found: Counter[tuple[str, str]] = Counter()
    wrong = []
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    for case in collect_testcases(None):
        model = batched(case) if case.model is not None and case.data_sets else None
        if model is None:
            continue
        path = tmp_path / "case.onnx"
        onnx.save(model, str(path))
        try:
            session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception:
            continue
        arrays = [np.asarray(array) for array in case.data_sets[0][0]]
        if len(arrays) != len(session.get_inputs()) or any(not array.ndim for array in arrays):
            continue
        proof = prove(path)
        says = truth(session, [np.resize(array, (ROWS, *array.shape[1:])) for array in arrays])
        found[proof.flow.value, says] += 1
        if proof.flow is RowFlow.INDEPENDENT and says not in ("independent", "cannot be run"):
            wrong.append((case.name, says))
    print("\n".join(f"{flow}, {says} when run: {count}" for (flow, says), count in sorted(found.items())))
    assert not wrong
    assert found["independent by construction", "independent"] > 400, found
