"""The row that comes alone: bound to its buffers, it gets the answer that any run would give it, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from tests.service import models
from tests.unit.made import Target, raw, request_for, session

from forwardpass.errors import DeadlineExceeded, RunFailed
from forwardpass.execution.bound_row import bind
from forwardpass.execution.ort_session import OrtSession, new_run_options
from forwardpass.inference.batch_runner import BatchRunner


def _opened(folder: Path, model: onnx.ModelProto) -> OrtSession:
    return session(model, folder)


def test_every_row_is_answered_as_by_any_run(tmp_path: Path) -> None:
    opened = _opened(tmp_path, models.chain())
    lone = bind(opened.signature, opened)
    assert lone is not None
    for seed in range(50):
        row = np.random.default_rng(seed).standard_normal((1, 4)).astype(np.float32)
        (expected,) = opened.run([row], (lone.place,))
        assert lone.answer(raw(row), new_run_options()) == expected.tobytes()
        assert (1, *lone.trailing) == expected.shape


def test_an_answer_outlives_the_next_one(tmp_path: Path) -> None:
    opened = _opened(tmp_path, models.chain())
    lone = bind(opened.signature, opened)
    assert lone is not None
    first = lone.answer(raw(np.ones((1, 4), np.float32)), new_run_options())
    kept = bytes(bytearray(first))
    lone.answer(raw(np.zeros((1, 4), np.float32)), new_run_options())
    assert first == kept


def test_a_run_that_is_ended_says_so_and_the_next_one_works(tmp_path: Path) -> None:
    opened = _opened(tmp_path, models.chain())
    target = Target(opened.signature, "m", "3")
    runner = BatchRunner(opened, opened.signature, 64, True, shared=False)
    request = request_for(target, [np.ones((1, 4), np.float32)])
    options = new_run_options()
    options.terminate = True
    with pytest.raises((DeadlineExceeded, RunFailed)):
        runner.run_single_row(request, options, [])
    assert runner.run_single_row(request, new_run_options(), []) is not None


def test_the_response_is_that_of_the_usual_way(tmp_path: Path) -> None:
    opened = _opened(tmp_path, models.chain())
    target = Target(opened.signature, "m", "3")
    runner = BatchRunner(opened, opened.signature, 64, True)
    request = request_for(target, [np.ones((1, 4), np.float32)], id="7")
    assert runner.run_single_row(request, new_run_options(), []) is None  # others may run at the same time
    outputs, wanted = runner.run([request], new_run_options(), [])
    (usual,) = runner.scatter([request], outputs, wanted)
    runner = BatchRunner(opened, opened.signature, 64, True, shared=False)
    for _ in range(2):
        assert runner.run_single_row(request, new_run_options(), []) == usual
    two = request_for(target, [np.ones((2, 4), np.float32)])
    assert runner.run_single_row(two, new_run_options(), []) is None


@pytest.mark.parametrize("model", [models.relu_any_width, models.two_by_two, models.twice_the_rows, models.table])
def test_what_has_no_fixed_row_is_not_bound(tmp_path: Path, model: Callable[[], onnx.ModelProto]) -> None:
    opened = _opened(tmp_path, model())
    lone = bind(opened.signature, opened)
    if lone is not None:  # then it must be as good as any run
        (given,) = opened.signature.inputs
        row = np.zeros((1, *given.shape[1:]), given.datatype.numpy)
        assert lone.answer(raw(row), new_run_options()) == opened.run([row], (lone.place,))[0].tobytes()
    assert lone is None or model is models.table
