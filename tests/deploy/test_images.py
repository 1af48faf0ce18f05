"""The images: lint and locks; a real build; a real run, drained under load; the Deployment itself."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import threading
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tests.deploy import containers, toolbox
from tests.deploy.conftest import Figure

from forwardpass import Client

IMAGES = toolbox.DEPLOY / "images"
DOCKERFILES = ["Dockerfile.cpu", "Dockerfile.cuda"]
MIB = 1 << 20
CALLERS = 8
NOT_SERVING = 2


# -- cheap ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DOCKERFILES)
def test_hadolint_finds_nothing(name: str) -> None:
    (hadolint,) = toolbox.need("hadolint")
    done = toolbox.run(hadolint, IMAGES / name)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", DOCKERFILES)
def test_the_last_stage_is_as_it_must_be(name: str) -> None:
    text = (IMAGES / name).read_text(encoding="utf-8")
    last = text[text.rindex("\nFROM ") :]
    assert re.search(r"^USER [1-9]\d*:[1-9]\d*$", last, re.MULTILINE), "a numeric user, not root"
    assert re.search(r'^ENTRYPOINT \["/', last, re.MULTILINE), "exec form, so that the server is PID 1"
    assert "HEALTHCHECK" not in text and "RUN" not in last
    assert text.count("--require-hashes") == 2  # the tools' environment, and the one that is shipped


@pytest.mark.parametrize(("extra", "lock"), [("cpu", "requirements-cpu.lock"), ("gpu", "requirements-cuda.lock")])
def test_locks_have_what_the_project_asks_for_with_hashes(extra: str, lock: str) -> None:
    project = tomllib.loads((toolbox.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = {_name(r) for r in project["dependencies"] + project["optional-dependencies"][extra]}
    text = (IMAGES / lock).read_text(encoding="utf-8")
    blocks = re.split(r"\n(?=[a-z])", text)[1:]
    assert wanted <= {_name(block) for block in blocks}
    assert not {_name(block) for block in blocks} & {"torch", "pip", "setuptools", "wheel"}
    assert all("--hash=sha256:" in block and "==" in block for block in blocks)
    assert "://" not in text, "an index's address in a lock"


def _name(requirement: str) -> str:
    return re.split(r"[^A-Za-z0-9._-]", requirement)[0].lower()


# -- a real build -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def image(request: pytest.FixtureRequest) -> str:
    containers.need()
    request.config.stash[_BUILT] = containers.build("Dockerfile.cpu", containers.IMAGE)
    return containers.IMAGE


_BUILT = pytest.StashKey[float]()


@pytest.mark.slow
def test_the_image_is_small_and_has_only_what_serves(
    image: str, figure: Figure, request: pytest.FixtureRequest
) -> None:
    found = json.loads(containers.podman("image", "inspect", image))[0]
    figure("cpu image", f"{found['Size'] / 1e6:.0f} MB (bound: 350), built in {request.config.stash[_BUILT]:.0f} s")
    assert found["Size"] < 350e6
    assert found["Config"]["User"] == "65532:65532"
    assert found["Config"]["Entrypoint"] == ["/opt/forwardpass/bin/forwardpass"]
    found_there = "{d.name.lower(): d.version for d in m.distributions()}"
    listing = f"import importlib.metadata as m, json; print(json.dumps({found_there}))"
    python = "/opt/forwardpass/bin/python"
    look = ("run", "--rm", *containers.RESTRICTED, "--entrypoint", python, image, "-c")
    installed = json.loads(containers.podman(*look, listing))
    assert {"forwardpass", "onnxruntime", "ngh2"} <= installed.keys()
    assert not {"torch", "onnx", "pip", "setuptools"} & installed.keys()
    # The bill of materials inside says the same, version by version.
    bill = json.loads(containers.podman(*look, "print(open('/opt/forwardpass/sbom.json').read())"))
    assert bill["bomFormat"] == "CycloneDX"
    assert {c["name"].lower(): c["version"] for c in bill["components"]} == installed
    tools = "import shutil; print([t for t in ('gcc', 'cc', 'clang', 'make', 'pip', 'g++') if shutil.which(t)])"
    assert containers.podman(*look, tools) == "[]"


# -- a real run -------------------------------------------------------------------------------------------------------


@pytest.fixture
def ports() -> tuple[int, int]:
    """Two that were free a moment ago."""
    with socket.socket() as a, socket.socket() as b:
        for each in (a, b):
            each.bind(("127.0.0.1", 0))
        return a.getsockname()[1], b.getsockname()[1]


def _variables(ports: tuple[int, int], wait: int = 3) -> list[str]:
    given = {"HOST": "127.0.0.1", "GRPC_PORT": ports[0], "METRICS_PORT": ports[1], "DRAIN_WAIT": wait}
    return [word for name, value in given.items() for word in ("--env", f"FORWARDPASS_{name}={value}")]


@pytest.fixture
def readable(digits_repository: Path, tmp_path: Path) -> Path:
    """The repository, as any user may read it; a test's own folders are for its user alone."""
    to = tmp_path / "readable"
    shutil.copytree(digits_repository, to)
    for path in (to, *to.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return to


@pytest.mark.slow
def test_it_serves_under_restrictions_and_is_drained_without_a_failed_call(
    image: str, readable: Path, ports: tuple[int, int], figure: Figure
) -> None:
    """As uid 65532, on a read-only root, with no capabilities, one core and 256 MiB, under load until it is stopped."""
    address = f"127.0.0.1:{ports[0]}"
    mount = ("-v", f"{readable}:/models:ro", "--memory", "256m", "--cpus", "1")
    began = time.monotonic()
    with containers.running(image, "serve", *containers.RESTRICTED, *mount, *_variables(ports)) as name:
        containers.wait_ready(address)
        figure("start to ready, digits, one core", f"{time.monotonic() - began:.2f} s, podman's own start included")
        process = containers.pid(name)
        status = Path(f"/proc/{process}/status").read_text()
        assert re.search(r"^Uid:\s+65532\s+65532", status, re.MULTILINE)
        assert re.search(r"^CapEff:\s+0+$", status, re.MULTILINE) and re.search(
            r"^NoNewPrivs:\s+1$", status, re.MULTILINE
        )
        assert "[1 core" in _said(name) or "quota of 1 core" in _said(name)
        idle = containers.memory(process)[0]
        outcome = _load_until_told(address, stop=lambda: containers.podman("stop", "-t", "40", name))
        figure("memory, idle -> peak under load", f"{idle} -> {outcome.peak(process)} MB of 256")
        state = json.loads(containers.podman("inspect", name))[0]["State"]
        assert (state["ExitCode"], state["OOMKilled"]) == (0, False), _said(name)
        assert "stopped" in _said(name)
    assert not outcome.failures, outcome.failures[:3]
    assert outcome.after > 0, "no call was answered after the stop: the drain was not under load"
    figure(
        "podman stop under load",
        f"{outcome.calls} calls, {outcome.after} of them after SIGTERM, {len(outcome.failures)} failed, exit 0",
    )


def _said(name: str) -> str:
    return containers.podman("logs", name)


class Outcome:
    """What callers saw."""

    def __init__(self) -> None:
        self.calls = 0
        self.after = 0  # answered since the stop was asked for
        self.failures: list[str] = []
        self._peaks: list[int] = []

    def look(self, process: int) -> None:
        self._peaks.append(containers.memory(process)[1])

    def peak(self, _process: int) -> int:
        return max(self._peaks)


def _load_until_told(address: str, stop: Any) -> Outcome:
    """Triton's own client in several threads, until health says that the server is to be left; `stop` meanwhile."""
    outcome = Outcome()
    leave, stopping = threading.Event(), threading.Event()
    lock = threading.Lock()
    rows = np.random.default_rng(0).random((4, 64), np.float32)

    def call() -> None:
        client = triton.InferenceServerClient(address)
        given = triton.InferInput("x", list(rows.shape), "FP32")
        given.set_data_from_numpy(rows)
        while not leave.is_set():
            was_stopping = stopping.is_set()
            try:
                client.infer("digits", [given])
            except triton.InferenceServerException as error:
                with lock:
                    outcome.failures.append(str(error))
                return
            with lock:
                outcome.calls += 1
                outcome.after += was_stopping
        client.close()

    def watch() -> None:
        with grpc.insecure_channel(address) as channel:
            for response in health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest()):
                if response.status == NOT_SERVING:
                    # As a load balancer would: it hears of it, and sends nothing more a while later.
                    time.sleep(1.0)
                    leave.set()
                    return

    callers = [threading.Thread(target=call) for _ in range(CALLERS)]
    watcher = threading.Thread(target=watch)
    for thread in (*callers, watcher):
        thread.start()
    try:
        time.sleep(4.0)
        for process in _processes():
            outcome.look(process)
        stopping.set()
        stop()
    finally:
        leave.set()
        for thread in (*callers, watcher):
            thread.join(60)
    return outcome


