"""A run that asks for more memory than runs may take fails before it has it, and nobody else notices."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from tests.service import models
from tests.service.caller import Caller, request

from forwardpass.testing.server_process import ServerProcess

Serve = Callable[..., ServerProcess]

SMALL, LARGE = 1_000_000, 50_000_000  # elements of 8 bytes that a run takes
X = np.arange(8, dtype=np.float32).reshape(2, 4)


def peak(server: ServerProcess) -> int:
    """The most memory that it ever had, in bytes."""
    status = Path(f"/proc/{server.pid}/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) << 10  # type: ignore[index]


@pytest.mark.parametrize("options", ["", "memory_pattern = false"])
def test_a_run_beyond_the_bound_is_refused_with_the_figures(serve: Serve, tmp_path: Path, options: str) -> None:
    models.save(tmp_path, "large", models.allocate(), options)
    models.save(tmp_path, "weights", models.chain((4, 4000, 4000, 3)))  # 64 MB
    server = serve(tmp_path, "--cpu-memory", "200MiB")
    with closing(Caller(server)) as caller:
        good = caller.infer("weights", X)[0].tobytes()
        assert caller.infer("large", np.array([[SMALL]]))[0].tolist() == [[SMALL]]
        before = peak(server)
        for _ in range(3):
            refused = caller.refused(request("large", np.array([[LARGE]])))
            assert refused.code == "RESOURCE_EXHAUSTED" and f"asks for {8 * LARGE} bytes more" in refused.text
            assert "left of --cpu-memory" in refused.text
            assert caller.infer("large", np.array([[SMALL]]))[0].tolist() == [[SMALL]]
            assert caller.infer("weights", X)[0].tobytes() == good
        assert peak(server) - before < 8 * LARGE / 4
        assert caller.metric("forwardpass_refused_total", model="large", reason="out_of_memory") == 3
