"""Real images and containers for the tests: debootstrap, buildah, podman and runc, with a storage of their own.

Needs root on Debian 12 or its like; nothing is pulled from a registry of images, and containers use loopback only. What
was built is kept in STORE between runs, and built again when its sources change.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tests.deploy import toolbox

STORE = Path("/var/tmp/forwardpass-deploy")
BASE = "localhost/forwardpass-base:bookworm"
IMAGE = "localhost/forwardpass:0.1.0"
CUDA_IMAGE = "localhost/forwardpass:0.1.0-cuda"
WITH_MODELS = "localhost/forwardpass-digits:0.1.0"
PAUSE = "localhost/forwardpass-pause:1"
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
PACKAGES = "python3,python3-venv,ca-certificates"
NEEDLESS = (
    "var/lib/apt/lists",
    "var/cache/apt",
    "usr/share/doc",
    "usr/share/man",
    "usr/share/locale",
    "usr/share/i18n",
)

# What Kubernetes' restricted profile gives, as podman's options.
RESTRICTED = (
    *("--network", "host", "--read-only", "--cap-drop", "all", "--security-opt", "no-new-privileges"),
    *("--user", "65532:65532", "--ulimit", "nofile=20000:20000", "--ulimit", "nproc=1024:1024"),
    *("--tmpfs", "/tmp:size=64m,mode=1777"),
)
CONF = """\
[containers]
default_ulimits = ["nofile=20000:20000", "nproc=1024:1024"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
infra_image = "{pause}"
"""


def need() -> None:
    """Skip, or fail under `make test-deploy`, where images cannot be built and run."""
    toolbox.need("buildah", "podman", "runc", "debootstrap")
    if os.geteuid() != 0:
        pytest.skip("needs root, to build and run images")


def tool(name: str, *arguments: object, seconds: float = 600.0) -> str:
    """What buildah or podman said. Fails the test with its errors."""
    STORE.mkdir(parents=True, exist_ok=True)
    conf = STORE / "containers.conf"
    conf.write_text(CONF.format(pause=PAUSE))
    own = [name, "--root", STORE / "storage", "--runroot", STORE / "run", "--storage-driver", "overlay"]
    command = [str(part) for part in (*own, *arguments)]
    environ = os.environ | {"CONTAINERS_CONF": str(conf)}
    # A file, not a pipe: podman's monitor inherits it and outlives the command.
    with (STORE / "output").open("w+") as out:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, timeout=seconds, env=environ
        )
        out.seek(0)
        text = out.read()
    assert done.returncode == 0, f"{' '.join(command)} ended with {done.returncode}:\n{text[-4000:]}"
    return text.strip()


def podman(*arguments: object) -> str:
    return tool("podman", *arguments)


def build_base() -> None:
    """A Debian with Python and nothing else, as the base that stands for python:3.11-slim."""
    if _exists(BASE):
        return
    root = STORE / "root"
    shutil.rmtree(root, ignore_errors=True)
    root.parent.mkdir(parents=True, exist_ok=True)
    done = toolbox.run("debootstrap", "--variant=minbase", f"--include={PACKAGES}", "bookworm", root, seconds=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    for folder in NEEDLESS:
        shutil.rmtree(root / folder, ignore_errors=True)
        (root / folder).mkdir(parents=True)
    shutil.rmtree(root / "dev")
    (root / "dev").mkdir()
    _build(BASE, "FROM scratch\nCOPY root /\n", STORE)
    shutil.rmtree(root)


def build(dockerfile: str, tag: str) -> float:
    """Build one of deploy/images from the project as it is here; the seconds that took, 0 where nothing changed."""
    key = _sources(dockerfile)
    if _exists(tag) and _label(tag, "forwardpass.sources") == key:
        return 0.0
    build_base()
    began = time.monotonic()
    options: list[object] = ["--build-arg", f"BASE={BASE}", "--label", f"forwardpass.sources={key}"]
    # What makes pip work here makes it work in there: the authorities, and its own variables.
    pip = STORE / "pip.conf"
    lines = ["[global]", "disable-pip-version-check = true"]
    if CERTIFICATES.is_file():
        lines.append(f"cert = {CERTIFICATES}")
        options += ["-v", f"{CERTIFICATES.parent}:{CERTIFICATES.parent}:ro"]
    options_of_pip = {"index-url": "PIP_INDEX_URL", "proxy": "PIP_PROXY"}
    lines += [f"{name} = {os.environ[v]}" for name, v in options_of_pip.items() if os.environ.get(v)]
    STORE.mkdir(parents=True, exist_ok=True)
    pip.write_text("\n".join(lines) + "\n")
    file = toolbox.DEPLOY / "images" / dockerfile
    options += ["-v", f"{pip}:/etc/pip.conf:ro", "--ignorefile", f"{file}.dockerignore", "-f", file]
    build = ("buildah", "bud", "--isolation", "chroot", "--pull-never", "-q", *options, "-t", tag, toolbox.ROOT)
    tool(*build, seconds=3000.0)
    return time.monotonic() - began


def build_with_models(repository: Path) -> None:
    """The image with a repository in it, as the documentation has it: two lines on top of ours."""
    _build(WITH_MODELS, f"FROM {IMAGE}\nCOPY . /models\n", repository)


def build_pause() -> None:
    """What holds a pod together: something that sleeps."""
    _build(PAUSE, f'FROM {BASE}\nENTRYPOINT ["sleep", "infinity"]\n', STORE / "empty")


def _build(tag: str, dockerfile: str, context: Path) -> None:
    context.mkdir(parents=True, exist_ok=True)
    file = STORE / "Dockerfile"
    file.write_text(dockerfile)
    tool("buildah", "bud", "--isolation", "chroot", "--pull-never", "-q", "-f", file, "-t", tag, context)


def _exists(tag: str) -> bool:
    return tag in tool("buildah", "images", "--format", "{{.Name}}:{{.Tag}}").split()


def _label(tag: str, name: str) -> str:
    found = json.loads(podman("image", "inspect", tag))[0]
    return str((found.get("Labels") or {}).get(name, ""))


def _sources(dockerfile: str) -> str:
    """A digest of everything that goes into an image."""
    digest = hashlib.sha256()
    images = toolbox.DEPLOY / "images"
    files = [images / dockerfile, *images.glob("*.lock"), toolbox.ROOT / "pyproject.toml"]
    files += [p for p in (toolbox.ROOT / "server").rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    for file in sorted(files):
        digest.update(str(file).encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def running(image: str, name: str, *options: object, command: Sequence[str] = ()) -> Iterator[str]:
    """A container, for as long as this is entered; its name. It is ended and removed whatever happens."""
    full = f"forwardpass-test-{name}"
    with contextlib.suppress(AssertionError):
        podman("rm", "-f", "-t", "0", full)
    podman("run", "-d", "--name", full, *options, image, *command)
    try:
        yield full
    except BaseException as error:
        error.add_note(f"the container said:\n{podman('logs', full)[-4000:]}")
        raise
    finally:
        podman("rm", "-f", "-t", "0", full)


def pid(name: str) -> int:
    """Of a container's first process, as this machine counts."""
    return int(podman("inspect", name, "--format", "{{.State.Pid}}"))


def memory(process: int) -> tuple[int, int]:
    """Megabytes that a process has in memory now, and had at most."""
    status = Path(f"/proc/{process}/status").read_text()
    now, peak = (next(line for line in status.splitlines() if line.startswith(key)) for key in ("VmRSS", "VmHWM"))
    return int(now.split()[1]) // 1024, int(peak.split()[1]) // 1024


def wait_ready(address: str, seconds: float = 60.0) -> float:
    """Until health says SERVING; the seconds that took. Fails the test when it never does."""
    began = time.monotonic()
    # Every attempt anew: a channel that was refused once waits before it tries again.
    while time.monotonic() - began < seconds:
        with grpc.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
            check = health_pb2_grpc.HealthStub(channel).Check
            with contextlib.suppress(grpc.RpcError):
                if check(health_pb2.HealthCheckRequest(), timeout=2).status == 1:
                    return time.monotonic() - began
        time.sleep(0.02)
    raise AssertionError(f"{address} was not ready within {seconds:g} s")
