"""Answers of batches that are mixed on purpose: rows that provoke, requests of them, and what each must be answered.

What a row must be answered is what ONNX Runtime says of it alone. A request's answer is parsed once and known again by
its bytes, so that tens of thousands take seconds.
"""

from __future__ import annotations

import contextlib
import select
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tests.service.caller import outputs, request

from forwardpass import protocol
from forwardpass.errors import Status
from forwardpass.execution.onnx_runtime import ort
from forwardpass.model.contract import CONTRACT_FILE, MODEL_FILE, Contract, Tolerance
from forwardpass.transport.http2.client_connection import ClientConnection, framed, request_fields

INFER = protocol.METHODS["ModelInfer"].path
DRAWN = 20  # rows like those that the network was exported with, beside the provoking ones
REQUESTS = 300  # different ones of a network
ROWS_OF_A_REQUEST = (1, 1, 1, 2, 3)
CONNECTIONS, IN_FLIGHT = 4, 32  # of each connection

Row = list[NDArray[Any]]  # [1, ...] of every input


@dataclass
class Found:
    """What came of one network's load."""

    answers: int = 0
    refused: int = 0  # requests with a row that the network refuses, refused as INVALID_ARGUMENT
    largest: float = 0.0  # difference from the row alone, as a share of what is allowed
    tipped: int = 0  # answers whose whole numbers rounding tipped over
    wrong: list[str] = field(default_factory=list)


class MixedLoad:
    """One network's rows and requests, and their right answers."""

    def __init__(self, name: str, folder: Path, exact: bool) -> None:
        """`folder`: of the version. `exact`: the server claims the same bits in every batch."""
        contract = Contract.load(folder / CONTRACT_FILE)
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 4
        self._session = ort.InferenceSession(str(folder / MODEL_FILE), options, providers=["CPUExecutionProvider"])
        self._inputs = [value.name for value in self._session.get_inputs()]
        self._tolerance, self._exact = contract.tolerance, exact
        samples = contract.input_arrays()
        rng = np.random.default_rng(len(name))
        rows = provoking_rows([samples[value] for value in self._inputs], rng)
        self._right = [self._alone(row) for row in rows]
        self._chosen = [rng.integers(0, len(rows), rng.choice(ROWS_OF_A_REQUEST)) for _ in range(REQUESTS)]
        self.bodies = [
            framed(
                request(
                    name, *(np.concatenate(parts) for parts in zip(*(rows[i] for i in chosen), strict=True)),
                    names=self._inputs,
                ).SerializeToString()
            )
            for chosen in self._chosen
        ]  # fmt: skip
        self._known: dict[tuple[int, bytes], tuple[float, bool, str]] = {}

    def _alone(self, row: Row) -> list[NDArray[Any]] | None:
        try:
            return [np.asarray(found) for found in self._session.run(None, dict(zip(self._inputs, row, strict=True)))]
        except Exception:
            return None

    def judge(self, place: int, status: int, text: str, answer: bytes, found: Found) -> None:
        """Count what came for the request at `place`."""
        found.answers += 1
        right = [self._right[i] for i in self._chosen[place]]
        if any(row is None for row in right):
            if status == Status.INVALID_ARGUMENT:
                found.refused += 1
            else:
                found.wrong.append(f"request {place}: expected a refusal, got {status} {text}")
            return
        if status != Status.OK:
            found.wrong.append(f"request {place}: {Status(status).name} {text}")
            return
        key = (place, answer)
        if key not in self._known:
            self._known[key] = self._compare(outputs(answer[5:]), right)
        share, tipped, wrong = self._known[key]
        found.largest = max(found.largest, share)
        found.tipped += tipped
        if wrong:
            found.wrong.append(f"request {place}: {wrong}")

    def _compare(self, got: Sequence[NDArray[Any]], right: Sequence[Any]) -> tuple[float, bool, str]:
        largest, tipped = 0.0, False
        for i, row in enumerate(right):
            for k, want in enumerate(row):
                have = got[k][i : i + 1]
                if have.dtype != want.dtype or have.shape != want.shape:
                    return largest, tipped, f"{have.dtype}{have.shape}, expected {want.dtype}{want.shape}"
                if same_bits(have, want):
                    continue
                if self._exact:
                    return largest, tipped, f"other bits, though exact: {have.ravel()[:4]}, alone {want.ravel()[:4]}"
                if want.dtype.kind != "f":
                    tipped = True
                    continue
                largest = max(largest, share := difference(have, want, self._tolerance))
                if share > 1:
                    return largest, tipped, f"{share:.3g} times what is allowed: {have.ravel()[:4]}, {want.ravel()[:4]}"
        return largest, tipped, ""


