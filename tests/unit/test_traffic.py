"""The benchmarks' load generator, built and run against real servers: what it sends, how it judges answers."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))  # its scripts find each other there, as when they are run


from tests.service import http2_frames as http2  # noqa: E402

import harness  # noqa: E402
import served  # noqa: E402
import traffic  # noqa: E402
from forwardpass import protocol  # noqa: E402
from h2load import Load  # noqa: E402
from measure import audit  # noqa: E402
from traffic import Mix, Summary  # noqa: E402

LACK = traffic.missing() if sys.platform == "linux" else "the load generator needs Linux's epoll"
pytestmark = pytest.mark.skipif(bool(LACK), reason=LACK)

EVERYTHING = Mix("everything", id=True, timeout=True, traceparent=True)
AS_GRPCIO = Mix("as grpcio", "grpcio", id=True, timeout=True, traceparent=True)
RIGHT, OTHER = served.TWELVE[:2]  # two networks of the same widths
ANYWHERE = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return traffic.build(tmp_path_factory.mktemp("traffic"))


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return served.repository(tmp_path_factory.mktemp("models"), "twelve")


@pytest.fixture(scope="module")
def server(repository: Path) -> Iterator[harness.Server]:
    with harness.serve(repository, ANYWHERE) as found:
        yield found


Send = Callable[..., Summary]


@pytest.fixture
def send(program: Path, tmp_path: Path) -> Send:
    """Send the requests of tmp_path/requests for so many seconds."""

    def run(address: str, mix: Mix, seconds: float = 0.5, load: Load = Load(2, 8), tls: bool = False) -> Summary:  # noqa: B008
        files = tmp_path / "requests", tmp_path / "log"
        return traffic.finish(traffic.start(program, address, files[0], load, seconds, mix, files[1], tls), 30.0)

    return run


def _prepare(path: Path, repository: Path, mix: Mix, *models: str, rows: int = 1) -> None:
    """Requests to `models` in turn, the answers being those of RIGHT."""
    samples = served.samples(repository, (RIGHT,), rows, 64)
    traffic.write_requests(path / "requests", models, samples.rows, samples.answers, mix)


@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("typed", [False, True])
@pytest.mark.parametrize("style", ["indexed", "grpcio"])
def test_every_answer_of_a_server_is_right(
    send: Send, server: harness.Server, repository: Path, tmp_path: Path, style: str, typed: bool, rows: int
) -> None:
    mix = Mix("mix", style, id=True, timeout=True, traceparent=True, typed=typed)
    _prepare(tmp_path, repository, mix, RIGHT, rows=rows)
    before = server.scrape().total("forwardpass_requests_total", code="OK")
    summary = send(server.address, mix)
    assert summary.right == summary.sent > 100
    assert audit(summary, server.scrape().total("forwardpass_requests_total", code="OK") - before) == []
    log = traffic.read_log(tmp_path / "log")
    assert len(log.took) == summary.sent
    assert log.ok.all()
    assert (np.diff(log.ended) >= 0).all()


def test_identical_requests_are_answered_as_well(
    send: Send, server: harness.Server, repository: Path, tmp_path: Path
) -> None:
    mix = Mix("identical", rows=False)
    _prepare(tmp_path, repository, mix, RIGHT)
    summary = send(server.address, mix, load=Load(1, 1))
    assert summary.right == summary.sent > 10


def test_answers_that_are_another_networks_are_counted_as_wrong(
    send: Send, server: harness.Server, repository: Path, tmp_path: Path
) -> None:
    _prepare(tmp_path, repository, EVERYTHING, RIGHT, OTHER)
    summary = send(server.address, EVERYTHING)
    assert abs(summary.wrong - summary.right) <= 1
    assert summary.right + summary.wrong == summary.sent
    assert re.fullmatch(r"element \d+ is \S+, expected \S+", summary.first_problem)
    assert "WRONG" in audit(summary, None)[0]
    log = traffic.read_log(tmp_path / "log")
    assert log.ok.sum() == summary.right


def test_calls_that_fail_are_counted_with_their_status(
    send: Send, server: harness.Server, repository: Path, tmp_path: Path
) -> None:
    _prepare(tmp_path, repository, AS_GRPCIO, RIGHT, "unknown")
    summary = send(server.address, AS_GRPCIO)
    assert abs(summary.failed - summary.right) <= 1
    assert summary.first_problem.startswith("grpc-status 5 ")
    assert "failed" in audit(summary, None)[0]


@pytest.mark.slow
def test_over_tls(send: Send, program: Path, repository: Path, tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("the command openssl is not installed")
    certificate, key = harness.certificate(tmp_path)
    _prepare(tmp_path, repository, EVERYTHING, RIGHT)
    options = "--tls-certificate", str(certificate), "--tls-key", str(key)
    with harness.serve(repository, ANYWHERE, *options) as server:
        summary = send(server.address, EVERYTHING, tls=True)
    assert summary.right == summary.sent > 100


# -- what it sends, and answers that a server of Forwardpass would not give --------------------------------------------


@contextlib.contextmanager
def _grpcio(answer: Callable[[Any, Any], bytes | None]) -> Iterator[str]:
    """A grpcio server whose ModelInfer answers as `answer` does, given the message and the context."""
    method = grpc.unary_unary_rpc_method_handler(answer, protocol.ModelInferRequest.FromString)
    handler = grpc.method_handlers_generic_handler("inference.GRPCInferenceService", {"ModelInfer": method})
    server = grpc.server(futures.ThreadPoolExecutor(4))
    server.add_generic_rpc_handlers((handler,))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


def _echo_requests(path: Path, mix: Mix, most: int) -> NDArray[np.float32]:
    rows = np.random.default_rng(0).standard_normal((32, 1, 64), np.float32)
    traffic.write_echoes(path / "requests", "digits", rows, most, mix)
    return rows


@pytest.mark.parametrize("mix", [EVERYTHING, AS_GRPCIO], ids=lambda mix: mix.name)
def test_what_differs_differs_in_every_call(send: Send, tmp_path: Path, mix: Mix) -> None:
    calls: list[tuple[str, str, float, bytes]] = []

    def answer(message: Any, context: Any) -> bytes:
        metadata = dict(context.invocation_metadata())
        left = context.time_remaining()
        calls.append((message.id, metadata["traceparent"], left, bytes(message.raw_input_contents[0])))
        return bytes(message.SerializeToString())

    rows = _echo_requests(tmp_path, mix, 1 << 14)
    with _grpcio(answer) as address:
        summary = send(address, mix)
    assert summary.right == summary.sent == len(calls) > 32
    ids, traces, deadlines, contents = zip(*calls, strict=True)
    assert {int(id, 16) for id in ids} == set(range(summary.sent))
    assert len(set(traces)) == summary.sent
    assert all(re.fullmatch("00-[0-9a-f]{32}-[0-9a-f]{16}-01", trace) for trace in traces)
    assert set(contents) == {row.tobytes() for row in rows}
    assert 1.0 < min(deadlines) < 4.0 < 8.0 < max(deadlines) <= 10.0


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda m: m.MergeFrom(type(m)(id="0")), "the id '0', expected '0000"),
        (lambda m: m.ClearField("id"), "the id '', expected '0000"),
        (lambda m: m.ClearField("raw_output_contents"), "0 raw outputs, expected 1"),
        (lambda m: m.raw_output_contents.append(b""), "2 raw outputs, expected 1"),
        (lambda m: m.raw_output_contents.__setitem__(0, b"\0\0\0\0"), "4 bytes of output, expected 40"),
        (lambda m: m.raw_output_contents.__setitem__(0, b"\xff" * 40), "element 0 is "),
    ],
)
def test_an_answer_that_is_not_the_right_one_is_counted(
    send: Send, tmp_path: Path, change: Callable[[Any], None], problem: str
) -> None:
    def answer(message: Any, _: Any) -> bytes:
        response = protocol.ModelInferResponse(id=message.id, raw_output_contents=[bytes(40)])
        change(response)
        return bytes(response.SerializeToString())

    rows = np.zeros((4, 1, 64), np.float32)
    traffic.write_requests(tmp_path / "requests", ["digits"], rows, np.zeros((4, 1, 10), np.float32), EVERYTHING)
    with _grpcio(answer) as address:
        summary = send(address, EVERYTHING, 0.1)
    assert summary.wrong == summary.sent > 0
    assert summary.first_problem.startswith(problem)


def test_an_echo_of_something_else_is_wrong(send: Send, tmp_path: Path) -> None:
    _echo_requests(tmp_path, EVERYTHING, 100)
    with _grpcio(lambda message, _: bytes(message.SerializeToString())[:100]) as address:
        summary = send(address, EVERYTHING, 0.1)
        assert summary.right == summary.sent > 0
    with _grpcio(lambda message, _: bytes(message.SerializeToString())[:99] + b"\0") as address:
        summary = send(address, EVERYTHING, 0.1)
        assert summary.wrong == summary.sent > 0


def test_frames_are_those_of_grpcio(program: Path, tmp_path: Path) -> None:
    """Calls one after another: settings, header blocks and frames, octet for octet as the grpcio that is installed."""
    mix = Mix("plain", "grpcio")
    rows = _echo_requests(tmp_path, mix, 1 << 14)
    message = traffic._messages(["digits"], rows, mix)[0][5:]
    with _grpcio(lambda message, _: bytes(message.SerializeToString())) as address, _recorded(address) as (proxy, sent):
        with grpc.insecure_channel(proxy) as channel:
            call = channel.unary_unary(harness.METHOD)
            for _ in range(3):
                call(message, timeout=None, wait_for_ready=True)
        for seconds in (0.2, 2.0, 20.0):  # as long as three calls take here
            run = traffic.start(program, proxy, tmp_path / "requests", Load(1, 1), seconds, mix, tmp_path / "log")
            traffic.finish(run, 60.0)
            theirs, *_, ours = (_frames(bytes(octets)) for octets in sent)
            if [kind for kind, *_ in ours].count(http2.HEADERS) >= 3:
                break
    # Apart from those of the connection, whose sum is what counts, and that depend on what had been read when.
    assert theirs[0] == ours[0], "SETTINGS"
    agent = b"grpc-python/" + grpc.__version__.encode()
    calls = [(kind, flags, stream, p) for kind, flags, stream, p in theirs if stream and kind != http2.DATA]
    assert [kind for kind, *_ in calls] == [http2.HEADERS, http2.WINDOW_UPDATE] * 3
    same = [(k, f, s, re.sub(rb"grpc-python/[0-9.]+", agent, p)) for k, f, s, p in ours if s and k != http2.DATA]
    assert same[: len(calls)] == calls
    kinds = [(kind, flags) for kind, flags, stream, _ in ours if stream][:3]
    assert kinds == [(http2.HEADERS, 4), (http2.WINDOW_UPDATE, 0), (http2.DATA, 1)]


def test_fields_that_differ_are_written_as_by_grpcio(program: Path, tmp_path: Path) -> None:
    mix = Mix("all", "grpcio", timeout=True, traceparent=True)
    rows = _echo_requests(tmp_path, mix, 1 << 14)
    message = traffic._messages(["digits"], rows, mix)[0][5:]
    trace = "00-" + "8" * 32 + "-" + "8" * 16 + "-01"
    with _grpcio(lambda message, _: bytes(message.SerializeToString())) as address, _recorded(address) as (proxy, sent):
        with grpc.insecure_channel(proxy) as channel:
            call = channel.unary_unary(harness.METHOD)
            for seconds in (9.5, 5, 4.99, 2.0):  # the third takes the second's place
                call(message, timeout=seconds, metadata=(("traceparent", trace),), wait_for_ready=True)
        traffic.finish(
            traffic.start(program, proxy, tmp_path / "requests", Load(1, 1), 0.5, mix, tmp_path / "log"), 30.0
        )
    theirs, ours = ([p for kind, _, _, p in _frames(bytes(octets)) if kind == http2.HEADERS] for octets in sent)
    agent = b"grpc-python/" + grpc.__version__.encode()

    def shape(block: bytes) -> bytes:
        """Without what is random, and without which entry of the table an indexed field is."""
        block = re.sub(rb"grpc-python/[0-9.]+", agent, block)
        block = re.sub(rb"(@\x0cgrpc-timeout)[\x02-\x06]\d+[mS]", rb"\1", block)
        block = re.sub(rb"(\0\x0btraceparent7)00-[0-9a-f]{32}-[0-9a-f]{16}-01", rb"\1", block)
        return re.sub(rb"[\xbe-\xfe]", b"\xbe", block)

    assert shape(theirs[0]) == shape(ours[0])
    new, known = {shape(b) for b in ours[1:] if b"timeout" in b}, {shape(b) for b in ours[1:] if b"timeout" not in b}
    assert shape(theirs[1]) in new
    assert b"timeout" not in theirs[2]
    assert shape(theirs[2]) in known


@contextlib.contextmanager
def _recorded(address: str) -> Iterator[tuple[str, list[bytearray]]]:
    """A proxy before `address`, with what each of its clients sent so far."""
    sent: list[bytearray] = []
    host, _, port = address.rpartition(":")

    def pass_on(source: socket.socket, target: socket.socket, record: bytearray) -> None:
        with contextlib.suppress(OSError):
            while chunk := source.recv(1 << 16):
                record += chunk
                target.sendall(chunk)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    def accept(listener: socket.socket, stack: contextlib.ExitStack) -> None:
        with contextlib.suppress(OSError):
            while True:
                client = stack.enter_context(listener.accept()[0])
                server = stack.enter_context(socket.create_connection((host, int(port))))
                sent.append(bytearray())
                for source, target, record in ((client, server, sent[-1]), (server, client, bytearray())):
                    threading.Thread(target=pass_on, args=(source, target, record), daemon=True).start()

    with contextlib.ExitStack() as stack, socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=accept, args=(listener, stack))
        thread.start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}", sent
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def _frames(octets: bytes) -> list[tuple[int, int, int, bytes]]:
    """(type, flags, stream, payload) of what came after the preface."""
    assert octets.startswith(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
    found, at = [], 24
    while at + 9 <= len(octets):
        length = int.from_bytes(octets[at : at + 3], "big")
        stream = int.from_bytes(octets[at + 5 : at + 9], "big")
        found.append((octets[at + 3], octets[at + 4], stream, octets[at + 9 : at + 9 + length]))
        at += 9 + length
    return found


def test_a_large_difference_of_deadlines_turns_grpcios_table_over(send: Send, tmp_path: Path) -> None:
    """Both encoders' tables are read by another's decoder for as long as it takes to fill them several times."""
    deadlines = Mix("deadlines", "grpcio", timeout=True, traceparent=True)
    _echo_requests(tmp_path, deadlines, 1 << 14)
    with _grpcio(lambda message, _: bytes(message.SerializeToString())) as address:
        assert send(address, deadlines, 1.0).failed == 0


# -- where it cannot be built or run -----------------------------------------------------------------------------------


def test_without_a_compiler_the_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traffic, "COMPILER", "no-such-compiler")
    with pytest.raises(harness.BenchmarkError, match="libnghttp2-dev libssl-dev"):
        traffic.build(tmp_path)


def test_without_a_header_the_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traffic, "HEADERS", ("no/such.h",))
    with pytest.raises(harness.BenchmarkError, match=r"libnghttp2-dev libssl-dev[\s\S]*no/such.h"):
        traffic.build(tmp_path)


def test_a_program_that_is_newer_than_its_sources_is_not_built_again(program: Path) -> None:
    made = program.stat().st_mtime_ns
    assert traffic.build(program.parent).stat().st_mtime_ns == made
    assert traffic.version(program).startswith("libnghttp2 1.")


def test_what_cannot_be_sent_is_said(send: Send, tmp_path: Path) -> None:
    (tmp_path / "requests").write_bytes(b"nonsense")
    with pytest.raises(harness.BenchmarkError, match="not a file of prepared requests"):
        send("127.0.0.1:1", EVERYTHING)
    _echo_requests(tmp_path, EVERYTHING, 100)
    with pytest.raises(harness.BenchmarkError, match=r"cannot connect to 127\.0\.0\.1:1"):
        send("127.0.0.1:1", EVERYTHING)
