"""Networks on the CPU run in one arena: what one run took serves the next, whichever network it is of."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from tests.service import models

from forwardpass.execution import shared_arena
from forwardpass.execution.ort_session import OrtSession
from forwardpass.execution.placement import CPU, Placement

LARGE = 25_000_000  # elements that `allocate` makes: 200 MB
ON_CPU = Placement(CPU, 0, 1, "")


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def opened(tmp_path: Path) -> OrtSession:
    path = tmp_path / "model.onnx"
    onnx.save(models.allocate(), path)
    return OrtSession(path, ON_CPU, opening=shared_arena.use)


def run(session: OrtSession, elements: int = LARGE) -> None:
    session.run([np.array([[elements]], np.int64)], (0,))


def test_the_network_that_shrinks_it_is_one() -> None:
    model = onnx.load_from_string(shared_arena.IDENTITY)
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node] == ["Identity"]


def test_networks_share_what_their_runs_take_and_give_it_back_together(tmp_path: Path) -> None:
    first, others = opened(tmp_path), [opened(tmp_path) for _ in range(4)]
    for session in (first, *others):
        run(session, 1000)
    shared_arena.shrink()
    before = resident()
    run(first)
    assert resident() - before > 100e6
    for session in others:
        run(session)
    assert resident() - before < 300e6  # that of one run, not of five
    del first, others, session
    shared_arena.shrink()
    assert resident() - before < 50e6


def test_an_onnx_runtime_that_cannot_share_one_is_no_reason_not_to_serve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("not here")

    monkeypatch.setattr(shared_arena, "_session", None)
    monkeypatch.setattr(shared_arena, "_is_missing", False)
    monkeypatch.setattr(shared_arena.ort, "create_and_register_allocator", refuse)
    for _ in range(2):
        run(opened(tmp_path), 1000)
    shared_arena.shrink()
    assert caplog.text.count("every network has an arena of its own: not here") == 1
