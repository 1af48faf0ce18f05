"""A real Prometheus scrapes a loaded server: every query of the dashboard returns data, and its figures are those of
the clients that made the load.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.deploy import toolbox
from tests.deploy.toolbox import CHART

from forwardpass.testing.server_process import ServerProcess

SECONDS = 24  # of load
RATE = 200  # requests a second
WINDOW = "15s"


class Prometheus:
    """Asks one Prometheus."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}/api/v1/query"

    def ask(self, query: str) -> list[dict[str, Any]]:
        with urllib.request.urlopen(f"{self._url}?{urllib.parse.urlencode({'query': query})}", timeout=10) as response:
            answer = json.load(response)
        assert answer["status"] == "success", answer
        found: list[dict[str, Any]] = answer["data"]["result"]
        return found

    def value(self, query: str) -> float:
        (series,) = self.ask(query)
        return float(series["value"][1])

    def ready(self) -> bool:
        try:
            return bool(self.ask("vector(1)"))
        except OSError:
            return False


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@pytest.fixture(scope="module")
def loaded(
    digits_repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Prometheus, dict[str, Any]]]:
    """Prometheus, right after a load, and what the load's clients measured."""
    (prometheus,) = toolbox.need("prometheus")
    folder = tmp_path_factory.mktemp("prometheus")
    with ServerProcess(digits_repository) as server:
        target = urllib.parse.urlsplit(server.metrics_url).netloc
        labels = {"namespace": "serving", "pod": "a"}
        config = {
            "global": {"scrape_interval": "1s"},
            "scrape_configs": [{"job_name": "f", "static_configs": [{"targets": [target], "labels": labels}]}],
        }
        (folder / "prometheus.yml").write_text(json.dumps(config))  # JSON is YAML
        port = free_port()
        options = [
            f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data",
            f"--web.listen-address=127.0.0.1:{port}", "--log.level=error",
        ]  # fmt: skip
        process = subprocess.Popen([prometheus, *options])
        try:
            asked = Prometheus(port)
            end = time.monotonic() + 60
            while not asked.ready():
                assert time.monotonic() < end and process.poll() is None
                time.sleep(0.1)
            command = [sys.executable, "-m", "forwardpass", "loadtest", server.address, "digits"]
            options = ["--rate", str(RATE), "--duration", str(SECONDS), "--metrics", server.metrics_url]
            done = subprocess.run(
                [*command, *options, "--json", folder / "load.json"], capture_output=True, text=True, timeout=300
            )
            # 3: this machine had other work, so that the clients' times are no use; they are not what is compared.
            assert done.returncode in (0, 3), done.stdout + done.stderr
            yield asked, json.loads((folder / "load.json").read_text())
        finally:
            process.terminate()
            process.wait(30)


def expressions() -> list[tuple[str, str]]:
    panels = json.loads((CHART / "files/dashboard.json").read_text())["panels"]
    return [(panel["title"], target["expr"]) for panel in panels for target in panel["targets"]]


@pytest.mark.slow
@pytest.mark.parametrize(("title", "query"), expressions(), ids=lambda text: text if "(" not in text else "")
def test_every_query_of_the_dashboard_returns_data(
    loaded: tuple[Prometheus, dict[str, Any]], title: str, query: str
) -> None:
    query = query.replace("$namespace", "serving").replace("$model", ".*").replace("$__rate_interval", WINDOW)
    assert "$" not in query
    found = loaded[0].ask(query)
    # Without a device, without a certificate, and without a refusal there are no such series.
    if "gpu" not in query and "certificate" not in query:
        assert found, title


@pytest.mark.slow
def test_its_rate_is_that_of_the_clients(loaded: tuple[Prometheus, dict[str, Any]]) -> None:
    prometheus, measured = loaded
    (measurement,) = measured["measurements"]
    seconds = 10
    # Of the seconds in which all of the load was on, by the clients' count of the same.
    rate = prometheus.value(f'sum(rate(forwardpass_requests_total{{model="digits",code="OK"}}[{seconds}s] offset 5s))')
    assert rate == pytest.approx(measurement["ok_per_second"], rel=0.15), (
        "Poisson arrivals of 200/s vary by 5 % in 10 s"
    )
    counted = prometheus.value('forwardpass_requests_total{model="digits",code="OK"}')
    assert counted >= measurement["requests"]
