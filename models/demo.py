"""`python models/demo.py`: serve the trained `digits`, call it from concurrent clients, compare with PyTorch.

The server is a process of its own that never imports torch; this one runs the network in PyTorch on the same rows. The
exit status is 0 only if every answer lies within the tolerance of the model's contract and the server drains and ends
with 0 on SIGTERM.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from prometheus_client.parser import text_string_to_metric_families

from forwardpass.client import AsyncClient
from forwardpass.errors import ForwardpassError
from forwardpass.model.contract import CONTRACT_FILE, Contract, Difference, compare
from forwardpass.testing.server_process import ServerProcess

MODEL = "digits"
_WARM_UP = 5  # calls of each caller that are not counted


@dataclass(frozen=True)
class Reference:
    """The held-out rows and what PyTorch makes of them."""

    x: NDArray[np.float32]  # [N, 64]
    y: NDArray[np.int64]  # [N]
    logits: NDArray[np.float32]  # [N, 10]


@dataclass(frozen=True)
class Run:
    """What the clients saw. Call k sent row k % N."""

    version: str  # that answered
    output: str
    answers: NDArray[np.float32]  # [calls, 10]
    latencies: NDArray[np.float64]  # [calls], seconds
    seconds: float
    batch_rows: float  # mean rows in a matrix, by the server's own count


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(prog="python models/demo.py", description=__doc__.partition("\n")[0])
    parser.add_argument("--models", type=Path, default=Path("models"), help="the repository and recipes [%(default)s]")
    parser.add_argument("--clients", type=_count, default=64, help="calls in flight at a time [%(default)s]")
    parser.add_argument("--calls", type=_count, default=7200, help="calls in all, of one row each [%(default)s]")
    args = parser.parse_args(argv)
    try:
        return demonstrate(args.models, args.clients, args.calls)
    except ForwardpassError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def demonstrate(models: Path, clients: int, calls: int) -> int:
    """Serve `models`, make `calls` calls with `clients` of them in flight, print the table. The exit status."""
    _say(f"running {MODEL} in PyTorch")
    reference = _reference(models / MODEL)
    _say("starting the server")
    with ServerProcess(models) as server:
        for line in server.lines:
            _say(f"  {line}")
        try:
            run = asyncio.run(_drive(server, reference.x, clients, calls))
        except Exception as error:
            if server.returncode is None and not isinstance(error, ForwardpassError):
                raise
            raise ForwardpassError(f"{error}\nthe server's last lines:\n{server.tail()}") from None
        _say("stopping the server (SIGTERM)")
        status = server.stop()
        told = server.tail()
    contract = Contract.load(models / MODEL / run.version / CONTRACT_FILE)
    sent = np.arange(calls) % len(reference.x)
    expected = {run.output: reference.logits[sent].astype(np.float64)}
    difference = compare({run.output: run.answers}, expected, contract.tolerance)
    print(_table(run, reference.y[sent], difference, contract, clients))
    if difference.failure is not None:
        print(f"demo: answers differ from PyTorch's: {difference.failure}", file=sys.stderr)
    if status != 0:
        print(f"demo: the server ended with {status}; its last lines:\n{told}", file=sys.stderr)
    return int(difference.failure is not None or status != 0)


def _reference(recipe: Path) -> Reference:
    try:
        import torch
    except ImportError:
        raise ForwardpassError("PyTorch, to compare with, is not installed: pip install 'forwardpass[train]'") from None
    weights = recipe / "weights.pt"
    if not weights.is_file():
        raise ForwardpassError(f"{weights} is not there: train first, with python {recipe / 'train.py'}")
    x, y = _load(recipe / "data.py").held_out()
    network = _load(recipe / "network.py").Digits()
    network.load_state_dict(torch.load(weights, weights_only=True))
    network.eval()
    with torch.inference_mode():
        logits = network(torch.from_numpy(x)).numpy()
    return Reference(x, y, logits)


def _load(path: Path) -> ModuleType:
    """A recipe's file as a module. Raises ForwardpassError where it is missing."""
    if not path.is_file():
        raise ForwardpassError(f"{path} is not there: run this where models/ lies, or say --models")
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


