"""MLPerf LoadGen against a server over gRPC: scenarios Server, SingleStream and Offline, with LoadGen's own verdict.

    python tests/load/mlperf_server.py HOST:PORT MODEL --slo p99=10ms                  search the rate, then judge it
    python tests/load/mlperf_server.py HOST:PORT MODEL --slo p99=10ms --qps 2000
    python tests/load/mlperf_server.py HOST:PORT MODEL --scenario SingleStream
    python tests/load/mlperf_server.py HOST:PORT MODEL --scenario Offline

LoadGen (PyPI mlcommons-loadgen; the extra `loadtest`) makes the schedule, keeps the time and writes its logs to --out;
here its queries only become calls and the ends of calls its answers. Server sends single rows on a Poisson schedule and
counts from when each was due; SingleStream has one row in flight; Offline hands over all rows at once, sent --rows a
request with --in-flight requests at a time. The objective is LoadGen's `server_target_latency`. The shortest run that
MLPerf accepts for a submission is 600 s; --duration says how long it is here. Exit status 0 where LoadGen says VALID.
"""

from __future__ import annotations

import argparse
import os
import re
import select
import sys
import threading
from collections import deque
from pathlib import Path
from typing import Any

from forwardpass.errors import ForwardpassError
from forwardpass.loadtest import measurement, objective_search, request_bodies
from forwardpass.loadtest.target import LoadClient, LoadTarget
from forwardpass.transport.http2.client_connection import ClientConnection, framed, request_fields

try:
    import mlperf_loadgen as loadgen
except ImportError:
    sys.exit("mlperf_server: needs LoadGen: pip install 'forwardpass[loadtest]'")

QUIET = 0.02  # seconds that the thread of the calls sleeps where nobody wakes it


class Caller:
    """Makes calls for LoadGen on a few connections, in a thread of its own; `issue` may be called from any other.

    Each entry of `issue` is (LoadGen's ids, message): one call, which completes all of those ids.
    """

    def __init__(self, address: str, connections: int, in_flight: int) -> None:
        host, _, port = address.rpartition(":")
        self._connections = [ClientConnection(host, int(port)) for _ in range(connections)]
        self._fields = request_fields(request_bodies.PATH, address)
        self._queue: deque[tuple[Any, bytes]] = deque()
        self._limit = in_flight
        self._wake = os.eventfd(0, os.EFD_NONBLOCK)
        self._asleep = False
        self._going = True
        self.failed: dict[int, int] = {}  # calls by status
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def issue(self, calls: list[tuple[Any, bytes]]) -> None:
        self._queue.extend(calls)
        if self._asleep:
            os.eventfd_write(self._wake, 1)

    def close(self) -> None:
        self._going = False
        self._thread.join(10.0)
        for connection in self._connections:
            connection.close()

    def _work(self) -> None:
        queue, connections, fields = self._queue, self._connections, self._fields
        poll = select.epoll()
        by_file = {connection.socket.fileno(): connection for connection in connections}
        for file in by_file:
            poll.register(file, select.EPOLLIN)
        poll.register(self._wake, select.EPOLLIN)
        turn = flying = 0
        while self._going:
            while queue and flying < self._limit:
                ids, body = queue.popleft()
                turn += 1
                flying += 1
                connections[turn % len(connections)].start(ids, fields, body)
            for connection in connections:
                connection.flush()
            self._asleep = True
            # What was issued before the flag was seen is in the queue: look once more before sleeping.
            events = poll.poll(0.0 if queue and flying < self._limit else QUIET)
            self._asleep = False
            for file, _ in events:
                if file == self._wake:
                    os.eventfd_read(self._wake)
                    continue
                ended = by_file[file].receive()
                flying -= len(ended)
                done = []
                for ids, status, _, _ in ended:
                    if status:
                        self.failed[status] = self.failed.get(status, 0) + 1
                    done += [loadgen.QuerySampleResponse(id_, 0, 0) for id_ in ids]
                if done:
                    loadgen.QuerySamplesComplete(done)
                if by_file[file].lost:
                    poll.unregister(file)


def settings(args: argparse.Namespace, qps: float) -> Any:
    """LoadGen's settings for the scenario."""
    found = loadgen.TestSettings()
    found.scenario = getattr(loadgen.TestScenario, args.scenario)
    found.mode = loadgen.TestMode.PerformanceOnly
    found.min_duration_ms = int(args.duration * 1000)
    found.min_query_count = 1
    if args.scenario == "Server":
        found.server_target_qps = qps
        found.server_target_latency_ns = int(args.slo.seconds * 1e9)
        found.server_target_latency_percentile = args.slo.q
        found.server_coalesce_queries = True
    elif args.scenario == "Offline":
        found.offline_expected_qps = qps
    else:
        found.single_stream_expected_latency_ns = 200_000
    return found


