"""The benchmarks' own parts: h2load's output, bodies, ratios, tables; and that the document tells the result."""

from __future__ import annotations

import contextlib
import json
import re
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from pygrpc_native import EVENT_CALL, NativeGrpcFront

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))  # its scripts find each other there, as when they are run

import bench  # noqa: E402
import bodies  # noqa: E402
import h2load  # noqa: E402
import harness  # noqa: E402
import http_cost  # noqa: E402
import http_report  # noqa: E402
import openloop  # noqa: E402
import process_report  # noqa: E402
import report  # noqa: E402
from forwardpass import protocol  # noqa: E402

SAID = """starting benchmark...
finished in 3.30s, 5443.50 req/s, 1.96MB/s
requests: 10895 total, 10951 started, 10887 done, 10880 succeeded, 8 failed, 3 errored, 0 timeout
status codes: 10880 2xx, 0 3xx, 0 4xx, 7 5xx
traffic: 3.91MB (4105103) total, 128.51KB (131596) headers (space savings 88.57%), 3.60MB (3777789) data
                     min         max         mean         sd        +/- sd
time for request:     3.17ms     21.23ms     11.71ms       870us    91.32%
"""


def test_h2loads_summary_is_read() -> None:
    assert h2load.parse(SAID) == h2load.Summary(succeeded=10880, failed=8, data_bytes=3777789)


def test_a_summary_that_is_none_is_said_to_be() -> None:
    with pytest.raises(harness.BenchmarkError, match="Could not connect"):
        h2load.parse("Could not connect to host")


def test_the_log_gives_ends_and_windows() -> None:
    log = h2load.parse_log(b"1000000\t200\t500000\n1200000\t200\t100000\n1600000\t-1\t400000\n")
    assert log.ended == pytest.approx([1.5, 1.3, 2.0])
    inside = log.between(1.2, 1.9)
    assert inside.took == pytest.approx([0.5, 0.1])
    assert inside.ok.all()
    assert not log.ok.all()
    assert not len(h2load.parse_log(b"").took)


def test_an_unfinished_last_line_of_the_log_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"1000000\t200\t5\n20000")
    assert len(h2load.read_log(tmp_path / "log").took) == 1


def test_a_body_is_a_framed_model_infer_request() -> None:
    rows = np.arange(128, dtype=np.float32).reshape(2, 64)
    body = bodies.framed(bodies.request("digits", rows, timeout_us=20_000))
    compressed, length = bodies.PREFIX.unpack(body[:5])
    assert (compressed, length) == (0, len(body) - 5)
    message = protocol.ModelInferRequest.FromString(body[5:])
    assert message.model_name == "digits"
    assert list(message.inputs[0].shape) == [2, 64]
    assert message.parameters["timeout"].int64_param == 20_000
    assert np.frombuffer(message.raw_input_contents[0], "<f4").tolist() == rows.ravel().tolist()


def test_an_answer_is_read_back() -> None:
    response = protocol.ModelInferResponse(raw_output_contents=[np.float32([1, 2, 3, 4]).tobytes()])
    response.outputs.add(name="logits", datatype="FP32", shape=[2, 2])
    assert bodies.answer(response.SerializeToString()).tolist() == [[1, 2], [3, 4]]


