"""grpc.health.v1: of the server, of each model, of what is not there; and whoever watches hears of each change once."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.service import models

from forwardpass import protocol
from forwardpass.api.health import NOT_SERVING, SERVICE_UNKNOWN, SERVING, Health
from forwardpass.batching.admission import Admission
from forwardpass.errors import UnknownModel
from forwardpass.execution.cpu_budget import CpuBudget
from forwardpass.repository.repository import Repository
from forwardpass.settings import Settings


class Server:
    """Two models on disk, one of them broken, and whether the server says that it is ready."""

    def __init__(self, root: Path) -> None:
        models.save(root, "good", models.chain())
        (models.save(root, "bad", models.chain()) / "model.onnx").write_bytes(b"junk")
        settings = Settings(repository=root, max_batch_size=8)
        self.repository = Repository(settings, CpuBudget(1, ""), Admission(10, 1000))
        self.entries = self.repository.discover()
        self.ready = False
        self.health = Health(self.repository, lambda: self.ready, lambda: self.ready)

    def load(self) -> None:
        for entry in self.entries:
            self.repository.load(entry)

    def status(self) -> dict[str, int]:
        return {name: self.health.status(name) for name in ("", protocol.INFERENCE_SERVICE, "good", "bad", "nobody")}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path)
    yield made
    assert made.repository.close(5.0)


def of(server: int, good: int, bad: int) -> dict[str, int]:
    return {"": server, protocol.INFERENCE_SERVICE: server, "good": good, "bad": bad, "nobody": SERVICE_UNKNOWN}


def test_statuses_follow_what_is_loaded_and_whether_the_server_is_ready(server: Server) -> None:
    assert server.status() == of(NOT_SERVING, NOT_SERVING, NOT_SERVING)
    server.load()
    assert server.status() == of(NOT_SERVING, NOT_SERVING, NOT_SERVING)
    server.ready = True
    assert server.status() == of(SERVING, SERVING, NOT_SERVING)
    server.ready = False
    assert server.status() == of(NOT_SERVING, NOT_SERVING, NOT_SERVING)


def test_check_and_list(server: Server) -> None:
    server.load()
    server.ready = True
    assert server.health.check(protocol.HealthCheckRequest(service="good")).status == SERVING
    with pytest.raises(UnknownModel, match="there is no service 'no\\\\x0abody'"):
        server.health.check(protocol.HealthCheckRequest(service="no\nbody"))
    listed = server.health.list(protocol.HealthListRequest()).statuses
    assert {name: listed[name].status for name in listed} == {"": SERVING, "good": SERVING, "bad": NOT_SERVING}


def test_a_watcher_hears_of_each_change_once_and_of_the_end(server: Server) -> None:
    heard: dict[str, list[int]] = {"good": [], "nobody": []}

    async def listen(service: str) -> None:
        async for response in server.health.watch(protocol.HealthCheckRequest(service=service)):
            heard[service].append(response.status)

    async def live() -> None:
        tasks = [asyncio.create_task(listen(service)) for service in heard]
        for step in (lambda: None, server.load, lambda: setattr(server, "ready", True), lambda: None):
            step()
            server.health.changed()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        server.ready = False
        server.health.end()
        await asyncio.wait_for(asyncio.gather(*tasks), 10)

    asyncio.run(live())
    assert heard == {"good": [NOT_SERVING, SERVING, NOT_SERVING], "nobody": [SERVICE_UNKNOWN]}
