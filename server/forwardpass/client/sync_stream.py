"""Many requests from any number of threads on one ModelStreamInfer call.

At most `in_flight` requests of a stream are unanswered; sending one more waits. An error of one request does not affect
the stream; an error that ends the stream fails all unanswered requests. A stream that has ended stays ended.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import Any, Self, Unpack

import grpc

from forwardpass.client.errors import CallError, Internal
from forwardpass.client.operations import Inputs, Operations, Steps
from forwardpass.client.options import MAP, SUBMIT, MapOptions, SubmitOptions, filled, shows
from forwardpass.client.pending import STREAM_CLOSED, PendingRequests, StreamedRequest
from forwardpass.client.results import Answer


class Stream:
    """Requests from any number of threads on one call. Made by `Client.stream`.

        with client.stream() as stream:
            futures = [stream.submit("digits", x) for x in rows]
            logits = [future.result()["logits"] for future in futures]

    Leaving the context waits for the answers to all requests; leaving it by an exception cancels them.
    """

    def __init__(
        self,
        operations: Operations,
        run: Callable[[Steps[Any]], Any],
        start: Callable[[Iterator[bytes]], Any],
        failure: Callable[[Any], CallError],
        address: str,
        in_flight: int,
    ) -> None:
        """`start` begins the call with an iterator of requests; `failure` converts its grpc.RpcError."""
        if in_flight < 1:
            raise ValueError(f"in_flight: expected at least 1, got {in_flight}")
        self._operations = operations
        self._run = run
        self._failure = failure
        self._pending = PendingRequests(operations, address)
        self._lock = threading.Lock()
        self._room = threading.Semaphore(in_flight)
        self._in_flight = in_flight
        self._outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._closed = False
        self._call = start(iter(self._outgoing.get, None))
        self._reader = threading.Thread(target=self._read, name="forwardpass-stream", daemon=True)
        self._reader.start()

    @shows(SUBMIT)
    def submit(self, model: str, inputs: Inputs, **options: Unpack[SubmitOptions]) -> Future[Answer]:
        """Send a request, as `Client.infer` does, without waiting for its answer; waits while there is no room.

        `timeout`, in seconds, is enforced by the server: it rejects a request that no instance could begin in time.
        Raises InvalidArgument for an invalid request, the error that ended the stream if it has ended, and ValueError
        once it is closed.
        """
        chosen = filled(SUBMIT, options)
        wire_id = self._pending.new_id()
        request, info = self._run(self._operations.streamed(wire_id, model, inputs, chosen))
        future: Future[Answer] = Future()
        self._room.acquire()
        try:
            with self._lock:
                if self._closed:
                    raise ValueError(STREAM_CLOSED)
                self._pending.add(wire_id, StreamedRequest(future, info, model, chosen["version"], chosen["id"]))
                self._outgoing.put(request)
        except BaseException:
            self._room.release()
            raise
        return future

    @shows(MAP)
    def map(self, model: str, inputs: Iterable[Inputs], **options: Unpack[MapOptions]) -> Iterator[Answer]:
        """The answers to all of `inputs`, in order; `inputs` is consumed as there is room. Raises the first error."""
        chosen = filled(MAP, options)
        outputs = chosen["outputs"]  # perhaps an iterator, and wanted for every request
        wanted = outputs if outputs is None or isinstance(outputs, str) else tuple(outputs)
        return self._answers(model, inputs, {**options, "outputs": wanted})

    def _answers(self, model: str, inputs: Iterable[Inputs], options: MapOptions) -> Iterator[Answer]:
        futures: deque[Future[Answer]] = deque()
        for each in inputs:
            if len(futures) >= self._in_flight:
                yield futures.popleft().result()
            futures.append(self.submit(model, each, **options))
        while futures:
            yield futures.popleft().result()

    def close(self) -> None:
        """Send no more, and wait for the answers to all requests."""
        self._finish()
        if threading.current_thread() is not self._reader:
            self._reader.join()

    def cancel(self) -> None:
        """End the stream at once: unanswered requests fail with Cancelled."""
        self._finish()
        self._call.cancel()
        if threading.current_thread() is not self._reader:
            self._reader.join()

    def _finish(self) -> None:
        with self._lock:
            if not self._closed:
                self._closed = True
                self._outgoing.put(None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.cancel()

    def _read(self) -> None:
        error: CallError = Internal("the stream failed")
        try:
            for message in self._call:
                if self._pending.on_response(message):
                    self._room.release()
            error = self._pending.over()
        except CallError as fault:
            error = fault
            self._call.cancel()
        except grpc.RpcError as fault:
            error = self._failure(fault)
        finally:
            with self._lock:
                left = self._pending.end(error)
            # Present and later waiters for room must find that the stream has ended.
            self._room.release(left + self._in_flight)
            self._outgoing.put(None)
