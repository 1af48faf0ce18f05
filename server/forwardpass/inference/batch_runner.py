"""Runs one batch: stacks its rows, runs the network, cuts the outputs into responses. No threads, no queue."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from forwardpass.batching.request import LargeTurn
from forwardpass.errors import DeadlineExceeded, Reason, RequestError, RunFailed
from forwardpass.execution.bound_row import bind
from forwardpass.execution.session import Session
from forwardpass.execution.stacking import stack, stack_into
from forwardpass.inference.encoder import encode_plain, encode_with_options, row_parts
from forwardpass.inference.large_run import JoinedOutputs, LargeRun
from forwardpass.inference.request import AnyRequest
from forwardpass.inference.request_template import RequestTemplate
from forwardpass.model.signature import ModelSignature
from forwardpass.transport.memory_budget import COUNTED_FROM

Arrays = Sequence[NDArray[Any]]


class BatchRunner:
    """Runs requests of one stack key as one matrix, or in slices of `max_rows` where rows are independent."""

    def __init__(
        self, session: Session, signature: ModelSignature, max_rows: int, row_independent: bool, shared: bool = True
    ) -> None:
        """`shared`: the session may run several batches at once, so that none can have its own buffers in it."""
        self.session = session
        # For a device, batches are stacked in the buffers that it copies from; for the CPU they may lie anywhere.
        self._room = session.room if session.own_thread else None
        self.signature = signature
        self.max_rows = max_rows
        self.row_independent = row_independent
        self._single_row = None if shared or session.own_thread else bind(signature, session)

    def run_single_row(self, request: AnyRequest, options: Any, matrices: list[int]) -> bytes | None:
        """The response to a single row by the fast path; None: the request must use `run`. Raises as `run`."""
        single, template = self._single_row, request.template
        if (
            single is None
            or template.rows != 1
            or template.response_options is not None
            or template.outputs != (single.place,)
        ):
            return None
        matrices.append(1)
        try:
            blob = single.answer(request.buffers[0], options)
        except RequestError:
            if options.terminate:
                raise _too_long() from None
            raise
        parts = template.replies.get(single.trailing) or row_parts(template, single.trailing, len(blob))
        return parts[0] + blob if not request.id_field else b"".join((parts[1], request.id_field, parts[2], blob))

    def run(self, requests: Sequence[AnyRequest], options: Any, matrices: list[int]) -> tuple[list[NDArray[Any]], Any]:
        """Stack and run. Returns the outputs [B, ...] that any of the requests asks for, and their places.

        The outputs may be overwritten by the next run. Appends the rows of each matrix to `matrices`. Raises
        RequestError if the run fails.
        """
        first: RequestTemplate = requests[0].template
        wanted = first.outputs
        rows = 0
        for request in requests:
            template = request.template
            rows += template.rows
            if template.outputs is not wanted and template.outputs != wanted:
                wanted = tuple(sorted({*wanted, *template.outputs}))
        signature = self.signature
        batchable = signature.batchable
        arrays: Arrays
        if self._room is not None and (room := self._room(rows)) is not None:
            for i, array in enumerate(room):
                stack_into([r.buffers[i] for r in requests], array)
            arrays = room
        else:
            arrays = stacked = []
            for i, tensor in enumerate(signature.inputs):
                shape = (rows, *first.batch_shapes[i][1:]) if batchable else first.batch_shapes[i]
                stacked.append(stack(tensor, [r.buffers[i] for r in requests], shape))
        if not batchable or rows <= self.max_rows or not self.row_independent:
            matrices.append(rows if batchable else 1)
            outputs = self._once(arrays, wanted, options)
        else:
            joined = JoinedOutputs(rows)
            self._slices(arrays, wanted, (0, rows), options, matrices, joined)
            return joined.arrays, wanted
        if batchable:
            for output in outputs:
                if not output.ndim or output.shape[0] != rows:
                    raise RunFailed(
                        f"an output has shape {list(output.shape)} for {rows} rows: axis 0 is not the batch"
                    )
        return outputs, wanted

    def _once(self, arrays: Arrays, wanted: tuple[int, ...], options: Any) -> list[NDArray[Any]]:
        try:
            return self.session.run(arrays, wanted, options)
        except RequestError:
            if options.terminate:
                raise _too_long() from None
            raise

    def run_turn(self, turn: LargeTurn[AnyRequest], options: Any, matrices: list[int]) -> None:
        """Run some rows of a large request, whose `large_run` gets the outputs. As `run` otherwise."""
        request = turn.request
        run: LargeRun = request.large_run
        rows = turn.start, turn.stop
        self._slices(run.inputs(self.signature), request.template.outputs, rows, options, matrices, run.outputs)

    def _slices(
        self,
        arrays: Arrays,
        wanted: tuple[int, ...],
        span: tuple[int, int],
        options: Any,
        matrices: list[int],
        joined: JoinedOutputs,
    ) -> None:
        """Run the rows from span[0] to span[1], more than a matrix may have; the outputs may be overwritten by the next
        run."""
        start, stop = span
        for first in range(start, stop, self.max_rows):
            piece = [a[first : min(stop, first + self.max_rows)] for a in arrays]
            rows = len(piece[0])
            matrices.append(rows)
            joined.put(first, rows, self._once(piece, wanted, options))

    def scatter(
        self,
        requests: Sequence[AnyRequest],
        outputs: Arrays,
        wanted: tuple[int, ...],
        failures: list[RequestError] | None = None,
    ) -> list[bytes | RequestError]:
        """Each request's rows of the outputs, as the bytes of its response.

        A response that cannot be encoded with its request's options (only with `template.response_options`) is
        replaced by an error, which is also appended to `failures`.
        """
        if not self.signature.batchable or len(wanted) != 1 or outputs[0].dtype == object:
            return self._each(requests, outputs, wanted, failures)
        # One output of fixed-size elements: the common case, kept short.
        (output,) = outputs
        blob = output.tobytes()
        trailing = output.shape[1:]
        stride = len(blob) // len(output) if len(output) else 0
        answers: list[bytes | RequestError] = []
        last: RequestTemplate | None = None
        parts: tuple[bytes, ...] = ()
        start = size = 0
        for request in requests:
            template = request.template
            if template is not last:
                if template.response_options is not None:
                    return self._each(requests, outputs, wanted, failures)
                last = template
                size = template.rows * stride
                if size >= COUNTED_FROM:
                    template.answer_bytes = size
                parts = template.replies.get(trailing) or row_parts(template, trailing, size)
            end = start + size
            if not request.id_field:
                answers.append(parts[0] + blob[start:end])
            else:
                answers.append(b"".join((parts[1], request.id_field, parts[2], blob[start:end])))
            start = end
        return answers

    def _each(
        self,
        requests: Sequence[AnyRequest],
        outputs: Arrays,
        wanted: tuple[int, ...],
        failures: list[RequestError] | None,
    ) -> list[bytes | RequestError]:
        """As `scatter`, request by request."""
        answers: list[bytes | RequestError] = []
        start = 0
        for request in requests:
            end = start + request.template.rows
            own = [o[start:end] for o in outputs] if self.signature.batchable else outputs
            try:
                answers.append(_reply(request, own, wanted))
            except RequestError as error:
                answers.append(error)
                if failures is not None:
                    failures.append(error)
            start = end
        return answers


def _too_long() -> DeadlineExceeded:
    return DeadlineExceeded("the run took longer than the server allows", reason=Reason.RUN_TIMEOUT)


def _reply(request: AnyRequest, outputs: Arrays, wanted: tuple[int, ...]) -> bytes:
    """One request's response from its own part of the outputs at the places `wanted`."""
    template: RequestTemplate = request.template
    chosen = [outputs[wanted.index(place)] for place in template.outputs]
    if template.response_options is not None:
        return encode_with_options(template, request.id_field, template.response_options, chosen)
    return encode_plain(template, request.id_field, chosen)
