"""The flight recorder of a real server: dumped by SIGUSR1, by a slow second and at a lost port, and it all adds up."""

from __future__ import annotations

import json
import random
import signal
import stat
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
from caller import Caller, Refused, request, until
from http_caller import HttpCaller
from raw_client import HELLO, RawClient
from test_lost_port import path_that_is_no_text

from forwardpass.testing.server_process import ServerProcess

Serve = Callable[..., ServerProcess]


def dumps(folder: Path) -> list[dict[str, Any]]:
    """Every dump that is complete, in the order in which they were written."""
    found = []
    for path in sorted(folder.glob("forwardpass-flight-*.json"), key=lambda p: int(p.stem.rpartition("-")[2])):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        found.append(json.loads(path.read_text("utf-8")))
        assert found[-1]["format"] == "forwardpass-flight"
    return found


def dumped(server: ServerProcess, folder: Path, number: int = 1) -> dict[str, Any]:
    """What SIGUSR1 has the server write."""
    server.send(signal.SIGUSR1)
    until(lambda: sum("flight recorder was written" in line for line in list(server.lines)) >= number, "a dump")
    return dumps(folder)[-1]


@pytest.mark.parametrize("transport", ["direct", "grpcio"])
def test_every_batch_and_request_adds_up(tmp_path: Path, serve: Serve, transport: str) -> None:
    repository, folder = tmp_path / "models", tmp_path / "flight"
    folder.mkdir()
    models.save(repository, "chain", models.chain(), "max_batch_size = 16\n")
    models.save(repository, "table", models.table(8), "max_batch_size = 16\nmax_queue_delay_us = 3000\n")
    server = serve(repository, "--transport", transport, "--flight-folder", str(folder))
    caller = Caller(server)
    rng = random.Random(7)
    sent: dict[str, tuple[str, int, str]] = {}  # by id: model, rows, the status that it must get
    messages = []
    for i in range(300):
        rows, name = rng.choice((1, 1, 2, 5, 40)), f"request {i}"
        if rng.random() < 0.5:
            sent[name] = "chain", rows, "OK"
            messages.append(request("chain", rng.random() * np.ones((rows, 4), np.float32), id=name))
        else:
            wrong = rng.random() < 0.1
            sent[name] = "table", rows, "INVALID_ARGUMENT" if wrong else "OK"
            messages.append(request("table", np.full((rows, 1), 99 if wrong else 3, np.int64), id=name))
    for start in range(0, len(messages), 50):
        for message, answer in zip(messages[start:], caller.all(messages[start : start + 50]), strict=False):
            assert (answer.code if isinstance(answer, Refused) else "OK") == sent[message.id][2]
    for _ in range(3):
        assert caller.refused(request("nobody", np.ones((1, 4), np.float32))).code == "NOT_FOUND"
    until(caller.idle)
    found = dumped(server, folder)

    with closing(HttpCaller(server.http_url)) as http:
        over_http = http.get("/v2/flight").json
    assert over_http["cause"] == "asked for"
    assert (over_http["batches"], over_http["refused"]) == (found["batches"], found["refused"])
    assert found["cause"] == "SIGUSR1" and found["kept"] == 4096 and found["pid"] == server.pid
    assert {m["model"]: m["max_batch_rows"] for m in found["models"]} == {"chain": 16, "table": 16}
    seen = Counter(r["id"] for batch in found["batches"] for r in batch["each"])
    assert seen == dict.fromkeys(sent, 1)
    turns = 0  # rows that chain ran of requests larger than a batch
    for batch in found["batches"]:
        each = batch["each"]
        assert batch["requests"] == len(each)
        rows = sum(r["rows"] for r in each)
        failed = [r for r in each if r.get("status", "OK") != "OK"]
        assert batch["answered"] == len(each) - len(failed)
        if not each or rows > 16:
            assert len(each) <= 1 and batch["closed"] in ("full", "alone")
            turns += sum(batch["matrices"]) if batch["model"] == "chain" else 0
        elif not failed:
            assert sum(batch["matrices"]) == rows
        assert batch["closed"] in ("alone", "idle", "full", "delay")
        assert batch["closed"] != "delay" or batch["model"] == "table"
        assert (
            max([r["arrival"] for r in each], default=0.0)
            <= batch["taken"]
            <= batch["ended"]
            <= batch["done"]
            <= found["at"]
        )
        for r in each:
            assert (batch["model"], r["rows"], r.get("status", "OK")) == sent[r["id"]]
            assert abs(r["arrival"] + found["unix_offset"] - folder.stat().st_mtime) < 600
    assert turns == sum(rows for model, rows, _ in sent.values() if model == "chain" and rows > 16)
    for model in ("chain", "table"):
        mine = [b for b in found["batches"] if b["model"] == model]
        assert sum(len(b["matrices"]) for b in mine) == caller.metric("forwardpass_batches_total", model=model)
        assert sum(b["answered"] for b in mine) == caller.metric("forwardpass_requests_total", model=model, code="OK")
    refused = Counter[tuple[str, str]]()
    for refusal in found["refused"]:
        refused[refusal["model"], refusal["reason"]] += refusal["requests"]
    assert refused["", "unknown_model"] == 3
    for (model, reason), times in refused.items():
        assert caller.metric("forwardpass_refused_total", model=model, reason=reason) == times
    caller.close()


