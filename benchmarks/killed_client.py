"""A client with 1,000 requests in the queue is killed: which of them still run, and what do its neighbours notice?

    python benchmarks/killed_client.py [--rounds 5]

The model is slow (about 4 ms a batch of 4), so that a thousand requests are more than a second of work. In each round
neighbours send at a steady rate (openloop.py, every answer compared); then a process of its own sends 1,000 requests
over one connection, and once the server's queue holds most of them it gets SIGKILL. From there on the kernel closes its
connection, and the server knows as soon as it reads that.

What ran is told by the server's counters, exactly, once all is settled: rows run, less the neighbours' rows, are the
killed client's; of those, the ones it got an answer for (OK, less the neighbours' OK) ran before it was known to be
gone. The rest were computed for nobody: at most the matrix that was being run when the connection closed; or something
ran that was known to be cancelled.

Verdict: in every round each of the 1,000 is settled once and at most one matrix is computed in vain; over all rounds
the p99 of neighbours' requests that were due after the kill is within 20 % of the p99 before the burst. (What is due
while the thousand are ahead in the queue waits for its turn like anybody; it is shown, not judged.) Exit status: 0, 1,
or 2 when it cannot be run here.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import harness
import networks
import openloop
from bodies import framed
from harness import BenchmarkError, Metrics, Server
from openloop import Body, Connection, Outcome

REQUESTS = 1000
QUEUED = 0.7  # of them in the queue when the client is killed
WIDTH, LAYERS, MAX_BATCH = 2048, 6, 4
NEIGHBOURS = 0.3  # of what the model can do
WARM_UP, BEFORE, AFTER = 1.0, 4.0, 4.0  # seconds of each round
MOVED = 0.20


def victim(address: str, path: Path) -> None:
    """Send all requests at once, say `sent`, and wait for the end."""
    connection = Connection(address)
    body = path.read_bytes()
    headers = openloop.header_block(address, None)
    for index in range(REQUESTS):
        connection.request(index, headers, body)
    said = False
    while True:
        connection.flush()
        connection.receive()
        if not connection.is_sending and not said:
            print("sent", flush=True)
            said = True
        time.sleep(0.001)


def a_round(
    server: Server, bodies: Sequence[Body], rate: float, seed: int
) -> tuple[dict[str, Any], list[NDArray[np.float64]]]:
    """One kill: its account, and the neighbours' latencies in seconds before, during and after."""
    before = server.scrape()
    results: list[Outcome | BenchmarkError] = []
    times = openloop.poisson(rate, WARM_UP + BEFORE + 2.0 + AFTER, seed)

    def neighbours() -> None:
        try:
            results.append(openloop.run(server.address, bodies, times, None, 5.0, connections=4))
        except BenchmarkError as error:
            results.append(error)

    thread = threading.Thread(target=neighbours)
    began = time.monotonic()
    thread.start()
    time.sleep(WARM_UP + BEFORE)
    burst = time.monotonic()
    account = _kill(server, bodies[0], before)
    thread.join()
    end = _settled(server)
    (outcome,) = results
    if isinstance(outcome, BenchmarkError):
        raise outcome
    mine = outcome.count(openloop.OK) + outcome.count(openloop.WRONG)
    ok = _grown(before, end, "forwardpass_requests_total", code="OK") - mine
    account |= {
        "neighbours": len(outcome.due),
        "neighbours_failed": len(outcome.due) - outcome.count(openloop.OK),
        "answered": ok,
        "cancelled": _grown(before, end, "forwardpass_refused_total", reason="cancelled"),
        "computed_in_vain": _grown(before, end, "forwardpass_rows_total") - mine - ok,
    }
    killed = account["killed_at"]
    parts = [outcome.between(*span) for span in ((began + WARM_UP, burst), (burst, killed), (killed, np.inf))]
    return account, [part.latencies() for part in parts]