def _result(digits_cpu: float = 20.0, wrong: int = 0) -> report.Result:
    """A result with round figures, two repeats each."""

    def repeats(*cpu: float, p50: float = 100.0, **more: float) -> list[dict[str, object]]:
        common = {"requests_per_second": 50_000.0, "p50_us": p50, "p99_us": 300.0, "problems": []}
        return [common | {"cpu_us": value} | more for value in cpu]

    return {
        "date": "2026-01-31",
        "machine": {
            "cpu": "Some CPU", "cores": 2, "server_core": 0, "load_core": 1, "kernel": "6.1", "python": "3.11.7",
            "packages": {"numpy": "2.4"}, "h2load": "nghttp2/1.52.0",
        },
        "repeats": 2,
        "apart": True,
        "scenarios": {
            "digits/real/4x16": repeats(digits_cpu - 1, digits_cpu + 1, batch_rows=40.0, checked=100, wrong=wrong),
            "digits/real-grpcio/4x16": repeats(16.0, 16.0),
            "digits/real/8x64": repeats(15.0, 15.0),
            "digits/real/1x1": repeats(180.0, 180.0, p50=100.0),
            "digits/identical/4x16": repeats(10.0, 10.0, load_share=0.251),
            "digits/identical/8x64": repeats(6.0, 6.0, batch_rows=60.0, checked=100, wrong=0),
            "digits/identical/1x1": repeats(150.0, 150.0, p50=80.0),
            "digits-16-rows/identical/4x16": repeats(40.0, 40.0),
            "tls/real/4x16": repeats(22.0, 22.0),
            "mnist/real/4x16": repeats(27.0, 27.0),
            "big/real/8x16": repeats(1100.0, 1100.0),
            "aio-echo/identical/4x16": repeats(200.0, 200.0),
            "aio-echo/identical/1x1": repeats(200.0, 200.0, p50=200.0),
        },
        "alone": {
            "digits": [{"1": 9.0, "64": 80.0}] * 2, "mnist": [{"64": 640.0}] * 2,
            "big": [{"1": 9e3, "64": 64e3, "256": 264e3}] * 2,
        },
    }  # fmt: skip


def test_ratios_are_those_that_are_aimed_at() -> None:
    values = [ratio.value for ratio in report.ratios(_result())]
    expected = [20 / 200, 10 / 200, 22 / 20, 40 / (80 / 4), 27 / (640 / 64), 1100 / 1000, 100 / 80, 80 / 200, 60.0, 0]
    assert values == pytest.approx(expected)
    verdicts = [ratio.verdict for ratio in report.ratios(_result())]
    assert verdicts == [
        "met, not the goal",  # of requests that differ
        "met",  # identical ones
        "met",  # TLS
        "met, not the goal",  # 16 rows
        "met, not the goal",  # mnist
        "met",  # the large network
        "met",  # one stream, against identical requests
        "met, and the goal",  # one stream, against the echo
        "met",
        "met",
    ]


def test_what_is_missed_is_said() -> None:
    verdicts = [ratio.verdict for ratio in report.ratios(_result(digits_cpu=30.0, wrong=1))]
    assert verdicts[0] == "NOT met"
    assert verdicts[-1] == "NOT met"


def test_ratios_of_what_was_not_measured_are_left_out() -> None:
    result = _result()
    del result["scenarios"]["aio-echo/identical/4x16"], result["alone"]["mnist"]
    whats = [ratio.what for ratio in report.ratios(result)]
    assert len(whats) == 7
    assert not any("mnist" in what for what in whats)


def test_tables_show_medians_with_least_and_most() -> None:
    text = report.markdown(_result())
    real = report.MIXES["real"]
    assert f"| digits, 1 row | {real} | 4x16 | 50,000 | 20.0 (19.0-21.0) | 0.100 | 0.100 | 0.300 | 40.0 | - |" in text
    assert "| digits, 1 row | nothing | 4x16 | 50,000 | 10.0 | 0.050 | 0.100 | 0.300 | - | 25% |" in text
    assert "| digits | 64 | 80.0 | 1.25 |" in text
    assert "Some CPU, 2 cores" in text


def test_a_single_core_is_not_passed_over_in_silence() -> None:
    assert "SHARED ONE CORE" in report.text(_result() | {"apart": False})


def test_rendering_replaces_what_is_between_the_markers_and_nothing_else() -> None:
    parts = [f"{report.BEGIN.format(name)}\nold\n{report.END.format(name)}\n" for name in ("result", "checks")]
    document = f"# Title\n\n{parts[0]}\nin between\n{parts[1]}\nthe rest\n"
    once = report.rendered(document, result="| new |", checks="| too |")
    assert "old" not in once
    assert once.startswith("# Title\n\n")
    assert once.index("| new |") < once.index("in between") < once.index("| too |") < once.index("the rest")
    assert report.rendered(once, result="| new |", checks="| too |") == once
    with pytest.raises(ValueError, match="result: end"):
        report.rendered("# Title", result="| new |")