def same_bits(got: NDArray[Any], want: NDArray[Any]) -> bool:
    """Whether all bits are the same; of a NaN, that it is one: its sign and payload are the processor's business."""
    if want.dtype.kind != "f":
        return got.tobytes() == want.tobytes()
    return bool(((got == want) & (np.signbit(got) == np.signbit(want)) | (np.isnan(got) & np.isnan(want))).all())


def difference(got: NDArray[Any], want: NDArray[Any], tolerance: Tolerance) -> float:
    """The largest difference as a share of the allowed one; inf where only one of two is NaN or infinite."""
    same = (got == want) | (np.isnan(got) & np.isnan(want))
    finite = np.isfinite(got) & np.isfinite(want)
    if not (same | finite).all():
        return float("inf")
    with np.errstate(invalid="ignore"):
        apart = np.abs(got.astype(np.float64) - want)
    allowed = tolerance.atol + tolerance.rtol * np.abs(want.astype(np.float64))
    return float(np.max(apart / allowed, where=finite & ~same, initial=0.0))


def provoking_rows(samples: Sequence[NDArray[Any]], rng: np.random.Generator) -> list[Row]:
    """Rows like the samples and rows made to disturb their neighbours: see `_values`. Inputs are provoked together."""
    columns = [_values(sample, rng) for sample in samples]
    return [list(row) for row in zip(*columns, strict=True)]


def _values(sample: NDArray[Any], rng: np.random.Generator) -> list[NDArray[Any]]:
    """Values [1, ...] of one input: samples, others like them, copies, extremes, NaN, invalid ones."""
    shape, dtype = (1, *sample.shape[1:]), sample.dtype
    own = [sample[i : i + 1] for i in range(min(4, len(sample)))]
    if dtype.kind == "f":
        drawn = [rng.standard_normal(shape) for _ in range(DRAWN)]
        spot = np.zeros(shape)
        spot.ravel()[-1] = 1.0
        special = [
            np.zeros(shape), np.ones(shape), -np.ones(shape), np.full(shape, 1e-40), 100 * rng.standard_normal(shape),
            np.full(shape, 1e4), np.full(shape, -1e4), np.full(shape, np.nan), np.full(shape, np.inf),
            np.where(spot > 0, np.nan, 0.5), np.where(spot > 0, -np.inf, 0.5), spot,
        ]  # fmt: skip
    else:
        most = int(sample.max())
        drawn = [rng.integers(0, most + 1, shape) for _ in range(DRAWN)]
        zero = np.zeros(shape, dtype)
        special = [zero, zero + 1, zero, zero + most, zero + most, zero + 1, zero, zero + most, zero, zero, zero,
                   zero + 1_000_000]  # fmt: skip
    made = [np.asarray(value).astype(dtype) for value in (*drawn, *special)]
    return [*own, *own[:2], *own[:1], *made]


def send(address: str, load: MixedLoad, count: int, seed: int) -> Found:
    """Send `count` requests in random order over a few connections, many in flight on each, and judge the answers."""
    host, _, port = address.rpartition(":")
    order = iter(np.random.default_rng(seed).integers(0, len(load.bodies), count).tolist())
    fields = request_fields(INFER, address)
    found = Found()
    with contextlib.ExitStack() as stack:
        clients = []
        for _ in range(CONNECTIONS):
            client = ClientConnection(host, int(port), keep_answers=True)
            stack.callback(client.close)
            clients.append(client)
        left = count
        while left:
            for client in clients:
                for place in _next(order, IN_FLIGHT - client.in_flight):
                    client.start(place, fields, load.bodies[place])
                if client.wants_to_write:
                    client.flush()
            readable, _, _ = select.select([client.socket for client in clients], [], [], 60.0)
            assert readable, f"no answer for a minute; {left} of {count} are missing"
            for client in clients:
                if client.socket in readable:
                    for ended in client.receive():
                        left -= 1
                        load.judge(ended.token, ended.status, ended.text, ended.answer, found)
    return found


def _next(order: Iterator[int], room: int) -> Iterator[int]:
    for _ in range(room):
        place = next(order, None)
        if place is None:
            return
        yield place


def batch_sizes(statistics: Any) -> Counter[int]:
    """Runs by their rows, of a ModelStatistics."""
    return Counter({entry.batch_size: entry.compute_infer.count for entry in statistics.batch_stats})
