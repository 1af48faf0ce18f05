"""The document: what it says of real requests to real models, and when counters are sampled."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.service import models
from tests.unit.status.conftest import Watched, X

from forwardpass.execution.cpu_budget import CpuBudget
from forwardpass.repository.model_version import VersionState
from forwardpass.status import snapshot


def test_figures_are_those_of_the_requests_since(watched: Callable[[], Watched]) -> None:
    server = watched()
    server.ask("one", 3)  # before anybody looked
    first = server.look()
    assert first["traffic"] is None and first["window_seconds"] is None and first["chart"]["seconds_ago"] == []
    assert [m["answered"] for m in first["models"]] == [3, 0]
    server.ask("one", 10)
    server.ask("two", 5)
    second = server.look(2.0)
    assert second["window_seconds"] == 2.0
    assert second["traffic"]["requests_per_second"] == 7.5 and second["traffic"]["rows_per_batch"] == 2
    one, two = second["models"]
    assert (one["name"], one["traffic"]["requests_per_second"], two["traffic"]["requests_per_second"]) == (
        "one",
        5,
        2.5,
    )
    assert one["traffic"]["stages"]["total"]["p99"] >= one["traffic"]["stages"]["total"]["p50"] > 0
    assert second["chart"]["requests_per_second"] == [7.5] and one["chart"] == [5.0]
    assert one["state"] == "ready" and one["inputs"][0]["shape"] == [-1, 4] and one["contract"] is None
    assert one["batching"]["batches"] and one["batching"]["most_rows"] == 16


def test_every_viewer_gets_the_same_and_one_more_costs_nothing(watched: Callable[[], Watched]) -> None:
    server = watched()
    server.look()
    server.ask("one", 10)
    before = server.source.document()
    assert all(server.source.document() is before for _ in range(50))
    assert server.look(1.01 * snapshot.STEP)["models"][0]["answered"] == 10


def test_counts_of_a_process_that_comes_or_goes_are_no_rate(watched: Callable[[], Watched]) -> None:
    server, other = watched(), watched()
    server.ask("one", 10)
    other.ask("one", 30)
    theirs = other.source.own()._replace(pids=frozenset({1}), cpu=1000.0)
    others = [theirs]
    facts = snapshot.ServerFacts(lambda: True, CpuBudget(2, "for a test"), infer=False)
    source = snapshot.StatusSource(
        server.repository, server.admission, server.metrics, facts, lambda: server.now, lambda: others
    )

    def look() -> Any:
        server.now += 1.0
        return json.loads(source.document())

    assert look()["models"][0]["answered"] == 40
    assert look()["traffic"]["requests_per_second"] == 0
    others.clear()
    assert look()["server"]["cores_used"] is None
    assert look()["server"]["cores_used"] >= 0
    others.append(theirs)
    assert look()["traffic"] is None
    assert look()["traffic"]["requests_per_second"] == 0


def test_rates_are_of_the_last_seconds_alone(watched: Callable[[], Watched]) -> None:
    server = watched()
    server.look()
    server.ask("one", 40)
    for _ in range(9):
        server.look()
    assert server.look()["traffic"]["requests_per_second"] == 4
    assert server.look(2.0)["traffic"]["requests_per_second"] == 0
    # After a time in which nobody looked there is no rate, rather than one over that time.
    server.ask("one", 40)
    away = server.look(3600.0)
    assert away["traffic"] is None and away["chart"]["seconds_ago"] == []


def test_what_is_kept_is_bounded(watched: Callable[[], Watched]) -> None:
    server = watched()
    for _ in range(400):
        found = server.look()
    assert len(found["chart"]["seconds_ago"]) == snapshot.KEPT + 1 == len(found["chart"]["p99"])
    assert len(found["models"][0]["chart"]) == snapshot.MODEL_CHART


def test_refusals_and_errors_have_their_texts_and_no_values(watched: Callable[[], Watched], tmp_path: Path) -> None:
    models.save(tmp_path / "models", "table", models.table())
    server = watched()
    server.look()
    server.ask("absent", 3)
    server.ask("table")  # its input is of another type
    found = server.look()
    assert [(e["model"], e["reason"], e["total"], e["per_second"]) for e in found["refused"]] == [
        ("", "unknown_model", 3, 3.0),
        ("", "invalid", 1, 1.0),
    ]
    newest, oldest = found["errors"]
    assert (oldest["code"], oldest["times"]) == ("NOT_FOUND", 3) and "there is no model 'absent'" in oldest["text"]
    assert newest["reason"] == "invalid" and "INT64" in newest["text"]
    assert found["traffic"]["failed_per_second"] == 4


def test_a_model_that_stops_shows(watched: Callable[[], Watched], tmp_path: Path) -> None:
    models.save(tmp_path / "models", "one", models.chain())
    (models.save(tmp_path / "models", "bad", models.chain()) / "model.onnx").write_bytes(b"no network")
    (tmp_path / "models" / "one" / "v2").mkdir()
    server = watched()
    bad, one = server.look()["models"]
    assert bad["state"] == "failed" and "model.onnx" in bad["reason"] and "traffic" not in bad
    server.ask("one", 4)
    (folder,) = [f for f in server.repository.model_folders().values() if f.name == "one"]
    server.repository.unload(folder.name)
    bad, one = server.look()["models"]
    assert one["state"] == "not_loaded" and "batching" not in one
    assert next(e for e in server.repository.entries() if e.name == "one").state is VersionState.UNAVAILABLE


def test_a_contract_and_labels_are_told(watched: Callable[[], Watched], tmp_path: Path) -> None:
    folder = models.save(
        tmp_path / "models",
        "one",
        models.chain(),
        '[[outputs]]\nname = "y"\ndatatype = "FP32"\ndims = [3]\nlabels = "l.txt"\n',
    )
    (folder.parent / "l.txt").write_text("a\nb\nc\n")
    models.add_contract(folder, {"x": X}, True)
    (one,) = watched().look()["models"]
    assert one["contract"]["rows"] == 2 and one["contract"]["rtol"] == 1e-5
    assert one["outputs"][0]["labels"] == ["a", "b", "c"]


def test_the_process_is_this_one(watched: Callable[[], Watched]) -> None:
    server = watched().look()["server"]
    assert server["cores"] == 2 and server["ready"] is True and server["infer"] is False
    assert server["threads"] >= 1 and server["providers"] == ["cpu"]
    if Path("/proc/self/statm").exists():
        assert 1 << 20 < server["resident_bytes"] < 1 << 40 and server["open_files"] > 2


@pytest.mark.parametrize("value, short", [(None, None), (0.0, 0.0), (1234567.0, 1235000.0), (0.123456, 0.1235)])
def test_numbers_of_charts_are_short(value: float | None, short: float | None) -> None:
    assert snapshot._short(value) == short
    assert np.isfinite(snapshot.KEPT)
