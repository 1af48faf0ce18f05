"""Networks as people write them, exported by PyTorch: what is proved of their rows, against what running them says."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.unit.model.torch_networks import BATCH, INDEPENDENT, KINDS, MIXES

from forwardpass.execution.onnx_runtime import ort
from forwardpass.model.row_flow import prove

DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "repositories.md"


def test_the_table_of_networks_counts_them() -> None:
    rows = ["| networks | number | what the graph is found to do |", "| --- | --- | --- |"]
    rows += [f"| {kind} | {len(cases())} | {flow.value} |" for kind, (flow, cases) in KINDS.items()]
    assert "\n".join(rows) in DOCUMENT.read_text("utf-8"), "\n".join(rows)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, (_, cases) in KINDS.items() for name in cases()])
def test_what_is_proved_is_what_running_says(kind: str, name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    expected, cases = KINDS[kind]
    network, inputs = cases()[name]
    path = tmp_path / "model.onnx"
    batch = torch.export.Dim("batch")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        torch.onnx.export(
            network.eval(), inputs, str(path), dynamo=True, external_data=False,
            dynamic_shapes=tuple({0: batch} for _ in inputs),
        )  # fmt: skip
    proof = prove(path)
    assert proof.flow is expected, proof
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    rng = np.random.default_rng(0)
    rows = [np.asarray(tensor) for tensor in inputs]

    def run(arrays: list[Any]) -> Any:
        return session.run(None, dict(zip(names, arrays, strict=True)))[0]

    base = run(rows)
    independent = True
    for keeps in range(BATCH):
        others = [rng.permutation(array) if array.dtype.kind == "i" else array[::-1] * 3 - 1 for array in rows]
        others = [np.ascontiguousarray(other.astype(array.dtype)) for other, array in zip(others, rows, strict=True)]
        for other, array in zip(others, rows, strict=True):
            other[keeps] = array[keeps]
        independent &= bool(np.allclose(run(others)[keeps], base[keeps], rtol=1e-4, atol=1e-5))
        independent &= bool(
            np.allclose(run([a[keeps : keeps + 1] for a in rows])[0], base[keeps], rtol=1e-4, atol=1e-5)
        )
    if proof.flow is INDEPENDENT:
        assert independent
    elif proof.flow is MIXES:
        assert not independent