def _kill(server: Server, body: Body, before: Metrics) -> dict[str, Any]:
    """Start the victim, kill it once its requests are queued, see when the server knows."""
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        path = Path(name) / "body"
        path.write_bytes(framed(body.message))
        command = [sys.executable, __file__, "--victim", server.address, str(path)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            if process.stdout.readline() != "sent\n":
                raise BenchmarkError("the client to be killed did not get its requests sent")
            deadline = time.monotonic() + 1.0
            while (queued := server.scrape().total("forwardpass_queue_requests")) < QUEUED * REQUESTS:
                if time.monotonic() > deadline:
                    raise BenchmarkError(f"only {queued:.0f} of {REQUESTS} requests were ever queued")
            process.kill()
            killed = time.monotonic()
        finally:
            process.kill()
            process.wait()
    while time.monotonic() < killed + 5.0:
        now = server.scrape()
        if _grown(before, now, "forwardpass_refused_total", reason="cancelled") >= queued / 2:
            break
    known = (time.monotonic() - killed) * 1e3
    return {"queued_when_killed": queued, "killed_at": killed, "known_within_ms": known}


def _settled(server: Server) -> Metrics:
    deadline = time.monotonic() + 10.0
    while (now := server.scrape()).total("forwardpass_in_flight_requests"):
        if time.monotonic() > deadline:
            raise BenchmarkError("requests were still in flight 10 s after the last was sent")
        time.sleep(0.05)
    return now


def _grown(before: Metrics, after: Metrics, name: str, **labels: str) -> float:
    return after.total(name, **labels) - before.total(name, **labels)


def verdicts(rounds: Sequence[dict[str, Any]], p99: dict[str, float]) -> list[tuple[str, bool]]:
    """What is asked, and whether it holds. `p99`: the neighbours', in milliseconds, before and after."""
    vain = [r["computed_in_vain"] for r in rounds]
    settled = [r["answered"] + r["cancelled"] for r in rounds]
    failed = sum(r["neighbours_failed"] for r in rounds)
    moved = p99["after"] / p99["before"] - 1
    return [
        (f"settled once, of {REQUESTS} in each round: {settled}", all(n == REQUESTS for n in settled)),
        (f"rows computed in vain: {vain} (at most one matrix, {MAX_BATCH} rows)", max(vain) <= MAX_BATCH),
        (f"neighbours' calls that failed or were wrong: {failed} (none)", not failed),
        (f"neighbours' p99 moved by {moved:+.1%} (at most {MOVED:.0%})", abs(moved) <= MOVED),
    ]


def _p99(parts: Sequence[NDArray[np.float64]]) -> float:
    return float(np.percentile(np.concatenate(parts), 99) * 1e3)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Kill a client that has a thousand requests queued.")
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--keep", action="store_true", help="record the result in benchmarks/results")
    parser.add_argument("--victim", nargs=2, metavar=("ADDRESS", "BODY"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.victim:
        victim(args.victim[0], Path(args.victim[1]))
    rounds: list[dict[str, Any]] = []
    latencies: dict[str, list[NDArray[np.float64]]] = {"before": [], "during": [], "after": []}
    try:
        cores = harness.pin()
        with tempfile.TemporaryDirectory(prefix="bench-") as name:
            folder = networks.repository(Path(name), "slow", WIDTH, LAYERS, f"max_batch_size = {MAX_BATCH}\n")
            bodies = networks.bodies(folder, "slow", 64)
            with harness.serve(folder, cores.server) as server:
                # Full batches one after another, as they are run on the server's core: what the model can do.
                times = openloop.poisson(400.0, 1.0)
                openloop.run(server.address, bodies, times, None, 10.0)
                fitted = _settled(server).by("forwardpass_run_seconds_fitted", "term")
                rate = NEIGHBOURS * MAX_BATCH / (fitted["a"] + MAX_BATCH * fitted["b"])
                for i in range(args.rounds):
                    account, parts = a_round(server, bodies, rate, seed=i)
                    rounds.append(account)
                    for key, part in zip(latencies, parts, strict=True):
                        latencies[key].append(part)
                    print(
                        f"round {i + 1}: {account['queued_when_killed']:.0f} queued when killed, known within "
                        f"{account['known_within_ms']:.0f} ms; {account['answered']:.0f} answered, "
                        f"{account['cancelled']:.0f} cancelled, {account['computed_in_vain']:.0f} computed in vain",
                        flush=True,
                    )
    except BenchmarkError as error:
        print(f"killed_client: {error}", file=sys.stderr)
        return 2
    p99 = {key: _p99(parts) for key, parts in latencies.items()}
    print(
        f"neighbours, {rate:,.0f} requests/s: p99 {p99['before']:.2f} ms before, {p99['during']:.0f} ms while the "
        f"thousand were queued, {p99['after']:.2f} ms from the kill on"
    )
    figures = {"neighbours_per_second": rate, "p99_ms": p99, "rounds": rounds}
    return harness.conclude("killed_client", cores, figures, verdicts(rounds, p99), args.keep)


if __name__ == "__main__":
    sys.exit(main())
