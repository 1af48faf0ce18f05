"""One call's request in the server: its template, its tensors, and where its answer goes.

It carries its own reply sink and timestamps, so that no table of requests has to be kept in step with the queue.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

from forwardpass.batching.request import NEW, Request
from forwardpass.execution.stacking import Buffer
from forwardpass.inference.large_run import LargeRun
from forwardpass.inference.request_template import RequestTemplate
from forwardpass.observability.log_limit import LogLimit
from forwardpass.protocol.timings import BatchTiming
from forwardpass.transport.interface import Answer, KnowsOrigin, ReplySink

logger = logging.getLogger(__name__)
logger.addFilter(LogLimit())

CallT = TypeVar("CallT")


class InferenceRequest(Request, Generic[CallT]):
    """One call's rows; `call` identifies the call to its transport."""

    decoded: float  # when it was; set only if requests are traced
    large_run: LargeRun  # set only if it takes several turns
    __slots__ = ("call", "decoded", "id_field", "large_run", "reply_sink", "template", "timings")

    def __init__(
        self,
        template: RequestTemplate,
        buffers: Sequence[Buffer],
        rows: int,
        nbytes: int,
        arrival: float,
        deadline: float,
        priority: int,
        reply_sink: ReplySink[CallT],
        call: CallT,
        timings: bool = False,
        id_field: bytes = b"",
    ) -> None:
        # One is made for every request, hence the positional parameters, which take half the time of keywords, and
        # Request.__init__ inlined, which saves a tenth.
        self.stack_key = template.stack_key
        self.buffers = buffers
        self.rows = rows
        self.nbytes = nbytes
        self.arrival = arrival
        self.deadline = deadline
        self.priority = priority
        self.state = NEW
        self.order = (priority, arrival)
        self.template = template
        self.reply_sink = reply_sink
        self.call = call
        self.timings = timings  # whether its response must carry its batch's timings
        self.id_field = id_field  # its id as a message field, tag and length included; empty: no id

    @property
    def client(self) -> str:
        """The address that its connection came from; empty if its transport doesn't know. Costs a system call."""
        sink = self.reply_sink
        peer = sink.origin(self.call).peer if isinstance(sink, KnowsOrigin) else None
        return "" if peer is None else peer()

    def cancel(self) -> None:
        """Cancel it: its client no longer waits."""
        self.template.target.cancel(self)


class TimedInferenceRequest(InferenceRequest[CallT]):
    """A request with a queue timeout: rejected if no instance was free by `start_by`, however long its run takes."""

    __slots__ = ("start_by",)


AnyRequest = InferenceRequest[Any]  # of any transport: a worker serves all of them


class RejectedRequest(Generic[CallT]):
    """A call that was never queued, in the form that `deliver` accepts."""

    __slots__ = ("arrival", "call")

    timings = False

    def __init__(self, call: CallT, arrival: float) -> None:
        self.call = call
        self.arrival = arrival

    def cancel(self) -> None:
        """Does nothing: it was never queued."""


def deliver(model: str, requests: Sequence[AnyRequest], answers: Sequence[Answer], timing: BatchTiming | None) -> None:
    """Send the answers, each by its own transport. A failing transport must not affect the model."""
    sinks = {r.reply_sink for r in requests} if len(requests) != 1 else (requests[0].reply_sink,)
    for sink in sinks:
        mine, its = requests, answers
        if len(sinks) > 1:
            places = [i for i, r in enumerate(requests) if r.reply_sink is sink]
            mine, its = [requests[i] for i in places], [answers[i] for i in places]
        try:
            sink.deliver(mine, its, timing)
        except Exception:
            logger.exception("model %s: %d answers could not be sent", model, len(mine))
