"""What every benchmark here needs: cores to pin to, servers to start and stop, their CPU time and their metrics.

Linux only (/proc, sched_setaffinity). Loopback only. A server runs on one core, everything that loads it on another.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

# Before ONNX Runtime is imported, here or in what is started from here.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
MODELS = ROOT / "models"
RESULTS = HERE / "results"  # what is kept
OUT = HERE / "out"  # what is not

METHOD = "/inference.GRPCInferenceService/ModelInfer"
START_SECONDS = 60.0  # a server that is not ready by then never will be
PACKAGES = ("forwardpass", "grpcio", "numpy", "onnxruntime", "protobuf", "ngh2", "pygrpc-native")

TICK = 1.0 / os.sysconf("SC_CLK_TCK")  # seconds, the unit of /proc/PID/stat


class BenchmarkError(Exception):
    """A benchmark cannot be run here; the text says what is missing and what to do."""


@dataclass(frozen=True, slots=True)
class Cores:
    """Where the server runs and where its load does."""

    server: int
    load: int

    @property
    def apart(self) -> bool:
        return self.server != self.load


def pin(allow_shared: bool = False) -> Cores:
    """Choose two cores and move this process, and so what it starts, to the second.

    Raises BenchmarkError where there is one core only, unless `allow_shared`: what server and load take from each other
    cannot be told apart then.
    """
    if not hasattr(os, "sched_setaffinity"):
        raise BenchmarkError("these benchmarks pin processes to cores, which needs Linux")
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2 and not allow_shared:
        raise BenchmarkError(
            f"this process may use one core only ({cores[0]}): server and load would take it from each other, and no "
            "figure would mean anything. Run it where there are two, or add --shared-core to try it out"
        )
    chosen = Cores(cores[0], cores[1] if len(cores) > 1 else cores[0])
    os.sched_setaffinity(0, {chosen.load})
    return chosen


Verdicts = Sequence[tuple[str, bool]]  # what is asked, with what was found; whether it holds


def conclude(name: str, cores: Cores, figures: Mapping[str, Any], verdicts: Verdicts, keep: bool) -> int:
    """Write the figures of a check to NAME.json, print its verdicts; the exit status: 0 where all hold, else 1.

    With `keep` they go to benchmarks/results, from where report.py takes them into the document.
    """
    path = (RESULTS if keep else OUT) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    said = [{"what": what, "holds": holds} for what, holds in verdicts]
    result = {"date": today(), "machine": machine(cores), "verdicts": said, **figures}
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print(f"\nevery figure is in {path}")
    for what, holds in verdicts:
        print(f"{'ok  ' if holds else 'FAIL'} {what}")
    return 0 if all(holds for _, holds in verdicts) else 1


def today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()


# -- servers ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Server:
    """A server that was started here and is ready."""

    pid: int
    address: str  # host:port
    metrics: str  # URL; empty where there are none
    http: str = ""  # URL of the HTTP port; empty where there is none

    def cpu_seconds(self) -> float:
        """User and system time of all its threads and processes so far, in seconds, to within a clock tick each."""
        return sum(map(cpu_seconds, (self.pid, *children(self.pid))))

    def scrape(self) -> Metrics:
        return scrape(self.metrics)


@contextlib.contextmanager
def serve(
    repository: Path, core: int | Collection[int], *options: str, patience: float = START_SECONDS
) -> Iterator[Server]:
    """`forwardpass serve` on one core, or several, ready; stopped by SIGTERM at the end."""
    command = [sys.executable, "-m", "forwardpass", "serve", str(repository), "--host", "127.0.0.1"]
    command += ["--grpc-port", "0", "--http-port", "0", "--metrics-port", "0", "--log-level", "warning", *options]
    with start(command, core, patience) as server:
        yield server


@contextlib.contextmanager
def start(command: Sequence[str], core: int | Collection[int], patience: float = START_SECONDS) -> Iterator[Server]:
    """A server that prints `grpc HOST:PORT`, maybe `metrics URL`, and `ready`. Raises BenchmarkError if it doesn't.

    `patience`: seconds until then.
    """
    cores = {core} if isinstance(core, int) else set(core)
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )
        try:
            yield _until_ready(process, errors, patience)
        finally:
            end(process)


def _until_ready(process: subprocess.Popen[str], errors: Any, patience: float) -> Server:
    said: dict[str, str] = {}
    deadline = time.monotonic() + patience
    assert process.stdout is not None
    for line in process.stdout:
        words = line.split()
        if words:
            said.setdefault(words[0], words[1] if len(words) > 1 else "")
        if "ready" in said:
            return Server(process.pid, said["grpc"], said.get("metrics", ""), said.get("http", ""))
        if time.monotonic() > deadline:
            break
    errors.seek(0)
    tail = errors.read()[-2000:]
    raise BenchmarkError(f"{' '.join(map(str, process.args))} did not become ready; it said {said}\n{tail}")  # type: ignore[arg-type]


def end(process: subprocess.Popen[Any], seconds: float = 30.0) -> None:
    """SIGTERM, and after `seconds` SIGKILL. Returns once it is gone."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()


