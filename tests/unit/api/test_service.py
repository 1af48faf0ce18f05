"""The control side: what a server tells of itself and of its models, as messages."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.service import models

from forwardpass import __version__, protocol
from forwardpass.api.service import ControlService
from forwardpass.batching.admission import Admission
from forwardpass.errors import InvalidRequest, ModelUnusable, UnknownModel
from forwardpass.execution.cpu_budget import CpuBudget
from forwardpass.repository.control import ModelControl
from forwardpass.repository.repository import Repository
from forwardpass.settings import Settings


@pytest.fixture
def service(tmp_path: Path) -> Iterator[ControlService]:
    models.save(tmp_path, "good", models.chain(), 'labels = "labels.txt"\nmax_batch_size = 8\n')
    (tmp_path / "good" / "labels.txt").write_text("red\ngrün\nblue\n")
    models.save(tmp_path, "mean", models.centred())
    (models.save(tmp_path, "bad", models.chain()) / "model.onnx").write_bytes(b"junk")
    settings = Settings(repository=tmp_path, max_batch_size=16)
    repository = Repository(settings, CpuBudget(1, ""), Admission(10, 1000))
    for entry in repository.discover():
        repository.load(entry)
    yield ControlService(repository, lambda: False, ModelControl(repository, settings), ("more",))
    assert repository.close(5.0)


def test_every_method_takes_its_request_and_gives_its_response(service: ControlService) -> None:
    for name, method in service.methods.items():
        if name in ("RepositoryModelLoad", "RepositoryModelUnload"):  # those change things
            continue
        request = protocol.METHODS[name].request()
        if "name" in request.DESCRIPTOR.fields_by_name:
            request.name = "good"
        response = method(request)
        if asyncio.iscoroutine(response):
            response = asyncio.run(response)
        assert isinstance(response, protocol.METHODS[name].response)


def test_the_server_tells_of_itself(service: ControlService) -> None:
    assert service.server_live(None).live and not service.server_ready(None).ready
    said = service.server_metadata(None)
    assert (said.name, said.version) == ("forwardpass", __version__)
    assert "more" in said.extensions and list(said.extensions) == sorted(said.extensions)


def test_a_models_metadata(service: ControlService) -> None:
    said = service.model_metadata(protocol.ModelMetadataRequest(name="good"))
    assert (said.name, list(said.versions), said.platform) == ("good", ["1"], "onnxruntime_onnx")
    ((x,), (y,)) = said.inputs, said.outputs
    assert (x.name, x.datatype, list(x.shape)) == ("x", "FP32", [-1, 4])
    assert (y.name, y.datatype, list(y.shape)) == ("y", "FP32", [-1, 3])
    assert json.loads(y.parameters["labels"].string_param) == ["red", "grün", "blue"]
    assert said.parameters["batch_invariance"].string_param == "exact"
    assert said.parameters["max_batch_size"].int64_param == 8
    assert not said.parameters["contract"].bool_param
    alone = service.model_metadata(protocol.ModelMetadataRequest(name="mean")).parameters
    assert (alone["batch_invariance"].string_param, alone["max_batch_size"].int64_param) == ("dependent", 0)


def test_ready_not_ready_and_not_there(service: ControlService) -> None:
    def ready(name: str, version: str = "") -> bool:
        return bool(service.model_ready(protocol.ModelReadyRequest(name=name, version=version)).ready)

    assert ready("good") and ready("good", "1") and not ready("bad")
    for name, version in (("nobody", ""), ("good", "2")):
        with pytest.raises(UnknownModel):
            ready(name, version)
    with pytest.raises(InvalidRequest):
        ready("")
    with pytest.raises(ModelUnusable):
        service.model_metadata(protocol.ModelMetadataRequest(name="bad"))


@pytest.mark.parametrize(("only", "names"), [(False, ["bad", "good", "mean"]), (True, ["good", "mean"])])
def test_the_index(service: ControlService, only: bool, names: list[str]) -> None:
    index = asyncio.run(service.repository_index(protocol.RepositoryIndexRequest(ready=only)))
    assert [m.name for m in index.models] == names
    states = {m.name: m.state for m in index.models}
    assert states["good"] == "READY" and states.get("bad", "UNAVAILABLE") == "UNAVAILABLE"
