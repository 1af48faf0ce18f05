"""What a client is told when it is made, and what it has told gRPC by then. The calls themselves are in service/."""

from __future__ import annotations

import inspect
import json
import pydoc
from typing import Any

import pytest

import forwardpass
from forwardpass import client as client_module
from forwardpass.client import AsyncClient, AsyncStream, Client, Stream, options


def arguments(**options: Any) -> dict[str, Any]:
    return dict(Client("nowhere:1", **options)._arguments)


def test_the_defaults_suit_a_service_with_many_addresses() -> None:
    told = arguments()
    config = json.loads(told["grpc.service_config"])
    assert config["loadBalancingConfig"] == [{"round_robin": {}}]
    assert config["healthCheckConfig"] == {"serviceName": ""}
    assert "methodConfig" not in config, "gRPC would try again what the client tries again by itself"
    assert told["grpc.max_receive_message_length"] == told["grpc.max_send_message_length"] == 64 << 20


def test_every_option_is_heard() -> None:
    told = arguments(attempts=1, health_check=False, max_message_bytes=1000, keepalive=0)
    config = json.loads(told["grpc.service_config"])
    assert "healthCheckConfig" not in config
    assert told["grpc.max_receive_message_length"] == told["grpc.max_send_message_length"] == 1000
    assert "grpc.keepalive_time_ms" not in told
    assert arguments(keepalive=1.5)["grpc.keepalive_time_ms"] == 1500
    assert arguments(options=[("grpc.service_config", "{}"), ("a", 1)])["grpc.service_config"] == "{}"
    for attempts in (0, 11):
        with pytest.raises(ValueError, match=f"attempts: expected 1 to 10, got {attempts}"):
            Client(attempts=attempts)


def test_a_list_of_addresses_has_an_authority_that_is_one() -> None:
    for address, authority in (
        ("ipv4:10.0.0.1:8001,10.0.0.2:8001", "10.0.0.1:8001"),
        ("ipv6:[::1]:1,[::1]:2", "[::1]:1"),
        ("localhost:8001", None),
        ("dns:///a.b:8001", None),
    ):
        assert dict(Client(address)._arguments).get("grpc.default_authority") == authority


def test_the_two_clients_have_the_same_operations_with_the_same_arguments() -> None:
    def operations(cls: type) -> dict[str, inspect.Signature]:
        return {name: inspect.signature(f) for name, f in vars(cls).items() if inspect.isfunction(f) and name[0] != "_"}

    blocking, awaited = operations(Client), operations(AsyncClient)
    streams = blocking.pop("stream"), awaited.pop("stream")
    assert streams[0].parameters == streams[1].parameters
    assert blocking == awaited
    calls = {"infer", "predict", "metadata", "models", "server", "live", "ready", "close"}
    assert calls | {"load", "unload", "statistics", "config", "log_level"} == set(blocking)


def test_the_two_kinds_of_streams_take_the_same_arguments() -> None:
    def options(method: Any) -> list[tuple[str, Any, Any]]:
        return [(p.name, p.default, p.kind) for p in inspect.signature(method).parameters.values()]

    for name in ("submit", "map", "close", "cancel"):
        assert options(getattr(Stream, name)) == options(getattr(AsyncStream, name))
    assert options(AsyncStream.infer) == options(AsyncStream.submit)
    assert len(options(Stream.map)) + 1 == len(options(Stream.submit)) == len(options(Client.infer)) - 1


@pytest.mark.parametrize("cls", [Client, AsyncClient])
def test_help_lists_every_option_with_its_type_and_default(cls: type) -> None:
    text = pydoc.plain(pydoc.render_doc(cls))
    assert "outputs: 'Iterable[str] | None' = None, timeout: 'float | None' = None, priority: 'int' = 0" in text
    assert "id: 'str' = '', timings: 'bool' = False) -> 'Answer'" in text
    assert "**options" not in text


def test_the_defaults_are_those_of_the_declared_options() -> None:
    for declared, defaults in (
        (options.MapOptions, options.MAP),
        (options.SubmitOptions, options.SUBMIT),
        (options.InferOptions, options.INFER),
    ):
        assert set(declared.__annotations__) == set(defaults)


def test_an_option_that_does_not_exist_is_a_type_error_when_the_method_is_called() -> None:
    wrong: Any = {"tiemout": 1.0}
    with (
        Client("127.0.0.1:1") as client,
        pytest.raises(TypeError, match="unexpected keyword argument 'tiemout': expected one of version, outputs"),
    ):
        client.infer("m", [1.0], **wrong)
    with Client("127.0.0.1:1") as client, client.stream() as stream:
        with pytest.raises(TypeError, match=r"'id': expected one of version, outputs, timeout, priority, parameters$"):
            stream.map("m", [], id="7")  # type: ignore[call-arg]
        with pytest.raises(TypeError, match="'timings'"):
            stream.submit("m", [1.0], timings=True)  # type: ignore[call-arg]


def test_a_client_that_never_called_can_be_closed_and_then_does_not_call() -> None:
    with Client("nowhere:1") as client:
        pass
    with pytest.raises(ValueError, match="the client is closed"):
        client.live()


def test_the_package_offers_the_clients_and_the_module_its_errors() -> None:
    assert forwardpass.Client is Client and forwardpass.AsyncClient is AsyncClient
    assert all(hasattr(client_module, name) for name in client_module.__all__)
