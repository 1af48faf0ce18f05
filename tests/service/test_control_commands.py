"""load, unload, reload, stats, config, log-level, and the client's methods for them, against real servers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from models import chain, save

from forwardpass import AsyncClient, Client
from forwardpass.cli.main import main
from forwardpass.client import FailedPrecondition, InvalidArgument, NotFound
from forwardpass.testing.server_process import ServerProcess

X = np.ones((3, 4), np.float32)
Said = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    repository = tmp_path_factory.mktemp("controlled")
    save(repository, "m", chain(), "max_batch_size = 7\n")
    (save(repository, "broken", chain()) / "model.onnx").write_bytes(b"")
    settings = tmp_path_factory.mktemp("settings") / "serve.toml"
    settings.write_text('model_control = "explicit"\nmetrics_port = 1\n')  # an option comes before it
    with ServerProcess(repository, "--config", str(settings)) as running:
        yield running


def command(server: ServerProcess, *arguments: str) -> int:
    return main([*arguments, "--server", server.address])


def test_a_model_comes_goes_and_is_accounted_for(server: ServerProcess, capsys: Said) -> None:
    assert command(server, "reload", "m") == 1
    assert "m is not served, so that there is nothing to load again: forwardpass load m" in capsys.readouterr().err
    assert command(server, "load", "m") == 0
    assert capsys.readouterr().out.startswith("m: version 1 serves, after ")
    with Client(server.address) as client:
        client.predict("m", X)
        (stats,) = client.statistics("m")
        assert (stats.requests, stats.failed, stats.rows, stats.batches, stats.mean_batch) == (1, 0, 3, 1, 3.0)
        assert stats.mean_total is not None and stats.mean_run is not None and 0 < stats.mean_run <= stats.mean_total
        assert "<td>m</td><td>1</td><td>1</td>" in client.statistics()._repr_html_()  # type: ignore[attr-defined]
        assert client.config("m")["max_batch_size"] == 7
    assert command(server, "stats", "m") == 0
    header, line = capsys.readouterr().out.splitlines()
    assert header.split()[:6] == ["NAME", "VERSION", "REQUESTS", "FAILED", "ROWS", "BATCHES"]
    assert line.split()[:7] == ["m", "1", "1", "0", "3", "1", "3.0"]
    assert command(server, "stats", "--json") == 0
    assert json.loads(capsys.readouterr().out)[0]["rows"] == 3
    assert command(server, "config", "m") == 0
    assert json.loads(capsys.readouterr().out)["name"] == "m"
    assert command(server, "reload", "m") == 0
    assert command(server, "unload", "m") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "m: not served any more"
    assert command(server, "models") == 0
    lines = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()}
    assert lines["m"][2] == "UNAVAILABLE" and lines["NAME"][-1] == "REASON"


def test_what_cannot_be_done_is_one_line(server: ServerProcess, capsys: Said) -> None:
    for arguments, text in (
        (["load", "broken"], "forwardpass load: FAILED_PRECONDITION: "),
        (["load", "nothing"], "forwardpass load: NOT_FOUND: "),
        (["unload", "nothing"], "forwardpass unload: NOT_FOUND: "),
        (["stats", "nothing"], "forwardpass stats: NOT_FOUND: "),
        (["config", "nothing"], "forwardpass config: NOT_FOUND: "),
    ):
        assert command(server, *arguments) == 1
        err = capsys.readouterr().err
        assert err.startswith(text) and len(err.splitlines()) == 1
    with Client(server.address) as client:
        with pytest.raises(FailedPrecondition, match=r"model\.onnx is empty"):
            client.load("broken")
        with pytest.raises(NotFound):
            client.unload("nothing")


def test_the_level_of_the_log(server: ServerProcess, capsys: Said) -> None:
    for level in ("debug", "warning", "error", "info"):
        assert command(server, "log-level", level) == 0
        assert command(server, "log-level") == 0
        assert capsys.readouterr().out.split() == [level, level]
    with Client(server.address) as client, pytest.raises(InvalidArgument, match="expected one of debug, info, warning"):
        client.log_level("loud")


def test_an_asyncio_client_has_the_same(server: ServerProcess) -> None:
    async def all_of_it() -> None:
        async with AsyncClient(server.address) as client:
            await client.load("m")
            assert (await client.config("m", version="1"))["name"] == "m"
            assert (await client.statistics("m"))[0].name == "m"
            assert await client.log_level() == "info"
            await client.unload("m")

    asyncio.run(all_of_it())


def test_a_server_without_control_says_what_to_do(tmp_path: Path, capsys: Said) -> None:
    save(tmp_path, "m", chain())
    with ServerProcess(tmp_path) as server:
        assert command(server, "load", "m") == 1
    err = capsys.readouterr().err
    assert "FAILED_PRECONDITION" in err and "--model-control explicit" in err