@pytest.mark.slow
def test_the_last_are_kept_and_zero_keeps_none(tmp_path: Path, serve: Serve) -> None:
    models.save(tmp_path / "models", "chain", models.chain())
    (tmp_path / "flight").mkdir()
    server = serve(tmp_path / "models", "--flight-batches", "5", "--flight-folder", str(tmp_path / "flight"))
    caller = Caller(server)
    for i in range(20):
        caller.infer("chain", np.ones((1, 4), np.float32))
        until(lambda i=i: caller.metric("forwardpass_requests_total", code="OK") == i + 1)  # type: ignore[misc]
    found = dumped(server, tmp_path / "flight")
    assert len(found["batches"]) == 5 and all("id" not in b["each"][0] for b in found["batches"])
    caller.close()
    off = serve(tmp_path / "models", "--flight-batches", "0", "--flight-folder", str(tmp_path / "flight"))
    off.send(signal.SIGUSR1)
    until(lambda: "state: forwardpass_ready" in off.tail(), "the state")
    assert off.stop() == 0 and "flight recorder" not in off.tail() and len(dumps(tmp_path / "flight")) == 1


def test_one_that_is_turned_off_says_so(tmp_path: Path, serve: Serve) -> None:
    models.save(tmp_path, "chain", models.chain())
    server = serve(tmp_path, "--flight-batches", "0")
    with closing(HttpCaller(server.http_url)) as http:
        answer = http.get("/v2/flight")
    assert answer.status == 501 and "--flight-batches" in answer.error


def test_a_folder_that_cannot_be_written_is_said_and_costs_nothing_else(tmp_path: Path, serve: Serve) -> None:
    models.save(tmp_path / "models", "chain", models.chain())
    server = serve(tmp_path / "models", "--flight-folder", str(tmp_path / "nowhere"))
    server.send(signal.SIGUSR1)
    until(lambda: "the flight recorder could not be written (SIGUSR1): " in server.tail(), "the reason")
    caller = Caller(server)
    assert caller.infer("chain", np.ones((1, 4), np.float32))
    caller.close()


def test_a_slow_second_writes_it_once(tmp_path: Path, serve: Serve) -> None:
    models.save(tmp_path / "models", "hold", models.hold(), "instances = 1\n")
    (tmp_path / "flight").mkdir()
    server = serve(tmp_path / "models", "--flight-folder", str(tmp_path / "flight"), "--flight-when", "p50>5ms")
    caller = Caller(server)
    for _ in range(3):
        caller.infer("hold", np.full((1, 1), 200_000, np.float32))  # turns: tenths of a second
        until(lambda: "flight recorder was written" in server.tail(), "a dump")
    (found,) = dumps(tmp_path / "flight")
    assert found["cause"] == "p50>5ms: 1 of 1 requests of model hold version 1 took longer"
    assert [b["done"] - b["taken"] > 5e-3 for b in found["batches"]] == [True]
    caller.close()


def test_a_lost_port_writes_it_before_the_process_ends(tmp_path: Path, serve: Serve) -> None:
    models.save(tmp_path / "models", "chain", models.chain())
    (tmp_path / "flight").mkdir()
    server = serve(tmp_path / "models", "--transport", "grpcio", "--flight-folder", str(tmp_path / "flight"))
    caller = Caller(server)
    assert caller.infer("chain", np.ones((1, 4), np.float32))
    client = RawClient(server.address)
    client.send(HELLO, path_that_is_no_text(1))
    assert server.wait() == 1
    client.close()
    caller.close()
    (found,) = dumps(tmp_path / "flight")
    assert found["cause"].startswith("the gRPC port serves no more") and len(found["batches"]) == 1


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--flight-when", "p99 > 20ms"), "expected pQ>LIMIT"),
        (("--flight-when", "p99>20ms", "--flight-batches", "0"), "expected flight_batches above 0"),
    ],
)
def test_settings_are_read_strictly(tmp_path: Path, serve: Serve, options: tuple[str, ...], reason: str) -> None:
    with pytest.raises(Exception, match=reason):
        serve(tmp_path, *options)
