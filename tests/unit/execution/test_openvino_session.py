"""OpenVINO's provider where it is installed (onnxruntime-openvino in place of onnxruntime), and where it is not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from tests.service import models
from tests.unit.made import ids

from forwardpass.batching.admission import Admission
from forwardpass.errors import SettingsError
from forwardpass.execution.cpu_budget import CpuBudget
from forwardpass.execution.openvino_session import detect_openvino
from forwardpass.execution.placement import OPENVINO
from forwardpass.execution.providers import available, open_session, place
from forwardpass.model.options import ModelConfig
from forwardpass.repository.loader import LoadRequest, load
from forwardpass.settings import Settings

HERE = detect_openvino()
needs_openvino = pytest.mark.skipif(not HERE.count, reason=f"needs OpenVINO: {HERE.missing}")


@pytest.mark.skipif(bool(HERE.count), reason="needs an onnxruntime without OpenVINO")
def test_where_it_is_not_there_it_says_what_to_install() -> None:
    assert "openvino" not in available()
    with pytest.raises(SettingsError, match=r"openvino cannot be had.*pip install onnxruntime-openvino in place of"):
        place("openvino", 1, "")


@pytest.mark.parametrize("wanted", ["openvino:0", "openvino:GPU"])
def test_it_has_no_numbered_devices(wanted: str) -> None:
    with pytest.raises(SettingsError, match="provider: expected auto, cpu, cuda, cuda:N, cuda:N,M or openvino"):
        place(wanted, 1, "")


@needs_openvino
@pytest.mark.parametrize("rows", [1, 7, 64])
def test_it_answers_as_the_cpu_provider_does(rows: int, tmp_path: Path) -> None:
    path = tmp_path / f"{next(ids)}.onnx"
    onnx.save(models.chain(), str(path))
    placement = place("openvino", 1, "for a test")
    assert (placement.provider, placement.label, placement.devices) == (OPENVINO, "openvino", ())
    session, reference = open_session(path, placement), open_session(path, place("cpu", 1, "for a test"))
    x = np.random.default_rng(0).standard_normal((rows, 4)).astype(np.float32)
    (found,), (expected,) = session.run([x], (0,)), reference.run([x], (0,))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert session.bound(x, 0, found) is None and session.long_task(print) is None


@needs_openvino
def test_a_model_is_served_by_it(tmp_path: Path) -> None:
    folder = models.save(tmp_path, "m", models.chain())
    settings = Settings(repository=tmp_path, provider="openvino", max_batch_size=8)
    loaded = load(
        LoadRequest("m", "1", folder, ModelConfig(), settings, CpuBudget(2, "for a test"), Admission(100, 1 << 20))
    )
    assert loaded.placement.label == "openvino" and loaded.invariance.batches
    loaded.worker.start()
    assert loaded.worker.close(5.0)
