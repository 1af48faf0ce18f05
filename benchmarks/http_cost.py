"""What a request over HTTP costs the server: CPU per single-row request, JSON and binary, beside another Python server.

    python benchmarks/http_cost.py [--against PYTHON] [--seconds 2] [--rounds 3] [--connections 1,16,64] [--keep]

A server of `digits` on one core; on the other this process, which sends requests as fast as they are answered, over
keep-alive connections. Rows and ids differ from request to request. `--against` is the Python of an environment with
MLServer and onnxruntime: it then serves the same file by ONNX Runtime with one thread, in one process, and the two take
turns. MLServer has no binary tensors over HTTP, so those are shown without a ratio.

Verdict: no answer was an error; and with `--against`, JSON requests cost at most half of what they cost there. Exit
status: 0 when that holds; 1 otherwise; 2 when it cannot be run here.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

import harness
from harness import BenchmarkError

PATH = "/v2/models/digits/infer"
WARM_UP = 0.5  # seconds of each measurement that are not counted
BODIES = 2000  # requests that differ, sent in turn
WANTED = 0.5

MODEL = """
import onnxruntime
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceResponse

class Network(MLModel):
    async def load(self):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(self.settings.parameters.uri, options)
        return True

    async def predict(self, payload):
        (y,) = self.session.run(["logits"], {"x": NumpyCodec.decode_input(payload.inputs[0])})
        return InferenceResponse(id=payload.id, model_name=self.name, outputs=[NumpyCodec.encode_output("logits", y)])
"""


def requests(binary: bool) -> list[bytes]:
    """Whole HTTP requests of one row each."""
    rows = np.random.default_rng(0).integers(0, 17, (BODIES, 64)).astype(np.float32) / 16
    return [_request(f"{place:016d}", row, binary) for place, row in enumerate(rows)]


def _request(name: str, row: np.ndarray, binary: bool) -> bytes:
    tensor: dict[str, object] = {"name": "x", "shape": [1, 64], "datatype": "FP32"}
    head: dict[str, object] = {"id": name, "inputs": [tensor]}
    raw, more = b"", ""
    if binary:
        raw = row.tobytes()
        tensor["parameters"] = {"binary_data_size": len(raw)}
        head["parameters"] = {"binary_data_output": True}
    else:
        tensor["data"] = row.tolist()
    text = json.dumps(head).encode()
    if binary:
        more = f"Inference-Header-Content-Length: {len(text)}\r\n"
    lines = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{more}"
    return f"{lines}Content-Length: {len(text) + len(raw)}\r\n\r\n".encode() + text + raw


class Connection:
    """One keep-alive connection with one request under way."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.socket = socket.create_connection(address, 30.0)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._data = b""

    def response(self) -> bytes | None:
        """The status line of the response, if it has been received whole."""
        chunk = self.socket.recv(1 << 16)
        if not chunk:
            raise BenchmarkError("the server closed a connection under load")
        self._data += chunk
        head, end, body = self._data.partition(b"\r\n\r\n")
        lines = head.lower().split(b"\r\n")
        length = next((int(line[15:]) for line in lines if line.startswith(b"content-length:")), 0)
        if not end or len(body) < length:
            return None
        self._data = body[length:]
        return lines[0]


def load(url: str, pid: int, connections: int, seconds: float, bodies: Sequence[bytes]) -> dict[str, float]:
    """Requests answered in a second, the server's CPU µs for each, and how many answers were errors."""
    parts = urlsplit(url)
    assert parts.hostname is not None and parts.port is not None
    poll, place, answered, errors = select.epoll(), connections, 0, 0
    opened: dict[int, Connection] = {}
    for number in range(connections):
        connection = Connection((parts.hostname, parts.port))
        opened[connection.socket.fileno()] = connection
        poll.register(connection.socket, select.EPOLLIN)
        connection.socket.sendall(bodies[number % len(bodies)])
    begin = time.monotonic() + WARM_UP
    start = cpu = 0.0
    while (now := time.monotonic()) < begin + seconds:
        if not start and now >= begin:
            start, cpu, answered = now, harness.cpu_seconds(pid), 0
        for descriptor, _ in poll.poll(0.1):
            status = opened[descriptor].response()
            if status is not None:
                answered += 1
                errors += b" 200 " not in status
                opened[descriptor].socket.sendall(bodies[place % len(bodies)])
                place += 1
    used, took = harness.cpu_seconds(pid) - cpu, time.monotonic() - start
    poll.close()
    for connection in opened.values():
        connection.socket.close()
    if not answered:
        raise BenchmarkError("no request was answered in time")
    return {"requests_per_second": answered / took, "cpu_us": used / answered * 1e6, "errors": errors}


