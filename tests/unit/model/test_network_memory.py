"""What a network is said to take, beside what a process has more of once it is open: real resident memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper
from tests.service import models

from forwardpass.errors import ModelError
from forwardpass.model.network_memory import OF_A_SESSION, network_memory

# Opens a network as a server does, runs it once, and prints by how much the process grew.
OPENED = """
import ctypes, sys
from pathlib import Path
import numpy as np
from forwardpass.execution.ort_session import OrtSession
from forwardpass.execution.placement import CPU, Placement
from forwardpass.server.memory_trim import resident_bytes
here = Placement(CPU, 0, 1, "")
def opened(path):
    session = OrtSession(Path(path), here)
    session.run([np.ones((1, session.signature.inputs[0].shape[1]), np.float32)], (0,))
    return session
kept = [opened(sys.argv[1])]
trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda _: 0)
trim(0)
before = resident_bytes()
kept.append(opened(sys.argv[2]))
trim(0)
print(resident_bytes() - before)
"""


def long(nodes: int) -> onnx.ModelProto:
    """A chain of small nodes that no optimizer makes fewer of."""
    made = [
        helper.make_node("Sin" if i % 2 else "Cos", [f"v{i}" if i else "x"], [f"v{i + 1}" if i < nodes - 1 else "y"])
        for i in range(nodes)
    ]
    return models.network(made, [("x", models.FLOAT, ["batch", 4])], [("y", models.FLOAT, ["batch", 4])])


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc/self/statm")
@pytest.mark.parametrize("kind", ["weights", "weights beside it", "nodes"])
def test_it_is_what_a_process_grows_by(tmp_path: Path, kind: str) -> None:
    small = models.save(tmp_path, "small", models.chain()) / "model.onnx"
    model = long(5000) if kind == "nodes" else models.chain((4, 1500, 1500, 1500, 4))
    path = models.save(tmp_path, "large", model) / "model.onnx"
    if kind == "weights beside it":
        onnx.save(model, str(path), save_as_external_data=True, location="weights.bin")
    done = subprocess.run(
        [sys.executable, "-c", OPENED, str(small), str(path)], capture_output=True, text=True, check=True, timeout=120
    )
    took, said = int(done.stdout), network_memory(path)
    assert 0.75 * took < said < 1.25 * took, f"{kind}: took {took}, said {said}"


def test_weights_in_several_tensors_of_one_file_count_once(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(models.chain((4, 300, 300, 4)), str(path), save_as_external_data=True, location="w", size_threshold=0)
    sizes = path.stat().st_size + (tmp_path / "w").stat().st_size
    assert sizes < network_memory(path) - OF_A_SESSION < sizes + 5 * 4000


def test_what_is_no_network_raises(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    for text in (b"", np.zeros(100, np.uint8).tobytes(), b"\xff" * 50):
        path.write_bytes(text)
        with pytest.raises(ModelError):
            network_memory(path)
    with pytest.raises(ModelError):
        network_memory(tmp_path / "nowhere.ort")
    (tmp_path / "some.ort").write_bytes(bytes(1000))
    assert network_memory(tmp_path / "some.ort") == 1000 + OF_A_SESSION
