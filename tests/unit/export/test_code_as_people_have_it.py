"""Networks with dataclasses, ModelOutputs and named tuples for answers, and with inputs by keyword alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from torch import nn

from forwardpass.errors import ExportError
from forwardpass.export import export
from forwardpass.model.contract import MODEL_FILE
from networks import AnyKeyword, ByKeyword, Detects, GivesText, Mlp, Nested

pytestmark = pytest.mark.usefixtures("one_thread")


def exported(network: nn.Module, *inputs: str, folder: Path) -> Any:
    return onnxruntime.InferenceSession(export(network, inputs, "m", folder).path / MODEL_FILE)


def test_fields_of_a_dataclass_become_the_outputs_names(tmp_path: Path) -> None:
    session = exported(Detects(), "x:float32[batch,5]", folder=tmp_path)
    assert [(value.name, value.shape[1:]) for value in session.get_outputs()] == [("boxes", [4]), ("score", [1])]


def test_what_is_in_a_model_output_becomes_the_outputs_names(tmp_path: Path) -> None:
    session = exported(Nested(), "x:float32[batch,5]", folder=tmp_path)
    names = [value.name for value in session.get_outputs()]
    assert names == ["last", "scores_logits", "scores_pooled", "attentions_1"]
    x = np.arange(5, dtype=np.float32)[None]
    for name, expected in zip(names, (x * 2, x + 1, x.mean(1), np.tanh(x)), strict=True):
        np.testing.assert_allclose(session.run([name], {"x": x})[0], expected, rtol=1e-6)


def test_inputs_may_be_keywords_alone(tmp_path: Path) -> None:
    session = exported(ByKeyword(), "item:float32[n,5]", "user:float32[n,5]", folder=tmp_path)
    item, user = np.ones((2, 5), np.float32), np.full((2, 5), 3, np.float32)
    assert (session.run(None, {"item": item, "user": user})[0] == 5).all()


def test_inputs_may_have_any_name_where_forward_takes_any_keyword(tmp_path: Path) -> None:
    session = exported(AnyKeyword(), "income:float32[n,2]", "age:float32[n,2]", folder=tmp_path)
    age, income = np.full((3, 2), 4, np.float32), np.ones((3, 2), np.float32)
    assert (session.run(None, {"income": income, "age": age})[0] == 7).all()


@pytest.mark.parametrize(
    ("network", "inputs", "says"),
    [
        (GivesText(), ["x:float32[n,5]"], ["forward gave a str (done) at '1'", "expected tensors, alone or in tuples"]),
        (ByKeyword(), ["a:float32[n,5]", "b:float32[n,5]"], ["forward(*, user", "does not take a, b", "the names of"]),
        (Mlp(), ["x:float32[n,5]", "y:float32[n,5]"], ["forward(x", "does not take x, y", "in the order of its para"]),
    ],
)
def test_what_is_not_understood_is_shown_beside_what_would_be(
    network: nn.Module, inputs: list[str], says: list[str], tmp_path: Path
) -> None:
    with pytest.raises(ExportError) as caught:
        export(network, inputs, "m", tmp_path)
    for part in says:
        assert part in str(caught.value)
