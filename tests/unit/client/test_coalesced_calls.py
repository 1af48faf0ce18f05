"""What is said for callers that share a request, and what each of them gets: driven by hand against the far end."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from tests.unit.client.far_end import ONE, POISON, SUMS, TWO, Far, drive

from forwardpass import protocol
from forwardpass.client.coalesced_calls import CoalescedCalls, Way, unsettled
from forwardpass.client.coalescer import Coalesce, Group, Rows
from forwardpass.client.errors import (
    CallError,
    DeadlineExceeded,
    Internal,
    InvalidArgument,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
)
from forwardpass.client.operations import Call, Operations, Reply
from forwardpass.errors import Status
from forwardpass.model.signature import ModelSignature, TensorSpec

FP64, BYTES = protocol.DATATYPES["FP64"], protocol.DATATYPES["BYTES"]


class Bell:
    def ring(self, settled: Sequence[Rows]) -> None:
        pass


class Crowd:
    """Callers of one model, all of whom wait, and the sender that goes for them."""

    def __init__(self, far: Far, options: Coalesce | None = None) -> None:
        self.far = far
        self.operations = Operations(30.0)
        self.shared = CoalescedCalls(self.operations, options or Coalesce(), "host:1", Bell)

    def way(self, x: np.ndarray, output: str | None = None, timeout: float | None = None) -> Way:
        like = ("m", "", output, 0, timeout, x.shape, x.dtype)
        known = self.shared.known(like)
        way = known or drive(self.shared.way(like, x), self.far.hear)
        assert isinstance(way, Way)
        return way

    def come(self, arrays: Sequence[np.ndarray], **options: Any) -> list[tuple[Way, Rows]]:
        callers = []
        for x in arrays:
            way = self.way(x, **options)
            assert way.group is not None
            way.group.crowd = 64.0
            mine = Rows(x, way.rows, time.monotonic() + way.limit)
            self.shared.coalescer.offer(way.group, mine)
            callers.append((way, mine))
        return callers

    def send(self, group: Group | None, hear: Callable[[Call], Reply] | None = None) -> None:
        assert group is not None
        while (batch := self.shared.coalescer.take(group)) is not None:
            drive(self.shared.share(group, batch.rows), hear or self.far.hear)
            if not self.shared.coalescer.ended(group):
                return

    def results(self, callers: Sequence[tuple[Way, Rows]]) -> list[Any]:
        """The answer or the error of each."""
        found: list[Any] = []
        for way, mine in callers:
            try:
                found.append(self.shared.result(way, mine).tolist())
            except CallError as error:
                found.append(error)
        return found


def some(count: int) -> list[np.ndarray]:
    return [np.arange(4, dtype=np.float32) + 10 * i for i in range(count)]


def of(*numbers: int) -> list[list[float]]:
    """The answers to these of `some`."""
    return [[10.0 * i, 10.0 * i + 3] for i in numbers]


def test_one_request_for_all_and_to_each_their_own() -> None:
    crowd = Crowd(Far(ONE))
    callers = crowd.come(some(7))
    crowd.send(callers[0][0].group)
    assert crowd.results(callers) == of(*range(7))
    assert crowd.far.rows == [7]


def test_an_answer_belongs_to_its_caller() -> None:
    crowd = Crowd(Far(ONE))
    callers = crowd.come(some(2))
    crowd.send(callers[0][0].group)
    first, second = (crowd.shared.result(way, mine) for way, mine in callers)
    first[...] = -1
    assert second.tolist() == of(1)[0]
    assert first.base is None, "a row keeps the answers of all others in memory"


def test_rows_and_small_batches_share_a_request() -> None:
    crowd = Crowd(Far(ONE))
    x = np.stack(some(6))
    callers = crowd.come([x[0], x[1:3], x[3], x[4:]])
    crowd.send(callers[0][0].group)
    assert crowd.results(callers) == [of(0)[0], of(1, 2), of(3)[0], of(4, 5)]
    assert crowd.far.rows == [6]


def test_dtypes_are_converted_as_for_one_and_do_not_mix() -> None:
    crowd = Crowd(Far(ONE))
    whole = crowd.come([x.astype(np.int32) for x in some(3)])
    wide = crowd.come([x.astype(np.float64) for x in some(2)])
    assert whole[0][0].group is not wide[0][0].group
    for callers in (whole, wide):
        crowd.send(callers[0][0].group)
    assert crowd.results(whole) + crowd.results(wide) == of(0, 1, 2, 0, 1)
    assert crowd.far.rows == [3, 2]


def test_texts_share_a_request_too() -> None:
    crowd = Crowd(Far(ModelSignature((TensorSpec("x", BYTES, (-1, 2)),), (SUMS,), batchable=True)))
    crowd.far.hear = _echo_count  # type: ignore[method-assign]
    callers = crowd.come([np.array(["a", "ß"], object), np.array(["𝛼", ""], object)])
    crowd.send(callers[0][0].group)
    assert crowd.results(callers) == [[0.0], [1.0]]


def _echo_count(call: Call) -> Reply:
    if call.path.endswith("ModelMetadata"):
        return Reply(Far(ModelSignature((TensorSpec("x", BYTES, (-1, 2)),), (SUMS,), batchable=True)).metadata(), ())
    request = protocol.ModelInferRequest.FromString(call.request)
    assert request.raw_input_contents[0] == b"\1\0\0\0a\2\0\0\0\xc3\x9f\4\0\0\0\xf0\x9d\x9b\xbc\0\0\0\0"
    response = protocol.ModelInferResponse(model_name="m", model_version="1")
    count = request.inputs[0].shape[0]
    response.outputs.add(name="y", datatype="FP32", shape=[count, 1])
    response.raw_output_contents.append(np.arange(count, dtype=np.float32).tobytes())
    return Reply(response.SerializeToString(), ())


@pytest.mark.parametrize(
    ("changed", "alike"),
    [({"timeout": 25.0}, True), ({"timeout": 0.05}, False), ({"timeout": math.inf}, False), ({"output": "y"}, False)],
)
def test_who_shares_asks_alike_and_is_in_as_much_of_a_hurry(changed: dict[str, Any], alike: bool) -> None:
    crowd = Crowd(Far(ONE))
    (row,) = some(1)
    assert (crowd.way(row).group is crowd.way(row, **changed).group) is alike


@pytest.mark.parametrize("spoiled", [0, 1, 5, 8])
def test_one_callers_rows_fail_that_caller_alone(spoiled: int) -> None:
    crowd = Crowd(Far(ONE))
    arrays = some(9)
    arrays[spoiled][2] = POISON
    callers = crowd.come(arrays)
    crowd.send(callers[0][0].group)
    found = crowd.results(callers)
    assert isinstance(found[spoiled], Internal)
    assert "cannot be run on these values" in str(found[spoiled])
    assert found[:spoiled] + found[spoiled + 1 :] == of(*(i for i in range(9) if i != spoiled))
    assert len(crowd.far.rows) <= 9, "in halves, not one by one"


def test_a_value_that_does_not_fit_fails_its_caller_alone() -> None:
    # Found by the client itself, when the rows of all become the model's dtype.
    crowd = Crowd(Far(ONE))
    arrays = [x.astype(np.int64) for x in some(4)]
    arrays[1][0] = 2**24 + 1
    callers = crowd.come(arrays)
    crowd.send(callers[0][0].group)
    found = crowd.results(callers)
    assert isinstance(found[1], InvalidArgument) and "16777217" in str(found[1])
    assert [found[0], *found[2:]] == of(0, 2, 3)


@pytest.mark.parametrize(
    "error",
    [
        Unavailable("gone"),
        DeadlineExceeded("late"),
        Unauthenticated("who are you"),
        ResourceExhausted("full", retry_after=0.1),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_that_is_nobodys_own_reaches_all_at_once(error: CallError) -> None:
    crowd = Crowd(Far(ONE))
    callers = crowd.come(some(4))
    asked = 0

    def fail(call: Call) -> Reply:
        nonlocal asked
        if call.path.endswith("ModelMetadata"):
            return crowd.far.hear(call)
        asked += 1
        raise error

    crowd.send(callers[0][0].group, fail)
    assert asked == 1
    found = crowd.results(callers)
    assert all(type(each) is type(error) and str(each) == str(error) for each in found)
    assert len({id(each) for each in found}) == 4, "each raises an error of its own"


@pytest.mark.parametrize("status", [Status.UNKNOWN, Status.OUT_OF_RANGE, Status.RESOURCE_EXHAUSTED])
def test_other_errors_that_may_be_about_some_rows(status: Status) -> None:
    crowd = Crowd(Far(ONE))
    callers = crowd.come(some(4))

    def too_large(call: Call) -> Reply:
        if protocol.ModelInferRequest.FromString(call.request).inputs[0].shape[0] > 2:
            raise (ResourceExhausted if status is Status.RESOURCE_EXHAUSTED else CallError)("no", status=status)
        return crowd.far.hear(call)

    crowd.send(
        callers[0][0].group, lambda call: too_large(call) if call.path.endswith("ModelInfer") else crowd.far.hear(call)
    )
    assert crowd.results(callers) == of(0, 1, 2, 3)


@pytest.mark.parametrize("tell", [0, None])
def test_a_model_whose_rows_depend_on_each_other_is_never_shared(tell: int | None) -> None:
    far = Far(ONE)
    if tell is None:
        metadata = protocol.ModelMetadataResponse.FromString(far.metadata())
        metadata.parameters.clear()
        far.metadata = metadata.SerializeToString  # type: ignore[method-assign]
    else:
        far.max_batch_size = tell
    assert Crowd(far).way(some(1)[0]).group is None


def test_what_cannot_be_shared_goes_by_itself() -> None:
    crowd = Crowd(Far(ONE), Coalesce(max_rows=8, max_bytes=100))
    for array in (np.zeros((5, 4)), np.zeros((4, 4)), np.zeros((0, 4)), np.zeros(()), np.zeros((1, 1, 4))):
        assert crowd.way(array).group is None
    assert crowd.way(np.zeros((2, 4), np.float32)).group is not None
    assert Crowd(Far(TWO)).way(np.zeros(4)).group is None


def test_a_version_that_came_in_between_may_not_share() -> None:
    crowd = Crowd(Far(ONE))
    callers = crowd.come(some(3))
    crowd.send(callers[0][0].group)
    # The next version's rows depend on each other, which nobody has told the client.
    crowd.far.version, crowd.far.max_batch_size = "2", 0
    crowd.far.rows.clear()
    callers = crowd.come(some(3))
    crowd.send(callers[0][0].group)
    assert crowd.results(callers) == of(0, 1, 2)
    assert crowd.far.rows == [3, 1, 1, 1], "what came of the three together was given to somebody"
    assert crowd.way(some(1)[0]).group is None
    # And back: what was remembered of the last one is forgotten when another answers.
    crowd.far.version, crowd.far.max_batch_size = "3", 64
    drive(crowd.operations.predict("m", some(1)[0], output=None, version="", timeout=None, priority=0), crowd.far.hear)
    assert crowd.way(some(1)[0]).group is not None


def test_a_version_that_shares_as_well_is_asked_about_once() -> None:
    crowd = Crowd(Far(ONE))
    for version in ("1", "1", "2", "2"):
        crowd.far.version = version
        callers = crowd.come(some(3))
        crowd.send(callers[0][0].group)
        assert crowd.results(callers) == of(0, 1, 2)
    assert crowd.far.rows == [3, 3, 3, 3]
    assert crowd.far.asked.count("ModelMetadata") == 3


def test_the_request_has_the_time_of_who_can_wait_longest() -> None:
    crowd = Crowd(Far(ONE))
    callers = crowd.come(some(2), timeout=20.0) + crowd.come(some(1), timeout=31.0)
    heard: list[float | None] = []

    def listen(call: Call) -> Reply:
        if call.path.endswith("ModelInfer"):
            heard.append(call.timeout)
        return crowd.far.hear(call)

    crowd.send(callers[0][0].group, listen)
    assert len(heard) == 1 and heard[0] is not None and 20.0 < heard[0] <= 31.0
    endless = crowd.come(some(1), timeout=math.inf)
    crowd.send(endless[0][0].group, listen)
    assert heard[1] is None


def test_an_answer_with_too_few_rows_is_the_servers_fault() -> None:
    crowd = Crowd(Far(ONE))
    callers = crowd.come(some(2))

    def short(call: Call) -> Reply:
        if call.path.endswith("ModelMetadata"):
            return crowd.far.hear(call)
        response = protocol.ModelInferResponse(model_name="m", model_version="1")
        response.outputs.add(name="y", datatype="FP32", shape=[3, 1])
        response.raw_output_contents.append(np.zeros(3, np.float32).tobytes())
        return Reply(response.SerializeToString(), ())

    crowd.send(callers[0][0].group, short)
    for each in crowd.results(callers):
        assert isinstance(each, Internal) and "rows is of shape [3, 1]" in str(each)


def test_who_left_is_not_sent_again() -> None:
    crowd = Crowd(Far(ONE))
    arrays = some(4)
    arrays[0][0] = POISON
    callers = crowd.come(arrays)

    def leave(call: Call) -> Reply:
        if call.path.endswith("ModelInfer"):
            for _, mine in callers[:2]:
                crowd.shared.coalescer.gone(mine)
        return crowd.far.hear(call)

    crowd.send(callers[0][0].group, leave)
    assert crowd.far.rows == [4, 2], "the half whose callers had all left was sent again"
    assert crowd.results(callers[2:]) == of(2, 3)


def test_whoever_has_no_outcome_is_late() -> None:
    crowd = Crowd(Far(ONE))
    ((way, mine),) = crowd.come(some(1), timeout=0.25)
    with pytest.raises(DeadlineExceeded, match=r"no answer from host:1 within 0\.25 s"):
        crowd.shared.result(way, mine)


def test_what_should_not_happen_is_told(caplog: pytest.LogCaptureFixture) -> None:
    assert unsettled(ValueError("the client is closed")).status is Status.CANCELLED
    assert unsettled(KeyboardInterrupt()).status is Status.CANCELLED
    assert not caplog.records
    assert str(unsettled(MemoryError())) == "INTERNAL: a shared request failed: MemoryError"
    assert len(caplog.records) == 1


def test_a_model_that_changed_is_asked_about_again_for_all() -> None:
    crowd = Crowd(Far(ONE))
    callers = crowd.come(some(3))
    crowd.send(callers[0][0].group)
    wide = Far(ModelSignature((TensorSpec("rows", FP64, (-1, 4)),), (SUMS,), batchable=True), version="2")
    crowd.far = wide
    callers = crowd.come(some(3))
    crowd.send(callers[0][0].group)
    assert crowd.results(callers) == of(0, 1, 2)
    assert wide.rows == [3]
