"""A client that sends what it likes: messages that a test built or broke; and what /metrics says."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from numpy.typing import NDArray
from prometheus_client.parser import text_string_to_metric_families

from forwardpass import protocol
from forwardpass.testing.server_process import ServerProcess

_GAUGES = re.compile(
    r"^forwardpass_(queue_requests|queue_rows|running_requests|in_flight_requests|in_flight_bytes)(?:{.*})? (\S+)$",
    re.MULTILINE,
)
INFER = protocol.METHODS["ModelInfer"].path


class Refused(Exception):
    """A call that ended with another status than OK."""

    def __init__(self, error: Any) -> None:
        super().__init__(f"{error.code().name}: {error.details()}")
        self.code: str = error.code().name
        self.text: str = error.details() or ""
        self.trailers: dict[str, Any] = dict(error.trailing_metadata() or ())

    def retry_after(self) -> float | None:
        """Seconds of the google.rpc.RetryInfo that came along."""
        status = status_pb2.Status.FromString(self.trailers.get("grpc-status-details-bin", b""))
        for detail in status.details:
            info = error_details_pb2.RetryInfo()
            if detail.Unpack(info):
                return float(info.retry_delay.ToMicroseconds()) * 1e-6
        return None


class Caller:
    """Calls one server, message by message."""

    def __init__(self, server: ServerProcess) -> None:
        self.server = server
        # A subchannel of its own: channels of one process share connections otherwise.
        self.channel = grpc.insecure_channel(server.address, options=[("grpc.use_local_subchannel_pool", 1)])

    def send(
        self, message: Any, timeout: float = 60.0, metadata: Any = (), path: str = INFER
    ) -> tuple[bytes, dict[str, Any]]:
        """The answer's bytes and its trailing metadata. Raises Refused."""
        data = message if isinstance(message, bytes) else message.SerializeToString()
        try:
            answer, call = self.channel.unary_unary(path).with_call(data, timeout=timeout, metadata=metadata)
        except grpc.RpcError as error:
            raise Refused(error) from None
        return answer, dict(call.trailing_metadata() or ())

    def refused(self, message: Any, **more: Any) -> Refused:
        """As `send`, of what must not be answered."""
        try:
            answer, _ = self.send(message, **more)
        except Refused as error:
            return error
        raise AssertionError(f"answered: {protocol.ModelInferResponse.FromString(answer)}")

    def infer(self, model: str, *arrays: NDArray[Any], **more: Any) -> list[NDArray[Any]]:
        """The outputs of a model for arrays named x (or, if several, as its metadata names them)."""
        answer, _ = self.send(request(model, *arrays), **more)
        return outputs(answer)

    def start(self, message: Any, timeout: float | None = 60.0) -> Any:
        """A call under way: a grpc.Future."""
        return self.channel.unary_unary(INFER).future(message.SerializeToString(), timeout=timeout)

    def all(self, messages: Sequence[Any]) -> list[Any]:
        """Send at once, wait for all: for each an answer's bytes, or Refused."""
        found: list[Any] = []
        for call in [self.start(m) for m in messages]:
            try:
                found.append(call.result())
            except grpc.RpcError as error:
                found.append(Refused(error))
        return found

    def health(self, service: str = "") -> str:
        check = health_pb2_grpc.HealthStub(self.channel).Check
        response = check(health_pb2.HealthCheckRequest(service=service), timeout=60)
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(response.status))

    def metric(self, name: str, **labels: str) -> float:
        """The sum of all samples of that name with at least these labels."""
        families = text_string_to_metric_families(self.server.metrics())
        samples = [sample for family in families for sample in family.samples]
        return sum(s.value for s in samples if s.name == name and labels.items() <= s.labels.items())

    def idle(self) -> bool:
        """Whether nothing waits, runs or is in flight."""
        found = _GAUGES.findall(self.server.metrics())  # asked often, so not by way of the parser
        assert len({name for name, _ in found}) == 5
        return all(float(value) == 0 for _, value in found)

    def close(self) -> None:
        self.channel.close()


def until(there: Callable[[], bool], what: str = "it", seconds: float = 60.0) -> None:
    """Wait for something that must come."""
    end = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < end, f"{what} did not come within {seconds:g} s"
        time.sleep(0.005)


def request(
    model: str, *arrays: NDArray[Any], names: Sequence[str] = ("x",), typed: bool = False, **fields: Any
) -> Any:
    """A ModelInferRequest for arrays; text as BYTES."""
    message = protocol.ModelInferRequest(model_name=model, **fields)
    for name, array in zip(names, arrays, strict=True):
        text = array.dtype == object
        datatype = next(d for d in protocol.DATATYPES.values() if (d.numpy is None if text else d.numpy == array.dtype))
        tensor = message.inputs.add(name=name, datatype=datatype.name, shape=array.shape)
        if typed:
            assert datatype.contents is not None
            getattr(tensor.contents, datatype.contents).extend(
                v.encode() if isinstance(v, str) else v for v in array.ravel().tolist()
            )
        elif text:
            message.raw_input_contents.append(packed(array.ravel().tolist()))
        else:
            message.raw_input_contents.append(array.tobytes())
    return message


def packed(words: Sequence[str]) -> bytes:
    return b"".join(len(w.encode()).to_bytes(4, "little") + w.encode() for w in words)


def outputs(answer: bytes) -> list[NDArray[Any]]:
    """The arrays of a response, text as its raw bytes."""
    response = protocol.ModelInferResponse.FromString(answer)
    found = []
    for output, data in zip(response.outputs, response.raw_output_contents, strict=True):
        dtype = protocol.DATATYPES[output.datatype].numpy
        found.append(np.array(data) if dtype is None else np.frombuffer(data, dtype).reshape(tuple(output.shape)))
    return found


def open_files(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def workers(server: ServerProcess) -> list[int]:
    """The processes that serve: not the one that waits, which has no thread with an epoll of its own."""
    children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
    return [int(pid) for pid in children if files(int(pid)).count("anon_inode:[eventpoll]") > 1]


def files(pid: int) -> list[str]:
    """What a process has open."""
    found = []
    with contextlib.suppress(OSError):  # it has ended
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                found.append(str(link.readlink()))
    return found


def thread_names(pid: int) -> list[str]:
    return sorted(task.read_text().strip() for task in Path(f"/proc/{pid}/task").glob("*/comm"))


@contextlib.contextmanager
def threads(count: int, work: Callable[[int], None]) -> Iterator[None]:
    """`work(i)` in `count` threads while inside; what goes wrong in one is raised at the end."""
    errors: list[BaseException] = []

    def run(i: int) -> None:
        try:
            work(i)
        except BaseException as error:
            errors.append(error)

    running = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in running:
        thread.start()
    try:
        yield
    finally:
        for thread in running:
            thread.join()
    if errors:
        raise errors[0]