def run(args: argparse.Namespace, qps: float, one: list[bytes], many: list[bytes]) -> dict[str, str]:
    """One scenario; what LoadGen's summary says, by its own words."""
    args.out.mkdir(parents=True, exist_ok=True)
    offline = args.scenario == "Offline"
    caller = Caller(args.target, args.connections, args.in_flight if offline else 1 << 30)

    def issue(samples: list[Any]) -> None:
        if offline:
            ids = [sample.id for sample in samples]
            rows = args.rows
            # The last one takes fewer ids than rows: its call answers all of them all the same.
            caller.issue([(ids[i : i + rows], many[i // rows % len(many)]) for i in range(0, len(ids), rows)])
        else:
            caller.issue([((sample.id,), one[sample.index]) for sample in samples])

    sut = loadgen.ConstructSUT(issue, lambda: None)
    qsl = loadgen.ConstructQSL(len(one), len(one), lambda _: None, lambda _: None)
    logs = loadgen.LogSettings()
    logs.log_output.outdir = str(args.out)
    logs.log_output.copy_summary_to_stdout = False
    loadgen.StartTestWithLogSettings(sut, qsl, settings(args, qps), logs)
    loadgen.DestroyQSL(qsl)
    loadgen.DestroySUT(sut)
    caller.close()
    summary = (args.out / "mlperf_log_summary.txt").read_text()
    print(summary.partition("Test Parameters Used")[0].strip("=\n"))
    said = dict(re.findall(r"^(.+?)\s*: (.+)$", summary, re.MULTILINE))
    if caller.failed:
        print(f"calls that failed, by gRPC status: {caller.failed}")
        said["Result is"] = "INVALID"
    return said


def main() -> int:
    parser = argparse.ArgumentParser(description="MLPerf LoadGen over gRPC.")
    parser.add_argument("target", metavar="HOST:PORT")
    parser.add_argument("model")
    parser.add_argument("--scenario", choices=["Server", "SingleStream", "Offline"], default="Server")
    parser.add_argument(
        "--slo", type=objective_search.parse, default=objective_search.parse("p99=10ms"), help="[p99=10ms]"
    )
    parser.add_argument("--qps", type=float, help="the rate to judge, or to expect; found out where it is not said")
    parser.add_argument("--duration", type=float, default=30.0, help="seconds, at least [30]")
    parser.add_argument("--probe", type=float, default=2.0, help="seconds of each probe of the search [2]")
    parser.add_argument("--repeats", type=int, default=2, help="searches [2]")
    parser.add_argument("--connections", type=int, default=4)
    parser.add_argument("--rows", type=int, default=64, help="of a request in Offline [64]")
    parser.add_argument("--in-flight", type=int, default=16, help="requests at a time in Offline [16]")
    parser.add_argument("--core", type=int, help="pin LoadGen, and what searches, to this core")
    parser.add_argument("--out", type=Path, default=Path("mlperf"), help="where LoadGen's logs go [mlperf]")
    args = parser.parse_args()
    sys.setswitchinterval(0.0005)  # LoadGen's thread and that of the calls hand over often
    try:
        info = request_bodies.info(args.target, args.model)
        requests = request_bodies.make(info, "", {1: 1.0}, None, 0)
        batches = request_bodies.make(info, "", {args.rows: 1.0}, None, 0)
        qps = args.qps or 1.0
        if args.scenario == "Offline" and not args.qps:
            # LoadGen makes as many rows as this expects to last for the duration, and half as many again.
            target = LoadTarget(args.target, args.model, batches, LoadClient(core=args.core, warm_up=0.5, processes=1))
            qps = 1.5 * args.rows * target.closed(args.in_flight, args.probe).throughput
        if args.scenario == "Server" and not args.qps:
            target = LoadTarget(args.target, args.model, requests, LoadClient(core=args.core, warm_up=0.5))

            def probe(rate: float, seconds: float) -> measurement.Measurement:
                point = target.at_rate(rate, seconds)
                print(measurement.line(point), file=sys.stderr)
                return point

            knee = objective_search.search(probe, args.slo, args.probe, args.repeats, start=1000.0)
            qps = knee.confirmed.offer.rate
            found = f"{knee.objective} up to {knee.rate:,.0f}/s ({knee.low:,.0f} to {knee.high:,.0f})"
            print(f"{found}; judged at {qps:,.0f}/s")
        if args.core is not None:
            os.sched_setaffinity(0, {args.core})
        one = [framed(message) for message in requests.messages]
        many = [framed(message) for message in batches.messages]
        said = run(args, qps, one, many)
    except ForwardpassError as error:
        print(f"mlperf_server: {error}", file=sys.stderr)
        return 2
    return 0 if said.get("Result is") == "VALID" else 1


if __name__ == "__main__":
    sys.exit(main())
