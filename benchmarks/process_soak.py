"""A server of two processes under load for minutes, while models are reloaded, processes renewed, and processes killed.

    python benchmarks/process_soak.py [--minutes 10] [--kill-seconds 20] [--reloads 100] [--renewals 20] [--keep]

Four clients of our own library call all the time, with requests of three rows. The model is one of two networks by
turns: a reload (RepositoryModelLoad) brings the other one. An answer must be that of ONNX Runtime for one of the two,
to the bit, for all of its rows: a mixture is wrong. First the reloads, then the renewals (SIGHUP), then for `minutes` a
process is killed (SIGKILL) every `kill-seconds`; the server's memory and descriptors are looked at before each kill.

Verdict: no call failed, with the library's retries; none was wrong; every killed process was replaced within a second
(median); memory of all processes grows by less than 5 % from the first minute on, the supervisor's descriptors not at
all. Exit status: 0 when that holds; 1 otherwise.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import onnxruntime

import harness
import mlp_file
from forwardpass import Client, protocol
from forwardpass.errors import ForwardpassError
from forwardpass.testing.server_process import ServerProcess

NAME, WIDTHS, ROWS, CLIENTS = "m", (64, 128, 10), 3, 4
GROWTH, REPLACED = 1.05, 1.0  # seconds
SETTLED = 60.0  # seconds, after which nothing may grow

Figures = dict[str, Any]


class Callers:
    """Clients that call until `end`, and what they found."""

    def __init__(self, address: str, right: set[bytes], rows: np.ndarray[Any, Any]) -> None:
        self.found: Counter[str] = Counter()
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._call, args=(address, right, rows)) for _ in range(CLIENTS)]
        for thread in self._threads:
            thread.start()

    def _call(self, address: str, right: set[bytes], rows: np.ndarray[Any, Any]) -> None:
        with Client(address) as client:
            while not self._over.is_set():
                try:
                    answer = client.infer(NAME, {"x": rows}, timeout=30.0)
                    self.found["right" if next(iter(answer.values())).tobytes() in right else "WRONG"] += 1
                except ForwardpassError as error:
                    self.found[f"failed: {error}"[:120]] += 1

    def end(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()


def pss(pid: int) -> int:
    """Bytes of memory, of what several processes map its share."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(re.search(r"^Pss:\s+(\d+)", text, re.MULTILINE)[1]) * 1024  # type: ignore[index]


def serving(server: ServerProcess) -> list[int]:
    """The processes that serve; the one that waits takes no part."""
    return [pid for pid in harness.children(server.pid) if harness.footprint(pid).threads > 4]


def said(server: ServerProcess, words: str) -> int:
    return sum(words in line for line in list(server.lines))


def until(server: ServerProcess, words: str, times: int) -> None:
    end = time.monotonic() + 60.0
    while said(server, words) < times:
        if time.monotonic() > end:
            raise harness.BenchmarkError(f"{words!r} did not come {times} times:\n{server.tail()}")
        time.sleep(0.01)


def soak(folder: Path, chosen: argparse.Namespace) -> Figures:
    networks, repository = [folder / f"{seed}.onnx" for seed in (1, 2)], folder / "models"
    rows = np.random.default_rng(0).normal(0, 1, (ROWS, WIDTHS[0])).astype(np.float32)
    right = set()
    for seed, path in enumerate(networks, 1):
        mlp_file.write(path, mlp_file.layers(WIDTHS, seed))
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        one = [session.run(None, {"x": row[None]})[0] for row in rows]
        right.add(np.concatenate(one).tobytes())
    place = repository / NAME / "1" / "model.onnx"
    place.parent.mkdir(parents=True)
    shutil.copy(networks[0], place)
    options = ["--processes", "2", "--model-control", "explicit", "--load-model", "*"]
    figures: Figures = {}
    with ServerProcess(repository, *options) as server:
        callers = Callers(server.address, right, rows)
        try:
            time.sleep(2.0)
            for number in range(chosen.reloads):
                shutil.copy(networks[(number + 1) % 2], place.with_suffix(".new"))
                place.with_suffix(".new").replace(place)
                load(server)
            figures["after_reloads"] = dict(callers.found)
            for number in range(chosen.renewals):
                server.send(signal.SIGHUP)
                until(server, ": replaced", 2 * (number + 1))
            figures["after_renewals"] = dict(callers.found)
            time.sleep(5.0)  # the last of the old processes have left by then
            figures["looks"] = looks = []
            began = time.monotonic()
            kills = 0
            while (passed := time.monotonic() - began) < chosen.minutes * 60.0:
                pids = [server.pid, *harness.children(server.pid)]
                found = harness.footprint(server.pid)
                look = {"at": passed, "bytes": sum(map(pss, pids)), "supervisor_bytes": pss(server.pid),
                        "descriptors": found.descriptors, "threads": found.threads, "processes": len(pids)}  # fmt: skip
                looks.append(look)
                print(
                    f"{passed:5.0f} s: {look['bytes'] / 1e6:.0f} MB, supervisor {look['supervisor_bytes'] / 1e6:.0f}; "
                    f"it has {found.descriptors} descriptors; {dict(callers.found)}",
                    flush=True,
                )
                os.kill(random.choice(serving(server)), signal.SIGKILL)
                kills += 1
                until(server, "replaced in ", kills)
                time.sleep(chosen.kill_seconds)
        finally:
            callers.end()
        matches = [re.search(r"replaced in ([\d.]+) s", line) for line in server.lines]
        times = [float(match[1]) for match in matches if match is not None]
        return figures | {"calls": dict(callers.found), "kills": kills, "replaced_seconds": times}


def load(server: ServerProcess) -> None:
    """RepositoryModelLoad."""
    what = protocol.METHODS["RepositoryModelLoad"]
    with grpc.insecure_channel(server.address) as channel:
        channel.unary_unary(what.path)(what.request(model_name=NAME).SerializeToString(), timeout=60.0)


def verdicts(figures: Figures) -> list[tuple[str, bool]]:
    calls, looks, times = figures["calls"], figures["looks"], figures["replaced_seconds"]
    failed = {what: count for what, count in calls.items() if what.startswith("failed")}
    settled = [look for look in looks if look["at"] >= SETTLED] or looks[-1:]
    growth = max(look["bytes"] for look in settled) / settled[0]["bytes"]
    descriptors = max(look["descriptors"] for look in settled) - settled[0]["descriptors"]
    median, longest = (statistics.median(times), max(times)) if times else (0.0, 0.0)
    return [
        (f"{calls.get('right', 0):,} answers right, {calls.get('WRONG', 0)} wrong", not calls.get("WRONG")),
        (f"{sum(failed.values())} calls failed with the library's retries {failed or ''}".strip(), not failed),
        (f"{figures['kills']} processes killed; replaced in {median:.2f} s (median), {longest:.2f} at most",
         median < REPLACED),
        (f"memory grows by {growth - 1:.1%} at most after a minute (under 5 %)", growth < GROWTH),
        (f"the supervisor has {descriptors:+d} descriptors more than after a minute", descriptors <= 0),
    ]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--kill-seconds", type=float, default=20.0)
    parser.add_argument("--reloads", type=int, default=100)
    parser.add_argument("--renewals", type=int, default=20)
    parser.add_argument("--keep", action="store_true", help="write the figures to benchmarks/results")
    chosen = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix="process-soak-") as name:
        figures = soak(Path(name), chosen)
    return harness.conclude("process_soak", harness.Cores(cores[0], cores[-1]), figures, verdicts(figures), chosen.keep)


if __name__ == "__main__":
    sys.exit(main())