def test_recorded_checks_are_told_with_what_does_not_hold(tmp_path: Path) -> None:
    assert "None" in report.checks_markdown(tmp_path)
    verdicts = [{"what": "memory grows by 1%", "holds": True}, {"what": "p99 doubles", "holds": False}]
    (tmp_path / "soak.json").write_text(json.dumps({"date": "2026-01-31", "verdicts": verdicts}))
    text = report.checks_markdown(tmp_path)
    assert "| `soak.py`, 2026-01-31 | memory grows by 1% | holds |" in text
    assert "| p99 doubles | does NOT hold |" in text


def test_the_headline_leads_with_requests_that_differ() -> None:
    text = " ".join(report.headline_text(_result()).split())
    assert text.index("20.0 µs") < text.index("15.0 µs") < text.index("16.0 µs") < text.index("10.0 µs")
    assert "200.0 µs" in text
    result = _result()
    del result["scenarios"]["digits/real/4x16"]
    assert "no run with such requests has been recorded yet" in " ".join(report.headline_text(result).split())


def test_every_scenario_and_mix_has_its_words() -> None:
    assert {s.what for s in bench.SCENARIOS} <= report.TITLES.keys()
    assert {s.mix.name for s in bench.SCENARIOS} <= report.MIXES.keys()
    names = [s.name for s in bench.SCENARIOS]
    assert len(set(names)) == len(names)
    assert report.ECHO in names


def test_requests_over_http_differ_and_are_whole() -> None:
    for binary in (False, True):
        sent = http_cost.requests(binary)
        assert len(set(sent)) == http_cost.BODIES
        head, _, body = sent[1].partition(b"\r\n\r\n")
        assert f"Content-Length: {len(body)}".encode() in head
        length = re.search(rb"Inference-Header-Content-Length: (\d+)", head)
        given = json.loads(body if length is None else body[: int(length[1])])
        assert given["id"] == f"{1:016d}" and ("data" in given["inputs"][0]) is not binary


def test_what_http_costs_is_told_with_what_does_not_hold(tmp_path: Path) -> None:
    assert "None" in http_report.markdown(tmp_path)
    case = {"requests_per_second": 2000.0, "cpu_us": 300.4, "errors": 0}
    result = {
        "date": "2026-11-28", "machine": {"cpu": "a CPU", "cores": 2, "python": "3.11.7"}, "rounds": 3,
        "against": "MLServer 1.7.1", "verdicts": [{"what": "half of it", "holds": False}],
        "cases": {"JSON, 1": case | {"mlserver_cpu_us": 500.2, "ratio": 0.6}, "binary, 1": case},
    }  # fmt: skip
    (tmp_path / "http_cost.json").write_text(json.dumps(result))
    text = http_report.markdown(tmp_path)
    assert "| JSON, 1 | 2,000 | 300 | 500 | 0.60 |" in text and "| binary, 1 | 2,000 | 300 | - | - |" in text
    assert "Does NOT hold: half of it." in text and "MLServer 1.7.1" in text


def test_the_documents_tell_what_is_recorded() -> None:
    for path, text in report.documents().items():
        assert path.read_text("utf-8") == text, "run benchmarks/report.py"


# -- the open-loop client, against a real HTTP/2 server ----------------------------------------------------------------


@contextlib.contextmanager
def _front(handle: Callable[[NativeGrpcFront, int, bytes, float | None], None]) -> Iterator[str]:
    """A server of one method on pygrpc-native; `handle` is given each call's id, message and seconds left."""
    front = NativeGrpcFront("127.0.0.1:0", [(harness.METHOD, False)], io_threads=1, call_details=True)
    front.start()

    def serve() -> None:
        while (events := front.recv_batch_details(64)) is not None:
            for kind, call, _, message, _, details in events:
                if kind == EVENT_CALL and message is not None and details is not None:
                    handle(front, call, message, details[2])

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield f"127.0.0.1:{front.bound_port}"
    finally:
        front.close()
        thread.join(5.0)


