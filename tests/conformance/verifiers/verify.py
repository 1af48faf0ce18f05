"""Calls a server in each way that a user does, compares every answer byte by byte, and prints the outcomes as JSON.

verify.py ADDRESS FOLDER CALLS [AUTHORITY.pem]. Any grpcio; `answers.py` beside this folder has what FOLDER
holds and what is printed.
"""

import itertools
import json
import random
import sys
import threading
from collections import Counter, defaultdict
from pathlib import Path

import grpc

ADDRESS, FOLDER, CALLS = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
SERVICE = "/inference.GRPCInferenceService/"
MARK = b"########"  # where a call's id goes
METADATA = (("x-trace", "a b,c"), ("x-token-bin", bytes(range(256))))
SMALL = [f"small{i}" for i in range(8)]
LARGE = ["large4", "large8", "large16"]
PATIENCE = 60.0

found: dict[str, Counter[str]] = defaultdict(Counter)
lock = threading.Lock()
ids = itertools.count(10_000_000)
files = {path.name: path.read_bytes() for path in FOLDER.iterdir() if path.suffix != ".pem"}

options = [("grpc.enable_http_proxy", 0), ("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
if len(sys.argv) > 4:
    channel = grpc.secure_channel(ADDRESS, grpc.ssl_channel_credentials(Path(sys.argv[4]).read_bytes()), options)
else:
    channel = grpc.insecure_channel(ADDRESS, options)
infer = channel.unary_unary(SERVICE + "ModelInfer")
stream_infer = channel.stream_stream(SERVICE + "ModelStreamInfer")


def note(check: str, outcome: str) -> None:
    with lock:
        found[check][outcome] += 1


def wanted(name: str, answer: str = "response") -> tuple[bytes, bytes]:
    """The request of a new id, and its answer."""
    mark = str(next(ids)).encode()
    return files[f"{name}.request"].replace(MARK, mark, 1), files[f"{name}.{answer}"].replace(MARK, mark, 1)


def unary(check: str, name: str, timeout: float = PATIENCE, cancel_after: float = -1.0, **more: object) -> None:
    request, response = wanted(name)
    call = infer.future(request, timeout=timeout, metadata=METADATA, **more)
    if cancel_after >= 0:
        threading.Timer(cancel_after, call.cancel).start() if cancel_after else call.cancel()
    try:
        note(check, "answered" if call.result() == response else "wrong")
    except grpc.FutureCancelledError:
        note(check, "1")
    except grpc.RpcError as error:
        note(check, str(error.code().value[0]))


def stream(check: str, names: list[str]) -> None:
    pairs = [wanted(name, "streamed") for name in names]
    expected = [response for _, response in pairs]
    try:
        call = stream_infer((request for request, _ in pairs), timeout=PATIENCE, metadata=METADATA)
        for got, response in itertools.zip_longest(call, expected):
            note(check, "answered" if got == response else "wrong")
    except grpc.RpcError as error:
        note(check, str(error.code().value[0]))


def side_by_side(jobs: list[tuple[object, ...]], threads: int = 8) -> None:
    """Each job a function and its arguments."""
    queue = iter(jobs)

    def work() -> None:
        while True:
            with lock:
                job = next(queue, None)
            if job is None:
                return
            function, *arguments = job
            function(*arguments)

    running = [threading.Thread(target=work) for _ in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()


def errors() -> None:
    for check, name, path in (
        ("missing model", "missing", "ModelInfer"),
        ("missing method", "missing", "NoMethod"),
        ("oversized", "oversized", "ModelInfer"),
    ):
        try:
            channel.unary_unary(SERVICE + path)(files[f"{name}.request"], timeout=PATIENCE)
            note(check, "answered")
        except grpc.RpcError as error:
            note(check, str(error.code().value[0]))


compressed = lambda how: lambda check, name: unary(check, name, compression=how)  # noqa: E731
side_by_side([(unary, "unary", SMALL[i % 8]) for i in range(CALLS)])
for check, how in (("gzip", grpc.Compression.Gzip), ("deflate", grpc.Compression.Deflate)):
    side_by_side([(compressed(how), check, name) for name in [*SMALL * (CALLS // 32), "large4"]])
side_by_side([(unary, "large", name) for name in LARGE * 3], 3)
side_by_side([(stream, "stream", [SMALL[i % 8] for i in range(CALLS // 4)]) for _ in range(4)])
if "large4.streamed" in files:
    side_by_side([(stream, "large stream", LARGE * 2)] * 2)
side_by_side(
    [(unary, "deadlines", "slow", random.uniform(0.001, 0.02)) for _ in range(40)]
    + [(unary, "beside deadlines", SMALL[i % 8]) for i in range(80)]
)
side_by_side(
    [(unary, "cancels", ("slow", "large4", "small0")[i % 3], PATIENCE, (i % 6) / 1000) for i in range(120)]
    + [(unary, "beside cancels", SMALL[i % 8]) for i in range(80)]
)
errors()
side_by_side([(unary, "after all", SMALL[i % 8]) for i in range(80)])
channel.close()
print(json.dumps(found))
