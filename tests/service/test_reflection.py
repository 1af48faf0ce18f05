"""Server reflection over the wire: off unless asked for, and enough to call the server with nothing else at hand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from forwardpass import protocol
from forwardpass.testing.server_process import ServerProcess

REQUEST, RESPONSE = protocol.ServerReflectionRequest, protocol.ServerReflectionResponse
VERSIONS = ("v1", "v1alpha")


@pytest.fixture(scope="module", params=["direct", "grpcio"])
def running(request: pytest.FixtureRequest, document_repository: Path) -> Iterator[ServerProcess]:
    with ServerProcess(document_repository, "--transport", request.param, "--reflection") as server:
        yield server


def ask(server: ServerProcess, version: str, *questions: dict[str, Any]) -> list[Any]:
    with grpc.insecure_channel(server.address) as channel:
        info = channel.stream_stream(
            f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
            REQUEST.SerializeToString,
            RESPONSE.FromString,
        )
        return list(info(iter([REQUEST(**q) for q in questions]), timeout=60.0))


@pytest.mark.parametrize("version", VERSIONS)
def test_the_services_are_listed(running: ServerProcess, version: str) -> None:
    (answer,) = ask(running, version, {"list_services": ""})
    assert [s.name for s in answer.list_services_response.service] == [
        "inference.GRPCInferenceService",
        "grpc.health.v1.Health",
        "grpc.reflection.v1.ServerReflection",
    ]


@pytest.mark.parametrize("version", VERSIONS)
def test_a_client_can_be_built_of_nothing_but_the_answers(running: ServerProcess, version: str) -> None:
    (answer,) = ask(running, version, {"file_containing_symbol": "inference.GRPCInferenceService"})
    pool = descriptor_pool.DescriptorPool()
    files = [
        descriptor_pb2.FileDescriptorProto.FromString(f) for f in answer.file_descriptor_response.file_descriptor_proto
    ]
    assert files[0].name == "grpc_service.proto", "the file asked for comes first"
    for file in reversed(files):
        pool.Add(file)
    method = pool.FindServiceByName("inference.GRPCInferenceService").methods_by_name["ModelMetadata"]
    ask_for, told = (message_factory.GetMessageClass(t) for t in (method.input_type, method.output_type))
    with grpc.insecure_channel(running.address) as channel:
        metadata = channel.unary_unary(
            f"/{method.containing_service.full_name}/{method.name}", ask_for.SerializeToString, told.FromString
        )
        assert metadata(ask_for(name="document"), timeout=60.0).name == "document"


def test_each_question_has_its_answer_and_what_is_not_there_ends_nothing(running: ServerProcess) -> None:
    questions = [
        {"file_by_filename": "model_config.proto"},
        {"file_by_filename": "nothing.proto"},
        {"file_containing_symbol": "inference.Nothing"},
        {"file_containing_symbol": "inference.ModelInferRequest.InferInputTensor"},
        {"all_extension_numbers_of_type": "inference.ModelInferRequest"},
        {"all_extension_numbers_of_type": "inference.Nothing"},
        {"file_containing_extension": {"containing_type": "inference.ModelInferRequest", "extension_number": 1}},
        {},
    ]
    answers = ask(running, "v1", *questions)
    kinds = [a.WhichOneof("message_response") for a in answers]
    assert kinds == [
        "file_descriptor_response",
        "error_response",
        "error_response",
        "file_descriptor_response",
        "all_extension_numbers_response",
        "error_response",
        "error_response",
        "error_response",
    ]
    assert {a.error_response.error_code for a in answers if a.HasField("error_response")} == {5}
    assert [a.original_request for a in answers] == [REQUEST(**q) for q in questions]


def test_a_message_that_is_none_ends_the_stream_with_a_status(running: ServerProcess) -> None:
    with grpc.insecure_channel(running.address) as channel:
        info = channel.stream_stream("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo")
        with pytest.raises(grpc.RpcError) as caught:
            next(info(iter([b"\xff\xff"]), timeout=60.0))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("version", VERSIONS)
def test_it_is_off_unless_asked_for(server: ServerProcess, version: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        ask(server, version, {"list_services": ""})
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