@contextlib.contextmanager
def mlserver(python: Path, file: Path, folder: Path, core: int) -> Iterator[tuple[str, int]]:
    """MLServer with the network, ready: its URL and process."""
    with socket.socket() as free, socket.socket() as free_grpc, socket.socket() as free_metrics:
        ports = []
        for sock in (free, free_grpc, free_metrics):
            sock.bind(("127.0.0.1", 0))
            ports.append(sock.getsockname()[1])
    settings = dict(zip(("http_port", "grpc_port", "metrics_port"), ports, strict=True))
    settings |= {"host": "127.0.0.1", "parallel_workers": 0, "debug": False}
    (folder / "settings.json").write_text(json.dumps(settings))
    (folder / "network.py").write_text(MODEL)
    model = {"name": "digits", "implementation": "network.Network", "parameters": {"uri": str(file)}}
    (folder / "model-settings.json").write_text(json.dumps(model))
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [python.parent / "mlserver", "start", folder],
            stdout=log, stderr=log, cwd=folder, preexec_fn=lambda: os.sched_setaffinity(0, {core}),
        )  # fmt: skip
        try:
            url = f"http://127.0.0.1:{ports[0]}"
            _until_ready(f"{url}/v2/models/digits/ready", process, folder / "log")
            yield url, process.pid
        finally:
            harness.end(process)


def _until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + harness.START_SECONDS
    while time.monotonic() < until and process.poll() is None:
        with contextlib.suppress(urllib.error.URLError, OSError), urllib.request.urlopen(url, timeout=5.0):
            return
        time.sleep(0.1)
    raise BenchmarkError(f"MLServer did not become ready; it said\n{log.read_text()[-2000:]}")


def measure(arguments: argparse.Namespace, cores: harness.Cores, folder: Path) -> dict[str, dict[str, float]]:
    """By what was asked: medians of the rounds, and of each round's ratio."""
    repository = harness.repository(folder / "repository", ("digits",))
    other = folder / "other"
    other.mkdir()
    found: dict[str, dict[str, float]] = {}
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(harness.serve(repository, cores.server, "--health-port", "-1"))
        theirs = None
        if arguments.against is not None:
            file = next(repository.glob("digits/*/model.onnx"))
            theirs = stack.enter_context(mlserver(arguments.against, file, other, cores.server))
        for binary in (False, True):
            bodies = requests(binary)
            for connections in arguments.connections:
                ours, rivals = [], []
                for _ in range(arguments.rounds):
                    ours.append(load(server.http, server.pid, connections, arguments.seconds, bodies))
                    if theirs is not None and not binary:
                        rivals.append(load(*theirs, connections, arguments.seconds, bodies))
                row = {key: statistics.median(one[key] for one in ours) for key in ours[0]}
                row["errors"] = sum(one["errors"] for one in ours + rivals)
                if rivals:
                    row["mlserver_cpu_us"] = statistics.median(one["cpu_us"] for one in rivals)
                    pairs = zip(ours, rivals, strict=True)
                    row["ratio"] = statistics.median(one["cpu_us"] / other["cpu_us"] for one, other in pairs)
                name = f"{'binary' if binary else 'JSON'}, {connections} connection{'s' * (connections > 1)}"
                found[name] = row
                print(name, {key: round(value, 2) for key, value in row.items()}, flush=True)
    return found


def against(python: Path | None) -> str:
    """The other server and its version; "": there is none."""
    if python is None:
        return ""
    code = "import importlib.metadata as m; print('MLServer', m.version('mlserver'))"
    return subprocess.check_output([str(python), "-c", code], text=True).strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="the Python of an environment with MLServer and onnxruntime")
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--connections", type=lambda text: [int(n) for n in text.split(",")], default=[1, 16, 64])
    parser.add_argument("--keep", action="store_true", help="write benchmarks/results/http_cost.json")
    arguments = parser.parse_args()
    try:
        cores = harness.pin()
        with tempfile.TemporaryDirectory() as folder:
            found = measure(arguments, cores, Path(folder))
    except BenchmarkError as error:
        print(error, file=sys.stderr)
        return 2
    verdicts = [("no answer was an error", not any(row["errors"] for row in found.values()))]
    for name, row in found.items():
        if "ratio" in row:
            verdicts.append((f"{name}: {row['ratio']:.2f} of MLServer's CPU, at most {WANTED}", row["ratio"] <= WANTED))
    figures = {"against": against(arguments.against), "rounds": arguments.rounds, "cases": found}
    return harness.conclude("http_cost", cores, figures, verdicts, arguments.keep)


if __name__ == "__main__":
    sys.exit(main())
