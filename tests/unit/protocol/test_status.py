"""Errors as gRPC sees them, read back with the public google.rpc messages."""

from __future__ import annotations

import grpc
import pytest

from forwardpass import errors, protocol
from forwardpass.errors import Overloaded, RequestError, RunFailed
from forwardpass.protocol.status import (
    DETAILS_KEY,
    PUSHBACK_KEY,
    read_parameters,
    read_retry_after,
    status_of,
    write_parameters,
)

# By module, not by subclasses: the client's errors are subclasses too, once something imported them.
ERRORS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, RequestError)]


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.__name__)
def test_every_error_has_a_code_that_grpc_knows_and_a_reason_of_its_own(kind: type[RequestError]) -> None:
    code, text, trailers = status_of(kind("what happened"))
    assert code in {c.value[0] for c in grpc.StatusCode} - {0}
    assert (text, trailers) == ("what happened", None)
    assert kind.reason.replace("_", "").isalpha()


def test_the_codes_are_grpcs() -> None:
    assert {s.name: s.value for s in errors.Status} == {c.name: c.value[0] for c in grpc.StatusCode}


@pytest.mark.parametrize("seconds", [0.005, 0.25, 5.0])
def test_when_to_retry_goes_along(seconds: float) -> None:
    details = pytest.importorskip("google.rpc.error_details_pb2", reason="googleapis-common-protos is not installed")
    status_pb2 = pytest.importorskip("google.rpc.status_pb2", reason="googleapis-common-protos is not installed")
    code, text, trailers = status_of(Overloaded("full", retry_after=seconds))
    assert trailers is not None and [key for key, _ in trailers] == [DETAILS_KEY, PUSHBACK_KEY]
    status = status_pb2.Status.FromString(trailers[0][1])
    info = details.RetryInfo()
    assert status.details[0].Unpack(info)
    assert (status.code, status.message) == (code, text) == (8, "full")
    assert info.retry_delay.ToMicroseconds() == round(seconds * 1e6)
    assert trailers[1][1] == str(round(seconds * 1e3))


def test_a_text_is_one_line_of_bounded_length() -> None:
    _, text, _ = status_of(RunFailed("a\r\nb\0\x1b[31m é " + "x" * 10_000))
    assert text.startswith("a\\x0d\\x0ab\\x00\\x1b[31m é x")
    assert text.isprintable() and len(text) < 1100


@pytest.mark.parametrize("seconds", [None, 0.005, 90.5])
def test_the_other_end_reads_what_was_written(seconds: float | None) -> None:
    error = Overloaded("full", retry_after=seconds)
    code, _, trailers = status_of(error)
    assert read_retry_after(trailers or ()) == seconds
    parameters = protocol.ModelInferResponse().parameters
    write_parameters(error, parameters)
    assert read_parameters(parameters) == (code, seconds)


def test_a_server_of_another_make_sends_a_text_alone() -> None:
    assert read_parameters(protocol.ModelInferResponse().parameters) == (errors.Status.UNKNOWN, None)
    assert read_retry_after([(DETAILS_KEY, b"\xff"), ("other", "x")]) is None
