"""Memory of a pass, measured: the backward cache is there with autograd and only with it, and no server keeps one."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.unit.insight.made import chain, save

from forwardpass.insight.memory import MODES, MemoryPoint, Served, measure, said, serve
from forwardpass.insight.model_argument import Source

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs Linux: /proc/self/clear_refs and the marks of /proc"
)

ROWS, WIDTH = 8192, 256
ONE = 4 * ROWS * WIDTH  # bytes of one activation: 8.4 MB
SLACK = 1_000_000  # what else a process may take meanwhile, and pages around tensors


@pytest.fixture(scope="module")
def points(tmp_path_factory: pytest.TempPathFactory) -> dict[str, MemoryPoint]:
    path = save(chain(4, WIDTH, WIDTH, WIDTH, 3), tmp_path_factory.mktemp("memory"))
    found = list(measure(path, [ROWS]))
    assert [point.mode for point in found] == list(MODES)
    return {point.mode: point for point in found}


def test_autograd_holds_every_activation(points: dict[str, MemoryPoint]) -> None:
    kept = points["autograd"]
    assert kept.saved == 3 * ONE
    assert abs(kept.held - (3 * ONE + 4 * ROWS * 3)) < SLACK
    # At its peak one more: z of the last hidden layer, beside what is kept.
    assert abs(kept.peak - 4 * ONE) < SLACK


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode"])
def test_without_it_two_activations_are_alive_at_once(points: dict[str, MemoryPoint], mode: str) -> None:
    free = points[mode]
    assert free.saved == 0
    assert abs(free.peak - 2 * ONE) < SLACK
    assert free.held < SLACK


def test_the_session_keeps_its_arena_and_no_more(points: dict[str, MemoryPoint]) -> None:
    session = points["session"]
    assert session.saved == 0
    assert 2 * ONE - SLACK < session.held < 4 * ONE
    assert abs(session.peak - session.held) < SLACK


def test_what_is_said_is_what_was_measured(points: dict[str, MemoryPoint]) -> None:
    lines = said(list(points.values()), Served((0, 50, 100, 150, 200), (70, 80, 80, 80, 80)))
    assert lines[0].startswith("autograd keeps 3,072 bytes a row")
    assert lines[-1].startswith("a server was at 80 B after 100 requests and at 80 B after 200: +0.0 bytes a request")
    assert "13,824 bytes a request" in lines[-1]  # 4.5 rows of 3,072 bytes


def test_a_leak_would_be_seen() -> None:
    assert Served((0, 100, 200, 300), (1000, 5000, 5700, 6400)).slope == pytest.approx(7.0)


@pytest.mark.slow
def test_a_server_keeps_nothing_of_its_requests(tmp_path: Path) -> None:
    wide = 2048
    served = serve(Source("wide", "", save(chain(4, wide, wide, 3), tmp_path), None), 1000)
    assert served.requests[0] == 0 and served.requests[-1] == 1000
    assert all(nbytes > 10_000_000 for nbytes in served.resident)
    # 4.5 rows of two activations for each of 500 requests would be 18 MB.
    assert served.resident[-1] - served.resident[len(served.resident) // 2] < 4_000_000