def _processes() -> Iterator[int]:
    yield containers.pid("forwardpass-test-serve")


# -- the manifest itself ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_rendered_deployment_runs(
    image: str, readable: Path, ports: tuple[int, int], tmp_path: Path, figure: Figure
) -> None:
    """What the chart renders, played by podman: security context, volumes, variables, arguments. Probes are not."""
    containers.build_with_models(readable)
    containers.build_pause()
    name, _, tag = containers.WITH_MODELS.rpartition(":")
    values = {
        "replicas": 1,
        "image": {"repository": name, "tag": tag, "pullPolicy": "Never"},
        "ports": {"grpc": ports[0], "metrics": ports[1]},
        "drainSeconds": 6,
    }
    deployment = toolbox.render(values).one("Deployment")
    pod = deployment["spec"]["template"]["spec"]
    # There is no pod network here: the host's loopback instead, and so no ports to map.
    pod["hostNetwork"] = True
    del pod["containers"][0]["ports"]
    next(e for e in pod["containers"][0]["env"] if e["name"] == "FORWARDPASS_HOST")["value"] = "127.0.0.1"
    manifest = tmp_path / "deployment.yaml"
    manifest.write_text(json.dumps(deployment))
    containers.podman("kube", "play", "--replace", manifest)
    try:
        containers.wait_ready(f"127.0.0.1:{ports[0]}")
        container = f"{deployment['metadata']['name']}-pod-0-server"
        status = Path(f"/proc/{containers.pid(container)}/status").read_text()
        assert re.search(r"^Uid:\s+65532\s", status, re.MULTILINE)
        assert re.search(r"^CapEff:\s+0+$", status, re.MULTILINE)
        with Client(f"127.0.0.1:{ports[0]}") as client:
            assert client.predict("digits", np.zeros((3, 64), np.float32)).shape == (3, 10)
        containers.podman("stop", "-t", pod["terminationGracePeriodSeconds"], container)
        assert json.loads(containers.podman("inspect", container))[0]["State"]["ExitCode"] == 0
        assert "accepting calls for another 2 s" in _said(container)
    finally:
        containers.podman("kube", "down", manifest)
    figure("podman kube play of the Deployment", "served digits as uid 65532, drained, exit 0")