def test_the_open_loop_client_tells_answers_from_refusals() -> None:
    def handle(front: NativeGrpcFront, call: int, message: bytes, _: float | None) -> None:
        if message == b"refuse me":
            front.fail(call, 8, "no")
        elif message != b"forget me":
            front.respond(call, b"header" + message)

    bodies_sent = [openloop.Body(m, b"right") for m in (b"right", b"wrong", b"refuse me", b"forget me")]
    with _front(handle) as address:
        outcome = openloop.run(address, bodies_sent, np.arange(8) * 1e-3, None, patience=1.0, connections=2)
    assert outcome.state.tolist() == [openloop.OK, openloop.WRONG, openloop.REFUSED, openloop.WAITING] * 2
    assert len(outcome.latencies()) == 2
    assert np.isnan(outcome.ended).tolist() == [False, False, False, True] * 2
    assert (outcome.sent >= outcome.due).all()


def test_the_open_loop_client_sends_what_is_left_of_a_deadline_and_never_ends_a_call_itself() -> None:
    told: list[float | None] = []

    def handle(front: NativeGrpcFront, call: int, message: bytes, left: float | None) -> None:
        told.append(left)
        front.respond(call, message)

    with _front(handle) as address:
        openloop.run(address, [openloop.Body(b"m", b"m")], np.zeros(1), 60.0, patience=60.0)
        openloop.run(address, [openloop.Body(b"m", b"m")], np.zeros(1), None, patience=60.0)
    assert told[0] is not None
    assert 30.0 < told[0] <= 60.0
    assert told[1] is None


def test_more_than_the_window_waits_for_the_server_to_grant_it() -> None:
    def handle(front: NativeGrpcFront, call: int, message: bytes, _: float | None) -> None:
        front.respond(call, message[-1:])

    big = openloop.Body(bytes(15_999) + b"!", b"!")
    with _front(handle) as address:
        outcome = openloop.run(address, [big], np.zeros(32), None, patience=60.0, connections=1)
    assert outcome.count(openloop.OK) == 32


def test_answers_may_go_on_beyond_the_window_that_was_granted_first(monkeypatch: pytest.MonkeyPatch) -> None:
    # In reality 2 GiB: what a soak of some hours receives on a connection.
    monkeypatch.setattr(openloop, "MAX_WINDOW", 70_000)

    def handle(front: NativeGrpcFront, call: int, _: bytes, __: float | None) -> None:
        front.respond(call, bytes(9_999) + b"!")

    with _front(handle) as address:
        outcome = openloop.run(address, [openloop.Body(b"m", b"!")], np.zeros(64), None, patience=60.0, connections=1)
    assert outcome.count(openloop.OK) == 64


def test_latency_counts_from_when_a_request_was_due() -> None:
    due, sent, ended = np.array([[0.0, 1.0], [0.5, 1.0], [0.6, 1.01]])
    outcome = openloop.Outcome(due, sent, ended, np.full(2, openloop.OK, np.int8))
    assert outcome.latencies() == pytest.approx([0.6, 0.01])
    assert outcome.lateness() == pytest.approx([0.5, 0.0])
    assert outcome.in_time(0.02) == 1
    assert len(outcome.between(0.5, 2.0).due) == 1


def test_poisson_arrivals_have_the_rate_they_should() -> None:
    times = openloop.poisson(1000.0, 10.0)
    assert len(times) == pytest.approx(10_000, rel=0.05)
    assert (np.diff(times) >= 0).all()
    assert times[-1] < 10.0


def test_what_processes_give_is_told_with_what_does_not_hold(tmp_path: Path) -> None:
    assert "None" in process_report.markdown(tmp_path)
    row = {
        "scenario": "digits/real/8x16", "processes": 2, "requests_per_second": 70_000.4, "of_one": 1.8, "cpu_us": 20.04,
        "cpu_ratio": 0.97, "p99_us": 4700.0,
    }  # fmt: skip
    result = {
        "date": "2026-11-29", "machine": {"cpu": "a CPU"}, "rounds": 3, "cores": 2, "rows": [row],
        "verdicts": [{"what": "half of it", "holds": False}, {"what": "the rest", "holds": True}],
    }  # fmt: skip
    (tmp_path / "process_counts.json").write_text(json.dumps(result))
    text = process_report.markdown(tmp_path)
    assert "| `digits`, requests that differ | 2 | 70,000 | 1.80 | 20.0 | 0.97 | 4.7 |" in text
    assert "Does NOT hold: half of it." in text and "the rest" not in text
