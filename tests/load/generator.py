"""How many single-row requests a second the load generator makes from one core, before it is the limit itself.

    python tests/load/generator.py [--seconds 5] [--rates 10000,20000,...] [--clients]

The server is benchmarks/echo_direct.py (the direct transport, no model) on one core; the generator, one process,
on another. Each rate is an open loop with Poisson arrivals; a rate counts as sustained where all requests were
answered and the generator does not call itself saturated. With `--clients`, what grpcio's blocking and asyncio clients
manage against the same server in a closed loop, for comparison. Exit status 0 if 20,000 requests/s were sustained,
else 1.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np

from forwardpass import protocol
from forwardpass.loadtest import measurement, request_bodies
from forwardpass.loadtest.target import LoadClient, LoadTarget

ECHO = Path(__file__).parents[2] / "benchmarks" / "echo_direct.py"
WANTED = 20_000.0


def message() -> bytes:
    """One row of `digits`."""
    request = protocol.ModelInferRequest(model_name="digits")
    request.inputs.add(name="x", datatype="FP32", shape=[1, 64])
    request.raw_input_contents.append(np.random.default_rng(0).normal(8, 4, 64).astype("<f4").tobytes())
    return bytes(request.SerializeToString())


@contextlib.contextmanager
def echo(core: int) -> Iterator[str]:
    """Its address."""

    def pin() -> None:
        os.sched_setaffinity(0, {core})

    with subprocess.Popen([sys.executable, str(ECHO)], stdout=subprocess.PIPE, text=True, preexec_fn=pin) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().split()[1]
        finally:
            process.terminate()


def blocking(address: str, seconds: float, threads: int) -> float:
    """Calls a second of grpcio's blocking client."""
    done = [0] * threads
    end = time.monotonic() + seconds
    with grpc.insecure_channel(address) as channel:
        call = channel.unary_unary(request_bodies.PATH)
        body = message()

        def work(place: int) -> None:
            while time.monotonic() < end:
                call(body)
                done[place] += 1

        workers = [threading.Thread(target=work, args=(place,)) for place in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    return sum(done) / seconds


async def asynchronous(address: str, seconds: float, tasks: int) -> float:
    """Calls a second of grpcio's asyncio client."""
    done = 0
    end = time.monotonic() + seconds
    async with grpc.aio.insecure_channel(address) as channel:
        call: Any = channel.unary_unary(request_bodies.PATH)
        body = message()

        async def work() -> None:
            nonlocal done
            while time.monotonic() < end:
                await call(body)
                done += 1

        await asyncio.gather(*(work() for _ in range(tasks)))
    return done / seconds


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rates", default="10000,20000,30000,40000,50000,60000")
    parser.add_argument("--clients", action="store_true")
    args = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        print("generator: needs two cores, one for the server and one for itself", file=sys.stderr)
        return 2
    requests = request_bodies.Requests([message()], [1], [1.0], "one row")
    points = []
    with echo(cores[0]) as address:
        client = LoadClient(processes=1, core=cores[1], warm_up=0.5)
        target = LoadTarget(address, "digits", requests, client, name="echo", metrics_url="http://127.0.0.1:1/")
        for rate in map(float, args.rates.split(",")):
            points.append(target.at_rate(rate, args.seconds))
            print(measurement.line(points[-1]), file=sys.stderr)
        print(measurement.table(points))
        for point in points:
            for why in point.saturation:
                print(f"{point.offer.rate:,.0f}/s: {why}")
        if args.clients:
            os.sched_setaffinity(0, {cores[1]})
            print(f"grpcio, blocking, 16 threads: {blocking(address, args.seconds, 16):,.0f}/s")
            print(f"grpcio, asyncio, 64 tasks: {asyncio.run(asynchronous(address, args.seconds, 64)):,.0f}/s")
    good = [point.offer.rate for point in points if not point.saturation and not point.recording.failed]
    print(f"sustained from one core: {max(good, default=0):,.0f} requests/s")
    return 0 if max(good, default=0) >= WANTED else 1


if __name__ == "__main__":
    sys.exit(main())
