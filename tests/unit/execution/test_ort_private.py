"""The private names of onnxruntime that are used, and that all works without them."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from tests.service import models
from tests.unit.made import session

from forwardpass.execution.onnx_runtime import ort
from forwardpass.execution.ort_private import run_bound_of, run_of


def test_this_version_has_the_names(tmp_path: Path) -> None:
    opened = session(models.chain(), tmp_path)._session
    assert run_of(opened) == opened._sess.run, f"onnxruntime {ort.__version__} runs with its own checks"
    call, argument = run_bound_of(opened)
    binding = opened.io_binding()
    assert (call, argument(binding)) == (opened._sess.run_with_iobinding, binding._iobinding)


def test_a_version_without_them_is_called_as_it_offers() -> None:
    public = SimpleNamespace(
        run=lambda *_: "run", run_with_iobinding=lambda *_: "bound", io_binding=lambda: SimpleNamespace()
    )
    assert run_of(public)() == "run"
    call, argument = run_bound_of(public)
    binding = np.zeros(1)
    assert call() == "bound" and argument(binding) is binding


def test_they_stand_in_one_file() -> None:
    package = Path(__file__).parents[3] / "server" / "forwardpass"
    users = [path.name for path in package.rglob("*.py") if re.search(r"\b_(sess|iobinding)\b", path.read_text())]
    assert users == ["ort_private.py"]
