"""Servers and CUDA: what one says that was told to use a device that is not there, and one whose device fails.

The device of the second kind is ordinary memory, in a server that is otherwise whole.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import models
import numpy as np
import pytest
from caller import Caller, Refused, until
from grpc_health.v1 import health_pb2, health_pb2_grpc
from test_lifecycle import Starting, refused_start, starting

from forwardpass.execution.cuda.detect import detect_cuda
from forwardpass.testing.server_process import ServerProcess

ROOT = Path(__file__).parents[2]
X = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
without_cuda = pytest.mark.skipif(
    detect_cuda().count > 0, reason="needs a machine without a CUDA device: tests/gpu is for the others"
)


@without_cuda
@pytest.mark.parametrize("provider", ["cuda", "cuda:1", "cuda:0,1"])
def test_a_server_told_to_use_cuda_does_not_start_without(tmp_path: Path, provider: str) -> None:
    models.save(tmp_path, "m", models.chain())
    said = refused_start(str(tmp_path), "--provider", provider)
    assert said == f"forwardpass serve: provider: {provider} cannot be had: {detect_cuda().missing}"


@without_cuda
def test_a_server_told_to_use_cuda_does_not_start_even_if_models_come_later(tmp_path: Path) -> None:
    said = refused_start(str(tmp_path), "--provider", "cuda", "--model-control", "explicit")
    assert "cuda cannot be had" in said


@without_cuda
def test_one_model_that_asks_for_cuda_does_not_keep_the_others_from_serving(tmp_path: Path) -> None:
    models.save(tmp_path, "asks", models.chain(), 'provider = "cuda"')
    models.save(tmp_path, "does_not", models.chain())
    with starting(tmp_path) as server:
        server.wait_for("^ready$")
        (asks,) = [line for line in server.seen if line.startswith("model asks ")]
        assert "NOT served: model.toml: provider: cuda cannot be had: " in asks
        (other,) = [line for line in server.seen if line.startswith("model does_not ")]
        assert "(auto: cpu, because " in other


@without_cuda
def test_nothing_but_a_model_that_asks_for_cuda_is_nothing_to_serve(tmp_path: Path) -> None:
    models.save(tmp_path, "m", models.chain(), 'provider = "cuda:7"')
    said = refused_start(str(tmp_path), "--grpc-port", "0", "--http-port", "-1", "--metrics-port", "-1")
    assert "model m version 1 cannot be served: model.toml: provider: cuda:7 cannot be had: " in said


# -- a device that is ordinary memory ---------------------------------------------------------------------------------


class OnDevice(Starting):
    """A server on such a device, ready. `does` says what its runs come to from now on."""

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        super().__init__(process)
        self.process = process
        self._folder = folder
        self.address = self.wait_for(r"^grpc (\S+)")[1]
        self.metrics_url = self.wait_for(r"^metrics (\S+)")[1]
        self.wait_for("^ready$")

    def does(self, what: str) -> None:
        (self._folder / what).touch()

    def metrics(self) -> str:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(self.metrics_url, timeout=30) as answer:
            text: str = answer.read().decode()
        return text


@pytest.fixture(params=["direct", "grpcio"])
def device(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[OnDevice]:
    """A server of `m`, a chain on two devices, and `plain`, of rows of any width, on one."""
    repository, folder = tmp_path / "models", tmp_path / "told"
    folder.mkdir()
    models.save(repository, "m", models.chain(), 'provider = "cuda:0,1"\nmax_batch_size = 8')
    models.save(repository, "plain", models.relu_any_width(), "max_batch_size = 8")
    command = [sys.executable, "-m", "tests.service.on_fake_device", str(folder), str(repository)]
    options = [
        "--grpc-port",
        "0",
        "--http-port",
        "0",
        "--metrics-port",
        "0",
        "--provider",
        "cuda",
        "--transport",
        request.param,
    ]
    process = subprocess.Popen(
        [*command, *options], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        yield OnDevice(process, folder)
    finally:
        process.kill()
        process.communicate()


def test_a_server_on_devices_says_how_it_runs_and_answers_as_the_cpu_does(device: OnDevice, tmp_path: Path) -> None:
    (said,) = [line for line in device.seen if line.startswith("model m ")]
    assert "; cuda:0,1, 2 instance(s) of 1 thread(s) (" in said
    assert "one instance on each device; CUDA graphs for batches of 1, 2, 4, 8 rows)" in said
    (said,) = [line for line in device.seen if line.startswith("model plain ")]
    assert "plain runs, without fixed buffers or CUDA graphs, because a row of input 'x' is of any size" in said
    caller = Caller(device)  # type: ignore[arg-type]  # all it needs is the addresses
    models.save(tmp_path / "cpu", "m", models.chain())
    with ServerProcess(tmp_path / "cpu", "--provider", "cpu") as other:
        cpu = Caller(other)
        for rows in (1, 2, 3, 5, 8, 13, 0):
            x = np.random.default_rng(rows).standard_normal((rows, 4)).astype(np.float32)
            (y,), (wanted,) = caller.infer("m", x), cpu.infer("m", x)
            assert y.shape == wanted.shape
            np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-6)
        cpu.close()
    assert caller.metric("forwardpass_gpu_batches_total", model="m", way="graph") == 7  # 13 rows are 8 and 5; 0 none
    assert caller.metric("forwardpass_gpu_batches_total", model="m", way="plain") == 0
    caller.close()
    device.process.terminate()
    assert device.process.wait(60) == 0


def test_a_run_that_finds_no_memory_is_refused_and_the_next_is_served(device: OnDevice) -> None:
    caller = Caller(device)  # type: ignore[arg-type]
    for model in ("m", "plain"):
        device.does("short")
        with pytest.raises(Refused) as caught:
            caller.infer(model, X)
        assert caught.value.code == "RESOURCE_EXHAUSTED" and "not enough memory" in caught.value.text
        assert caller.infer(model, X)[0].shape[0] == 5
    assert caller.health() == "SERVING"
    until(caller.idle)
    caller.close()


@pytest.mark.parametrize("model", ["m", "plain"])
def test_a_device_that_fails_for_good_ends_the_process(device: OnDevice, model: str) -> None:
    caller = Caller(device)  # type: ignore[arg-type]
    assert caller.infer(model, X)[0].shape[0] == 5
    watched = health_pb2_grpc.HealthStub(caller.channel).Watch(health_pb2.HealthCheckRequest(), timeout=60)
    assert next(watched).status == health_pb2.HealthCheckResponse.SERVING
    device.does("lost")
    with pytest.raises(Refused) as caught:
        caller.infer(model, X)
    assert caught.value.code == "INTERNAL"
    assert re.fullmatch(r"cuda:[01] is lost: an illegal memory access .*", caught.value.text)
    with contextlib.suppress(grpc.RpcError):
        assert next(watched).status == health_pb2.HealthCheckResponse.NOT_SERVING
    assert device.process.wait(60) == 1
    device.wait_for(r"^cuda:[01] is lost: an illegal memory access .*; the server exits, so that it can be restarted$")
    device.wait_for("^stopped$")
    (path,) = Path(os.environ["FORWARDPASS_FLIGHT_FOLDER"]).glob(f"*-{device.process.pid}-*.json")
    dump = json.loads(path.read_text("utf-8"))
    assert dump["cause"].startswith("cuda:") and " is lost: " in dump["cause"]
    assert [r.get("reason") for batch in dump["batches"] for r in batch["each"]] == [None, "device_lost"]
    caller.close()