async def _drive(server: ServerProcess, x: NDArray[np.float32], clients: int, calls: int) -> Run:
    """`clients` callers on one connection, each with one call in flight, until `calls` calls are answered."""
    async with AsyncClient(server.address) as client:
        info = await client.metadata(MODEL)
        answers = np.empty((calls, *info.outputs[0].shape[1:]), np.float32)
        latencies = np.empty(calls)
        progress = _Progress(calls)

        async def caller(numbers: Any) -> None:
            for number in numbers:
                sent = time.perf_counter()
                answers[number] = await client.predict(MODEL, x[number % len(x)])
                latencies[number] = time.perf_counter() - sent
                progress.step()

        async def warm_up(number: int) -> None:
            for _ in range(_WARM_UP):
                await client.predict(MODEL, x[number % len(x)])

        version = (await client.infer(MODEL, x[:1])).version
        await asyncio.gather(*map(warm_up, range(clients)))
        matrices, rows = _batches(await asyncio.to_thread(server.metrics))
        _say(f"{calls} calls of one row, {clients} at a time")
        numbers = iter(range(calls))  # shared: whoever is free takes the next
        began = time.perf_counter()
        await asyncio.gather(*(caller(numbers) for _ in range(clients)))
        seconds = time.perf_counter() - began
        after = _batches(await asyncio.to_thread(server.metrics))
    batch_rows = (after[1] - rows) / max(1.0, after[0] - matrices)
    return Run(version, info.outputs[0].name, answers, latencies, seconds, batch_rows)


def _batches(metrics: str) -> tuple[float, float]:
    """Matrices that were run so far, and rows in them, from what /metrics says."""
    found = {"forwardpass_batch_rows_count": 0.0, "forwardpass_batch_rows_sum": 0.0}
    for family in text_string_to_metric_families(metrics):
        for sample in family.samples:
            if sample.name in found and sample.labels.get("model") == MODEL:
                found[sample.name] += sample.value
    return found["forwardpass_batch_rows_count"], found["forwardpass_batch_rows_sum"]


def _table(run: Run, y: NDArray[np.int64], difference: Difference, contract: Contract, clients: int) -> str:
    p50, p95, p99 = np.quantile(run.latencies, (0.5, 0.95, 0.99)) * 1e3
    accuracy = (run.answers.argmax(1) == y).mean()
    verdict = "within" if difference.failure is None else "BEYOND"
    allowed = f"{contract.tolerance.atol:g} + {contract.tolerance.rtol:g} x |expected|"
    apart = f"{difference.largest:.2g}" if difference.largest else "0, equal bit for bit"
    rows = [
        ("accuracy on held-out rows", f"{accuracy:.2%}"),
        ("largest difference from PyTorch", f"{apart} ({verdict} the tolerance of {allowed})"),
        ("requests/s", f"{len(run.latencies) / run.seconds:,.0f}"),
        ("latency p50 / p95 / p99", f"{p50:.2f} / {p95:.2f} / {p99:.2f} ms"),
        ("mean rows per batch", f"{run.batch_rows:.1f}"),
        ("calls", f"{len(run.latencies):,}, one row each, {clients} in flight from one Python process"),
        ("model", f"{MODEL} version {run.version}"),
        ("machine", f"{platform.machine()}, Python {platform.python_version()}; client and server share it"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n" + "\n".join(f"  {name.ljust(width)}  {value}" for name, value in rows) + "\n"


class _Progress:
    """How many calls are answered, said about twice a second on a terminal, and after each quarter elsewhere."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._done = 0
        self._interactive = sys.stdout.isatty()
        self._said = time.monotonic()
        self._every = max(1, total // 4)

    def step(self) -> None:
        self._done += 1
        if not self._interactive:
            if self._done % self._every == 0:
                _say(f"  {self._done}/{self._total}")
        elif self._done == self._total or (self._done % 64 == 0 and time.monotonic() - self._said > 0.5):
            self._said = time.monotonic()
            print(f"\r  {self._done}/{self._total}", end="\n" if self._done == self._total else "", flush=True)


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {text}")
    return number


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