def cpu_seconds(pid: int) -> float:
    """User and system time of a process, all threads, in seconds."""
    # The name in brackets may hold blanks; utime and stime are the 14th and 15th field.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * TICK


def children(pid: int) -> list[int]:
    """The processes that a process started and that live."""
    path = Path(f"/proc/{pid}/task")
    return [int(child) for task in path.iterdir() for child in (task / "children").read_text().split()]


def stolen_seconds(core: int) -> float:
    """Time that the hypervisor gave this core to others, in seconds: what makes a virtual machine's figures noisy."""
    for line in Path("/proc/stat").read_text().splitlines():
        words = line.split()
        if words[0] == f"cpu{core}":
            return int(words[8]) * TICK
    return 0.0


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a process holds at one moment."""

    rss: int  # bytes
    threads: int
    descriptors: int


def footprint(pid: int) -> Footprint:
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    return Footprint(
        rss=int(status["VmRSS"].split()[0]) * 1024,
        threads=int(status["Threads"]),
        descriptors=len(list(Path(f"/proc/{pid}/fd").iterdir())),
    )


# -- metrics ----------------------------------------------------------------------------------------------------------


class Metrics:
    """One scrape of /metrics."""

    def __init__(self, text: str) -> None:
        self._samples = [
            (sample.name, sample.labels, sample.value)
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        ]

    def total(self, name: str, **labels: str) -> float:
        """The sum of every sample of that name whose labels are as said; 0 where there is none."""
        return sum(
            value
            for found, its, value in self._samples
            if found == name and all(its.get(k) == v for k, v in labels.items())
        )

    def by(self, name: str, label: str) -> dict[str, float]:
        """The samples of that name, summed by the value of one label."""
        sums: dict[str, float] = {}
        for found, its, value in self._samples:
            if found == name:
                sums[its[label]] = sums.get(its[label], 0.0) + value
        return sums


def scrape(url: str) -> Metrics:
    with urllib.request.urlopen(url, timeout=10) as response:
        return Metrics(response.read().decode())


# -- models -----------------------------------------------------------------------------------------------------------


def newest(name: str) -> Path:
    """The newest exported version of a recipe, made first where there is none."""

    def versions() -> list[Path]:
        return [path.parent for path in MODELS.glob(f"{name}/*/model.onnx") if path.parent.name.isdecimal()]

    if not versions():
        print(f"training {name} first: models/{name}/train.py", file=sys.stderr, flush=True)
        command = [sys.executable, str(MODELS / name / "train.py"), "--repository", str(MODELS)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode or not versions():
            raise BenchmarkError(f"models/{name}/train.py left no version (it needs the extra `train`):\n{done.stdout}")
    return max(versions(), key=lambda path: int(path.name))


def repository(folder: Path, names: Sequence[str]) -> Path:
    """A repository in `folder` with the newest version of each recipe and nothing else."""
    for name in names:
        version = newest(name)
        shutil.copytree(version, folder / name / version.name)
        shutil.copy2(MODELS / name / "model.toml", folder / name)
    return folder


def held_out(name: str) -> Any:
    """The rows that a recipe's training never saw, [N, D_in] float32. Needs the extra `train`."""
    spec = importlib.util.spec_from_file_location(f"{name}_data", MODELS / name / "data.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.held_out()[0]


def certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate of its own for 127.0.0.1 and its key, in `folder`. Needs the command openssl."""
    made, key = folder / "tls.crt", folder / "tls.key"
    if not made.exists():
        if shutil.which("openssl") is None:
            raise BenchmarkError("TLS needs a certificate, made by the command openssl, which is not installed")
        words = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
        words += ["-keyout", str(key), "-out", str(made), "-days", "2", "-subj", "/CN=localhost"]
        subprocess.run([*words, "-addext", "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True)
    return made, key


# -- the machine ------------------------------------------------------------------------------------------------------


def machine(cores: Cores) -> dict[str, Any]:
    """What the figures were measured on: for the result file."""
    model = "unknown"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(("model name", "Processor")):
            model = line.partition(":")[2].strip()
            break
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "server_core": cores.server,
        "load_core": cores.load,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "packages": _versions(),
        "h2load": _h2load_version(),
    }


def _versions() -> Mapping[str, str]:
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _h2load_version() -> str:
    if shutil.which("h2load") is None:
        return "none"
    return subprocess.run(["h2load", "--version"], capture_output=True, text=True).stdout.split()[-1]
