"""More calls than the server can look at in time: each has one outcome, and the connection goes on."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import http2_frames as http2
import models
import numpy as np
import pytest
from caller import Caller, request, until
from raw_client import RawClient

from conftest import Serve

CALLS = 6000
OPEN = http2.settings(initial_window_size=(1 << 31) - 1) + http2.window_update(0, (1 << 31) - 1 - 65535)


@pytest.mark.parametrize(
    ("options", "more"),
    [((), {"grpc_timeout": "25m"}), (("--max-unread-seconds", "0.05"), {})],
    ids=["deadlines", "none"],
)
def test_a_burst(serve: Serve, tmp_path: Path, options: tuple[str, ...], more: dict[str, str]) -> None:
    """It takes the server several times as long as its calls may wait."""
    models.save(tmp_path, "chain", models.chain())
    server = serve(tmp_path, "--transport", "direct", "--max-streams", "100000", *options)
    caller, raw = Caller(server), RawClient(server.address)
    message = request("chain", np.ones((1, 4), np.float32)).SerializeToString()
    good, _ = caller.send(message)
    raw.greet(OPEN)
    numbers = range(1, 2 * CALLS, 2)
    raw.send(*[raw.call(number, message, **more) for number in numbers])
    outcomes = dict[int, str]()
    for kind, _, number, payload in raw.frames():
        if kind == http2.HEADERS and "grpc-status" in payload:
            assert number not in outcomes
            outcomes[number] = payload["grpc-status"]
        elif kind == http2.RST_STREAM:
            assert number not in outcomes
            outcomes[number] = f"reset {int.from_bytes(payload, 'big')}"
        if len(outcomes) == CALLS:
            break
    count = Counter(outcomes.values())
    assert set(count) <= {"0", "4", "8", "reset 7"}
    until(caller.idle, "an idle server")
    told = {"OK": "0", "DEADLINE_EXCEEDED": "4", "RESOURCE_EXHAUSTED": "8", "UNAVAILABLE": "reset 7"}
    for code, outcome in told.items():
        assert caller.metric("forwardpass_requests_total", code=code) == count[outcome] + (code == "OK")
    raw.send(raw.call(2 * CALLS + 1, message))
    assert raw.status(2 * CALLS + 1) == "0"
    assert caller.send(message)[0] == good
    raw.close()
    caller.close()
