"""Whole servers on a device: answers over gRPC, what they say of themselves, and what they survive or do not."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from tests.service import models

from forwardpass import Client
from forwardpass.client import errors as call_errors
from forwardpass.errors import ForwardpassError
from forwardpass.execution.ort_session import OrtSession
from forwardpass.execution.providers import place
from forwardpass.model.contract import CONTRACT_FILE, MODEL_FILE, Contract, compare
from forwardpass.testing.server_process import ServerProcess

pytestmark = pytest.mark.gpu

TIB_ELEMENTS = 2**37  # of 8 bytes each


def counted(metrics: str, name: str, **labels: str) -> float:
    """The sum of the samples of `name` with these labels."""
    found = 0.0
    for line in metrics.splitlines():
        match = re.fullmatch(rf"{name}{{(.*)}} (\S+)", line)
        if match and all(f'{key}="{value}"' in match[1] for key, value in labels.items()):
            found += float(match[2])
    return found


@pytest.mark.parametrize("transport", ["auto", "grpcio"])
def test_digits_over_grpc_are_the_cpus_answers(digits_repository: Path, transport: str) -> None:
    folder = digits_repository / "digits" / "1"
    contract = Contract.load(folder / CONTRACT_FILE)
    x = np.random.default_rng(0).integers(0, 17, (2000, 64)).astype(np.float32)
    (expected,) = OrtSession(folder / MODEL_FILE, place("cpu", 1, "for a test")).run([x], (0,))
    wrong: list[str] = []
    with ServerProcess(digits_repository, "--provider", "cuda", "--transport", transport, patience=180.0) as server:

        def work(seed: int) -> None:
            rng = np.random.default_rng(seed)
            with Client(server.address) as client:
                for _ in range(100):
                    size = int(rng.integers(1, 41))
                    start = int(rng.integers(0, len(x) - size))
                    taken = slice(start, start + size)
                    got = client.infer("digits", {"x": x[taken]}, timeout=30.0)["logits"]
                    failure = compare({"y": got}, {"y": expected[taken].astype(float)}, contract.tolerance).failure
                    if failure is not None:
                        wrong.append(failure)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        metrics = server.metrics()
        said = "\n".join(server.lines)
        assert server.stop() == 0
    assert not wrong, wrong[:3]
    assert "CUDA graphs for batches of 1, 2, 4" in said
    assert counted(metrics, "forwardpass_gpu_batches_total", device="cuda:0", way="graph") > 0
    for stage in ("copy_in", "run", "copy_out"):
        assert counted(metrics, "forwardpass_gpu_stage_seconds_count", device="cuda:0", stage=stage) > 0
    assert counted(metrics, "forwardpass_model_info", provider="cuda:0") == 1


def test_the_device_is_in_the_metrics(digits_repository: Path) -> None:
    pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")
    with ServerProcess(digits_repository, "--provider", "cuda", patience=180.0) as server:
        metrics = server.metrics()
    total = counted(metrics, "forwardpass_gpu_memory_total_bytes", device="cuda:0")
    used = counted(metrics, "forwardpass_gpu_memory_used_bytes", device="cuda:0")
    assert 0 < used < total
    assert 'forwardpass_gpu_utilization_ratio{device="cuda:0"}' in metrics


def test_auto_takes_the_device_and_says_why(digits_repository: Path) -> None:
    with ServerProcess(digits_repository, "--provider", "auto", patience=180.0) as server:
        said = "\n".join(server.lines)
    assert "auto: cuda:0, because" in said


def test_a_device_that_is_not_there_is_an_error_at_the_start(digits_repository: Path, devices: int) -> None:
    with pytest.raises(ForwardpassError, match=f"there is no device {devices}"):
        ServerProcess(digits_repository, "--provider", f"cuda:{devices}", patience=180.0)


def test_a_batch_that_memory_is_too_short_for_is_refused_and_the_next_is_served(tmp_path: Path) -> None:
    models.save(tmp_path, "m", models.allocate())
    with (
        ServerProcess(tmp_path, "--provider", "cuda", patience=180.0) as server,
        Client(server.address, attempts=1) as client,
    ):
        for _ in range(3):
            with pytest.raises(call_errors.ResourceExhausted):
                client.infer("m", {"x": np.array([[TIB_ELEMENTS]], np.int64)}, timeout=60.0)
            answer = client.infer("m", {"x": np.array([[5], [7]], np.int64)}, timeout=60.0)["y"]
            np.testing.assert_array_equal(answer, [[5], [7]])
        assert server.returncode is None


def test_what_nothing_survives_ends_the_server_after_the_calls_were_told(digits_repository: Path) -> None:
    script = Path(__file__).with_name("spoilt_server.py")
    ports = [
        "--host",
        "127.0.0.1",
        "--grpc-port",
        "0",
        "--http-port",
        "-1",
        "--metrics-port",
        "-1",
        "--provider",
        "cuda",
    ]
    command = [sys.executable, str(script), str(digits_repository), *ports]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            assert process.stdout is not None
            lines: list[str] = []
            for line in process.stdout:
                lines.append(line.strip())
                if lines[-1] == "ready":
                    break
            assert lines[-1:] == ["ready"], lines
            (address,) = (line.split()[1] for line in lines if line.startswith("grpc "))
            x = np.zeros((1, 64), np.float32)
            with Client(address, attempts=1) as client:
                client.infer("digits", {"x": x}, timeout=30.0)
                process.send_signal(signal.SIGUSR1)
                with pytest.raises((call_errors.Internal, call_errors.Unavailable)):
                    while True:
                        client.infer("digits", {"x": x}, timeout=30.0)
            rest = process.stdout.read()
            assert process.wait(60.0) == 1, rest
            assert "so that it can be restarted" in rest
        finally:
            process.kill()


def test_one_queue_feeds_two_devices(digits_repository: Path, devices: int) -> None:
    if devices < 2:
        pytest.skip("there is one CUDA device here, and this needs two")
    x = np.random.default_rng(0).integers(0, 17, (512, 64)).astype(np.float32)
    with ServerProcess(digits_repository, "--provider", "cuda:0,1", patience=180.0) as server:

        def work() -> None:
            with Client(server.address) as client:
                for _ in range(200):
                    client.infer("digits", {"x": x}, timeout=30.0)

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        metrics = server.metrics()
    for device in ("cuda:0", "cuda:1"):
        assert counted(metrics, "forwardpass_gpu_batches_total", device=device) > 0
