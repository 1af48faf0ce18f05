"""A step in a process of its own: what it refuses, how it ends otherwise, and what the error then says."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from forwardpass.errors import ExportError
from forwardpass.export.child_process import run_step

STEP = "ending_step"


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """`ending_step`, which lies beside this file, is a module that a child can be started with."""
    monkeypatch.setenv("PYTHONPATH", ":".join([str(Path(__file__).parent), *sys.path]))


def failure(*arguments: str, **more: Any) -> str:
    with pytest.raises(ExportError) as caught:
        run_step(STEP, arguments, "the step", **more)
    return str(caught.value)


def test_a_step_that_ends_well_leaves_what_it_wrote(tmp_path: Path) -> None:
    run_step(STEP, ["write", tmp_path / "there"], "the step")
    assert (tmp_path / "there").read_text() == "written"


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGKILL])
def test_a_crash_is_an_error_that_names_the_signal_and_the_stage(number: signal.Signals) -> None:
    assert failure("crash", str(int(number))) == (
        f"the step: its process was ended by {number.name} while doing the second thing; nothing was written"
    )


def test_a_step_that_hangs_is_ended() -> None:
    assert failure("hang", seconds=1.0).startswith("the step: not at an end after 1 s of ")


def test_a_refusal_is_what_the_step_says_and_a_fault_is_its_last_line() -> None:
    assert failure("refuse") == "the network is not of that kind:\nit has no layers"
    assert failure("fail") == "the step: failed while doing the second thing: ZeroDivisionError: division by zero"


def test_half_precision_is_converted_apart(tmp_path: Path) -> None:
    from tests.service.models import chain

    from forwardpass.export.fp16_process import halve_apart

    half = halve_apart(chain().SerializeToString(), {"x": np.ones((2, 4), np.float32)})
    assert b"x.half" in half
    with pytest.raises(ExportError, match="ONNX Runtime refuses the converted network"):
        halve_apart(chain().SerializeToString(), {"x": np.ones((2, 5), np.float32)})