# -- the CUDA image: gigabytes, so on request -------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(
    not os.environ.get("FORWARDPASS_TEST_CUDA_IMAGE"),
    reason="downloads some gigabytes; FORWARDPASS_TEST_CUDA_IMAGE=1 builds it",
)
def test_the_cuda_image_is_built_and_serves_where_there_is_no_device(
    readable: Path, ports: tuple[int, int], figure: Figure
) -> None:
    """On the processor, saying why; told to use CUDA, it ends and says what is missing."""
    containers.need()
    seconds = containers.build("Dockerfile.cuda", containers.CUDA_IMAGE)
    found = json.loads(containers.podman("image", "inspect", containers.CUDA_IMAGE))[0]
    figure("cuda image", f"{found['Size'] / 1e9:.1f} GB, built in {seconds:.0f} s")
    assert found["Config"]["User"] == "65532:65532"
    mount = ("-v", f"{readable}:/models:ro")
    variables = _variables(ports, 0)
    image = containers.CUDA_IMAGE
    with containers.running(image, "cuda", *containers.RESTRICTED, *mount, *variables) as name:
        containers.wait_ready(f"127.0.0.1:{ports[0]}")
        with Client(f"127.0.0.1:{ports[0]}") as client:
            assert client.predict("digits", np.zeros((1, 64), np.float32)).shape == (1, 10)
        assert "auto: cpu, because" in _said(name)
    told = (*variables, "--env", "FORWARDPASS_PROVIDER=cuda")
    with containers.running(image, "cuda-told", *containers.RESTRICTED, *mount, *told) as name:
        assert int(containers.podman("wait", name)) != 0
        assert "cuda cannot be had" in _said(name) and "Traceback" not in _said(name)
