"""Every gRPC status as an exception, with what came beside it."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import pytest

from forwardpass import errors
from forwardpass.client import errors as call_errors
from forwardpass.client.errors import CallError, DeadlineExceeded, ResourceExhausted, Unavailable, from_status
from forwardpass.errors import ForwardpassError, Overloaded, Reason, Status
from forwardpass.protocol.status import status_of


@pytest.mark.parametrize("status", [status for status in Status if status is not Status.OK])
def test_every_status_has_an_error(status: Status) -> None:
    error = from_status(status, "why", (), address="host:1", timeout=None)
    assert isinstance(error, CallError) and isinstance(error, ForwardpassError)
    assert error.status is status
    assert str(error).startswith(f"{status.name}: ")
    assert "why" in error.details
    named = getattr(call_errors, status.name.title().replace("_", ""), CallError)
    assert type(error) is named


def test_the_statuses_that_a_server_sends_have_their_own_classes() -> None:
    sent = {error.status for error in _all_subclasses(errors.RequestError) if not issubclass(error, CallError)}
    assert sent <= {cls.status for cls in CallError.__subclasses__()}


def test_a_name_is_one_error_whichever_module_it_is_taken_from() -> None:
    twice = {
        name: (mine, its)
        for name, mine in vars(call_errors).items()
        if isinstance(mine, type) and isinstance(its := getattr(errors, name, None), type) and mine is not its
    }
    assert len(twice) >= 5
    for mine, its in twice.values():
        assert issubclass(mine, its), f"`except errors.{its.__name__}` does not catch what the client raises"
        assert mine.status is its.status


@pytest.mark.parametrize("status", [status for status in Status if status is not Status.OK])
def test_what_a_client_raises_is_caught_as_a_request_that_failed(status: Status) -> None:
    error = from_status(status, "why", (), address="host:1", timeout=None)
    with pytest.raises(errors.RequestError, match="why") as caught:
        raise error
    assert caught.value.status is status and caught.value.retry_after is None


def test_every_reason_is_given_somewhere_and_none_is_made_up() -> None:
    given = {cls.reason for cls in _all_subclasses(errors.RequestError)}
    for path in Path(errors.__file__).parent.rglob("*.py"):
        given |= {Reason[name] for name in re.findall(r"\bReason\.([A-Z_]+)", path.read_text("utf-8"))}
    assert given == set(Reason)


def _all_subclasses(cls: type) -> set[type]:
    return {cls}.union(*(_all_subclasses(sub) for sub in cls.__subclasses__()))


def test_what_the_server_says_of_retrying_is_understood() -> None:
    code, text, trailing = status_of(Overloaded("the queue is full", retry_after=0.25))
    assert trailing is not None
    error = from_status(code, text, [("other", "x"), *trailing], address="host:1", timeout=1.0)
    assert type(error) is ResourceExhausted
    assert error.retry_after == 0.25
    assert str(error) == "RESOURCE_EXHAUSTED: the queue is full"


@pytest.mark.parametrize("details", [b"\xff\xff", b"", "text"])
def test_details_that_are_none_are_ignored(details: bytes | str) -> None:
    trailing = [("grpc-status-details-bin", details)]
    assert from_status(8, "full", trailing, address="host:1", timeout=None).retry_after is None


def test_the_text_says_who_and_how_long_and_is_one_line() -> None:
    gone = from_status(14, "Connection\nrefused", (), address="host:1", timeout=None)
    assert type(gone) is Unavailable and str(gone) == "UNAVAILABLE: host:1: Connection refused"
    late = from_status(4, "Deadline Exceeded", (), address="host:1", timeout=0.05)
    assert type(late) is DeadlineExceeded and late.details == "no answer from host:1 within 0.05 s"
    server_side = from_status(4, "it could not be in time", (), address="host:1", timeout=0.05)
    assert server_side.details == "it could not be in time"


def test_an_error_survives_pickling() -> None:
    error = from_status(8, "full", (), address="host:1", timeout=None)
    error.retry_after = 2.0
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), copy.retry_after) == (ResourceExhausted, str(error), 2.0)
