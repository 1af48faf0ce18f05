"""A load that is ended early: before a run, within one, and while a network is opened."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from tests.service import models

from forwardpass.errors import ModelError, Stopping
from forwardpass.execution.interruption import Interruption
from forwardpass.execution.ort_session import OrtSession
from forwardpass.execution.placement import Placement

CPU = Placement("CPUExecutionProvider", 0, 1, "for a test")


def test_runs_are_those_of_the_network_until_it_stops(tmp_path: Path) -> None:
    interruption = Interruption()
    session = OrtSession(models.save(tmp_path, "m", models.chain()) / "model.onnx", CPU, opening=interruption.opening)
    network = interruption.network(session)
    x = np.ones((2, 4), np.float32)
    assert network.signature is session.signature
    assert network.run([x], (0,))[0].tobytes() == session.run([x], (0,))[0].tobytes()
    interruption.stop()
    with pytest.raises(Stopping):
        network.run([x], (0,))
    assert session.run([x], (0,))[0].shape == (2, 3)  # who serves already is not touched


def test_a_run_that_goes_on_ends(tmp_path: Path) -> None:
    interruption = Interruption()
    session = OrtSession(models.save(tmp_path, "m", models.hold()) / "model.onnx", CPU)
    network = interruption.network(session)
    timer = threading.Timer(0.05, interruption.stop)
    timer.start()
    with pytest.raises(Stopping):
        network.run([np.full((1, 1), 1e15, np.float32)], (0,))
    timer.join()


def test_nothing_is_opened_once_it_stops(tmp_path: Path) -> None:
    path = models.save(tmp_path, "m", models.chain()) / "model.onnx"
    interruption = Interruption()
    interruption.stop()
    with pytest.raises(Stopping):
        OrtSession(path, CPU, opening=interruption.opening)


def test_an_opening_that_goes_on_is_cancelled(tmp_path: Path) -> None:
    path = models.save(tmp_path, "m", models.chain()) / "model.onnx"
    interruption = Interruption()

    def opening(options: object) -> None:
        interruption.opening(options)
        interruption.stop()

    with pytest.raises(ModelError, match="cannot be opened"):
        OrtSession(path, CPU, opening=opening)
