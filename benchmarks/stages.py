"""Where a request's microseconds go inside the process: each station's share, measured by itself, per request.

    python benchmarks/stages.py [--model digits] [--batch 50] [--rows 1]

Runs the server's own objects without sockets: the frames of a group of `--batch` requests are read, its messages
decoded, queued, stacked, run, cut into answers and framed again and again on one core, and each station is timed in a
loop of its own. What sockets add, and caches that have gone cold, is the difference to the CPU time in `make bench`.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import ngh2
import numpy as np

from bodies import request as make_message
from forwardpass import protocol
from forwardpass.batching.admission import Admission
from forwardpass.batching.request import NEW, Batch, Closed
from forwardpass.execution.cpu_budget import available
from forwardpass.execution.ort_session import new_run_options
from forwardpass.execution.stacking import stack
from forwardpass.inference.accounting import record_batch
from forwardpass.inference.intake import Intake
from forwardpass.inference.request import InferenceRequest
from forwardpass.inference.worker import Worker
from forwardpass.observability.flight_recorder import FlightRecorder
from forwardpass.observability.model_metrics import BatchRecord, ModelMetrics
from forwardpass.protocol.timings import BatchTiming
from forwardpass.repository.repository import Repository
from forwardpass.settings import Settings
from forwardpass.transport.http2.connection import Connection
from forwardpass.transport.http2.engine import INITIAL_WINDOW_SIZE
from forwardpass.transport.http2.grpc_framing import MESSAGE_STRUCT
from forwardpass.transport.http2.limits import ConnectionLimits
from forwardpass.transport.http2.send_side import SendSide
from forwardpass.transport.interface import Answer, PendingRequest
from forwardpass.transport.memory_budget import MemoryBudget

REPEATS = 7  # of each measurement; the smallest counts, since whatever else the machine does only adds
SECONDS = 0.1  # of each repeat


class Nowhere:
    """A transport that takes the answers and does nothing with them."""

    def deliver(
        self, requests: Sequence[PendingRequest[int]], answers: Sequence[Answer], timing: BatchTiming | None
    ) -> None:
        pass


def microseconds(work: Callable[[], object]) -> float:
    """The quickest of several averages of `work`, in microseconds."""
    work()
    best = float("inf")
    for _ in range(REPEATS):
        count, began = 0, time.perf_counter()
        while (spent := time.perf_counter() - began) < SECONDS:
            for _ in range(10):
                work()
            count += 10
        best = min(best, spent / max(count, 1))
    return best * 1e6


def transport(message: bytes, answer: bytes, batch: int) -> tuple[float, float]:
    """Microseconds of reading the frames of `batch` calls of one client, and of making those of their answers.

    The client's calls differ in their deadline and trace, as real ones do. A connection cannot be read twice, so each
    is timed over a run of groups made before.
    """
    path = protocol.METHODS["ModelInfer"].path
    client = ngh2.Connection(ngh2.Role.CLIENT)
    client.initiate_connection({INITIAL_WINDOW_SIZE: 1 << 30})
    fields = [(":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "localhost:8001")]
    fields += [("te", "trailers"), ("content-type", "application/grpc"), ("user-agent", "stages")]
    constant = [(name.encode(), value.encode()) for name, value in fields]
    body = MESSAGE_STRUCT.pack(0, len(message)) + message
    limits = ConnectionLimits(1 << 20, 1 << 14, 1 << 24)
    server = Connection(limits, MemoryBudget(1 << 30), path.encode(), lambda _: None, exchange)
    server.out.owner = client
    with server.out.lock:
        exchange(server.out)

    def frames() -> bytes:
        for i in range(batch):
            timeout = b"%du" % (50_000 - i)
            trace = b"00-" + os.urandom(16).hex().encode() + b"-" + os.urandom(8).hex().encode() + b"-01"
            stream = client.send_request([*constant, (b"grpc-timeout", timeout), (b"traceparent", trace)])
            client.send_data(stream, body, end_stream=True)
        found: bytes = client.data_to_send()
        return found

    server.receive(frames())
    received = sent = float("inf")
    for _ in range(200):
        calls = [(call, answer, ()) for call, _ in server.arrived]
        server.arrived.clear()
        began = time.perf_counter()
        with server.out.lock:
            server.out.respond(calls)
        sent = min(sent, time.perf_counter() - began)
        group = frames()
        began = time.perf_counter()
        server.receive(group)
        received = min(received, time.perf_counter() - began)
    return received * 1e6, sent * 1e6


def exchange(out: SendSide) -> None:
    """What the server sends reaches the client, and its answers are forgotten."""
    client = out.owner
    assert isinstance(client, ngh2.Connection)
    if data := out.data_to_send(1 << 30):
        client.receive_data(data)
        client.events()


def measure(repository: Path, model: str, batch: int, rows: int) -> list[tuple[str, float]]:
    """(station, microseconds for a batch of `batch` requests of `rows` rows), the whole way last."""
    settings = Settings(repository=repository, max_requests=1 << 40, max_bytes=1 << 60)
    admission = Admission(settings.max_requests, settings.max_bytes)
    models = Repository(settings, available(), admission)
    models.recorder = FlightRecorder(settings.flight_batches, Closed.NAMES)
    for entry in models.discover():
        if entry.name == model:
            models.load(entry)
    worker: Worker = models.resolve(model, "")
    intake: Intake[int] = Intake(Nowhere(), models, admission, ModelMetrics("", ""), settings.max_message_bytes)
    tensor = worker.signature.inputs[0]
    message = make_message(model, np.random.default_rng(0).standard_normal((rows, tensor.shape[1])).astype("<f4"))

    def take() -> list[InferenceRequest[int]]:
        intake.begin()
        found = [intake.take(i, message, None) for i in range(batch)]
        intake._groups.clear()
        return [r for r in found if isinstance(r, InferenceRequest)]

    def whole() -> None:
        intake.begin()
        for i in range(batch):
            intake.take(i, message, None)
        intake.flush()
        while intake.run_pending():
            pass

    requests = take()
    queue, runner, options = worker.queue, worker._runner, new_run_options()

    def queued() -> None:
        for request in requests:
            request.state = NEW
        queue.offer(requests, 0.0)
        taken = queue.take(1.0)
        assert taken is not None
        queue.finish(taken)

    buffers = [r.buffers[0] for r in requests]
    shape = (batch * rows, *tensor.shape[1:])
    array = stack(tensor, buffers, shape)
    wanted = worker.signature.default_outputs
    outputs = worker.session.run([array], wanted, options)
    note = BatchRecord(((0.0, batch),), (batch * rows,), 0.0, 1e-5, 1e-4, batch)
    flight = worker.metrics.flight
    assert flight is not None
    ran = Batch(requests, batch * rows, 0, 0.0, Closed.IDLE, False)

    def recorded() -> None:
        record_batch(flight, ran, note, 1e-5, 0, answers=(), owed=())

    decoder = intake._decoder
    decode = microseconds(lambda: [decoder.decode(message) for _ in range(batch)])
    received, sent = transport(message, bytes(runner.scatter(requests, outputs, wanted)[0]), batch)  # type: ignore[arg-type]
    stations = [
        ("decode: message to template and tensor bytes", decode),
        ("intake: a request object, its group, its deadline", microseconds(take) - decode),
        ("queue: offer, take, finish", microseconds(queued)),
        ("stack: rows to one matrix", microseconds(lambda: stack(tensor, buffers, shape))),
        ("run: ONNX Runtime", microseconds(lambda: worker.session.run([array], wanted, options))),
        ("encode: the matrix of answers to responses", microseconds(lambda: runner.scatter(requests, outputs, wanted))),
        ("metrics: noting a batch, folding it in", microseconds(lambda: worker.metrics.ran(note))),
        ("flight recorder: a batch packed and kept", microseconds(recorded)),
    ]
    total = microseconds(whole)
    rest = total - sum(spent for _, spent in stations)
    return [
        ("receive: frames to calls", received),
        *stations,
        ("answer: responses to frames", sent),
        ("the rest: admission, slots, settling, glue", rest),
        ("all of it", received + total + sent),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repository", type=Path, default=Path("models"))
    parser.add_argument("--model", default="digits")
    parser.add_argument("--batch", type=int, default=50, help="requests in one matrix [50]")
    parser.add_argument("--rows", type=int, default=1, help="rows a request [1]")
    args = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    found = measure(args.repository, args.model, args.batch, args.rows)
    print(f"| {args.model}, {args.batch} requests of {args.rows} row(s) in a batch | µs a request | share |")
    print("| --- | ---: | ---: |")
    for station, spent in found:
        print(f"| {station} | {spent / args.batch:.2f} | {100 * spent / found[-1][1]:.0f} % |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
