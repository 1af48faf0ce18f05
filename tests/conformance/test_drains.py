"""Clients of five gRPC libraries that ask nobody's health lose no call while two servers are stopped by turns.

Behind the direct transport. grpcio's own server cancels what reaches it before clients have read its GOAWAY.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.conformance.clients import CLIENTS
from tests.conformance.drains import CALLERS, drain_by_turns, drain_failures

from forwardpass import protocol

DRAINS = 20


@pytest.mark.slow
@pytest.mark.parametrize("client", ["python", "go", "node", "c++", "java"])
@pytest.mark.parametrize("wait", ["0", "1"])
def test_no_call_fails(client: str, wait: str, digits_repository: Path, tmp_path: Path) -> None:
    command = CLIENTS[client](CALLERS / "callers", tmp_path)
    request = protocol.ModelInferRequest(model_name="digits")
    request.inputs.add(name="x", datatype="FP32", shape=[1, 64])
    request.raw_input_contents.append(np.zeros((1, 64), np.float32).tobytes())
    message = request.SerializeToString()
    found = drain_by_turns(digits_repository, message, tmp_path, command, DRAINS, "--drain-wait", wait)
    print(client, found)
    assert found["ok"] > 100 * DRAINS
    assert drain_failures(found) == {}
