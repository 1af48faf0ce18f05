"""Clients that share a model's queue, over real channels: nobody is served after those who came later."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
from caller import Caller, request, until

from forwardpass.testing.server_process import ServerProcess

BLOCKS, SHORT = 1e6, 2e3  # turns of `hold`


def hold(turns: float) -> Any:
    return request("hold", np.array([[turns]], np.float32))


@pytest.mark.parametrize("transport", ["direct", "grpcio"])
def test_a_far_deadline_is_served_in_its_turn(tmp_path: Path, transport: str) -> None:
    models.save(tmp_path, "hold", models.hold(), "max_batch_size = 1\ninstances = 1\n")
    with ServerProcess(tmp_path, "--transport", transport) as server:
        caller = Caller(server)
        blocks = caller.start(hold(BLOCKS), timeout=None)
        until(lambda: caller.metric("forwardpass_running_requests", model="hold") == 1, "the run")
        before = [caller.start(hold(SHORT), timeout=None) for _ in range(20)]
        until(lambda: caller.metric("forwardpass_queue_requests", model="hold") == 20, "the queue")
        dated = caller.start(hold(SHORT), timeout=300.0)
        until(lambda: caller.metric("forwardpass_queue_requests", model="hold") == 21, "the dated request")
        after = [caller.start(hold(SHORT), timeout=None) for _ in range(20)]
        seen: list[int] = []
        dated.add_done_callback(lambda _: seen.append(sum(call.done() for call in after)))
        for call in (blocks, *before, dated, *after):
            call.result()
        until(lambda: bool(seen), "the callback")
        assert seen[0] < 10, "those who came after it were served before it"
        caller.close()
