"""Many models in one server: all ready, none with a thread of its own, every answer its own model's, scrapes whole."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.service import models

from forwardpass import AsyncClient
from forwardpass.testing.server_process import ServerProcess

SIZES = ((64, 64, 10), (64, 32, 10), (64, 96, 10))  # three shapes, as many in turn as there are models


def name_of(i: int) -> str:
    return f"net-{i:04}"


def repository(folder: Path, count: int) -> Path:
    for i in range(count):
        models.save(folder, name_of(i), models.chain(SIZES[i % len(SIZES)], seed=i))
    return folder


def threads(server: ServerProcess) -> int:
    status = Path(f"/proc/{server.pid}/status").read_text()
    return int(re.search(r"Threads:\s+(\d+)", status)[1])  # type: ignore[index]


@pytest.fixture(
    scope="module", params=[45, pytest.param(1000, marks=pytest.mark.slow)], ids=["some dozen", "a thousand"]
)
def many(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[ServerProcess, Path]]:
    folder = repository(tmp_path_factory.mktemp("many"), request.param)
    with ServerProcess(folder, patience=300.0) as server:
        yield server, folder


def test_all_are_ready_and_those_of_one_shape_take_as_many_rows(many: tuple[ServerProcess, Path]) -> None:
    server, folder = many
    count = len(list(folder.iterdir()))
    lines = [line for line in server.lines if line.startswith("model net-")]
    assert len(lines) == count
    rows: dict[int, set[str]] = {}
    for line in lines:
        found = re.match(r"model net-(\d+) version 1: batches of up to (\d+) rows", line)
        assert found is not None, line
        rows.setdefault(int(found[1]) % len(SIZES), set()).add(found[2])
    assert [len(sizes) for sizes in rows.values()] == [1] * len(SIZES)
    assert sum("of the same shape" not in line for line in lines) == len(SIZES)


def test_idle_models_have_no_threads(many: tuple[ServerProcess, Path]) -> None:
    server, _ = many
    assert threads(server) < 40


def test_every_model_answers_with_its_own_weights(many: tuple[ServerProcess, Path]) -> None:
    server, folder = many
    count = len(list(folder.iterdir()))
    x = np.random.default_rng(0).standard_normal((count, 1, 64)).astype(np.float32)

    async def ask() -> list[np.ndarray]:
        async with AsyncClient(server.address) as client:
            return await asyncio.gather(*(client.predict(name_of(i), x[i]) for i in range(count)))

    for i, answer in enumerate(asyncio.run(ask())):
        session = onnxruntime.InferenceSession(str(folder / name_of(i) / "1" / "model.onnx"))
        np.testing.assert_allclose(answer, session.run(None, {"x": x[i]})[0], rtol=1e-4, atol=1e-5)
    assert threads(server) < 40


def test_a_scrape_has_every_model_and_histograms_of_those_that_were_asked(many: tuple[ServerProcess, Path]) -> None:
    server, folder = many
    names = {path.name for path in folder.iterdir()}
    families = {family.name: family for family in text_string_to_metric_families(server.metrics())}
    assert {s.labels["model"] for s in families["forwardpass_model_info"].samples} == names
    asked = {
        s.labels["model"] for s in families["forwardpass_requests"].samples if s.labels["code"] == "OK" and s.value > 0
    }
    shown = {s.labels["model"] for s in families["forwardpass_stage_seconds"].samples}
    assert shown == asked
