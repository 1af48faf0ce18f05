"""The load generator of benchmarks/traffic (C, on libnghttp2): builds it, writes its requests, runs it, reads its log.

Its requests differ as real clients' do, in what `Mix` says, and it checks every answer itself. It is a closed loop in
one thread: connections x streams are in flight for the whole time.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import harness
from bodies import framed, request
from h2load import Load, Log
from harness import BenchmarkError

SOURCES = harness.HERE / "traffic"
COMPILER = "cc"
LIBRARIES = ("-lnghttp2", "-lssl", "-lcrypto", "-lm")
HEADERS = ("nghttp2/nghttp2.h", "openssl/ssl.h")
PACKAGES = (
    "Debian and Ubuntu: apt-get install gcc libc6-dev libnghttp2-dev libssl-dev; Fedora: dnf install gcc "
    "libnghttp2-devel openssl-devel; Alpine: apk add gcc musl-dev nghttp2-dev openssl-dev"
)

# As the recorded clients name themselves: the style of their header blocks goes with it.
USER_AGENTS = {
    "grpcio": "grpc-python/1.85.3 grpc-c/58.0.0 (linux; chttp2)",
    "indexed": "grpc-node-js/1.14.7",
}
ID = "0123456789abcdef"  # where the generator puts a counter's digits
MAGIC, HEAD, ENTRY = b"FPTRAF1\0", struct.Struct("<IffI"), struct.Struct("<III")
ROWS, ECHO = 0, 1  # what the right answer is: elements, or the request's own bytes
ABSOLUTE, RELATIVE = 1e-4, 1e-4  # how far an element may be from ONNX Runtime's for that row alone
LOG = np.dtype([("ended", "<u8"), ("took", "<u4"), ("right", "<u4")])


@dataclass(frozen=True, slots=True)
class Mix:
    """What differs from request to request.

    `style` is how header blocks and frames are written: "grpcio" as by grpcio's C-core, "indexed" as by
    nghttp2's encoder, which is Node's and much like Go's and Java's.
    """

    name: str
    style: str = "indexed"
    rows: bool = True  # each request has rows of its own; else it is one request over and over
    id: bool = False
    timeout: bool = False
    traceparent: bool = False
    typed: bool = False  # fp32_contents in place of raw_input_contents; this does not differ, it costs

    def options(self) -> list[str]:
        found = ["--style", self.style, "--user-agent", USER_AGENTS[self.style]]
        return found + ["--timeout"] * self.timeout + ["--traceparent"] * self.traceparent


@dataclass(frozen=True, slots=True)
class Summary:
    """What the generator counted over its whole run."""

    sent: int
    right: int
    inexact: int  # right, yet not bit for bit
    wrong: int
    failed: int  # another status than OK
    unanswered: int
    cpu_seconds: float  # of the generator
    seconds: float
    first_problem: str


# -- building ---------------------------------------------------------------------------------------------------------


def missing() -> str:
    """What is missing here to build it; empty where nothing is."""
    if shutil.which(COMPILER) is None:
        return f"the load generator is compiled when it is first used, and there is no {COMPILER}. {PACKAGES}"
    includes = "".join(f"#include <{header}>\n" for header in HEADERS)
    words = [COMPILER, "-x", "c", "-", "-o", os.devnull, "-fsyntax-only"]
    done = subprocess.run(words, input=includes, capture_output=True, text=True)
    if done.returncode:
        return f"the load generator needs the headers {' and '.join(HEADERS)}. {PACKAGES}\n{done.stderr.strip()}"
    return ""


def build(folder: Path = harness.OUT) -> Path:
    """The generator's file in `folder`, compiled unless it is newer than its sources.

    Raises BenchmarkError, with what to install, where it cannot be.
    """
    sources = sorted(SOURCES.glob("*.[ch]"))
    program = folder / "traffic"
    if program.exists() and program.stat().st_mtime > max(source.stat().st_mtime for source in sources):
        return program
    if lack := missing():
        raise BenchmarkError(lack)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as name:
        made = Path(name) / "traffic"
        words = [COMPILER, "-O2", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-o", str(made)]
        words += [str(source) for source in sources if source.suffix == ".c"]
        done = subprocess.run([*words, *LIBRARIES], capture_output=True, text=True)
        if done.returncode:
            raise BenchmarkError(f"the load generator could not be built. {PACKAGES}\n{done.stderr.strip()}")
        made.replace(program)  # at once, whoever else builds it
    return program


def version(program: Path) -> str:
    """What it is built on, by name and version."""
    return subprocess.run([str(program), "--version"], check=True, capture_output=True, text=True).stdout.strip()


# -- requests ---------------------------------------------------------------------------------------------------------


def write_requests(
    path: Path, models: Sequence[str], rows: NDArray[np.float32], answers: NDArray[np.float32], mix: Mix
) -> None:
    """A file of requests with `rows` [N, B, D_in] and the right `answers` [N, B, D_out], the models in turn."""
    messages = _messages(models, rows, mix)
    contents = [np.ascontiguousarray(answer, "<f4").tobytes() for answer in answers[: len(messages)]]
    entries = [
        ENTRY.pack(len(message), _id_at(message, mix), len(content)) + message + content
        for message, content in zip(messages, contents, strict=True)
    ]
    path.write_bytes(MAGIC + HEAD.pack(ROWS, ABSOLUTE, RELATIVE, len(entries)) + b"".join(entries))


def write_echoes(path: Path, model: str, rows: NDArray[np.float32], most: int, mix: Mix) -> None:
    """The same for a server that answers with the first `most` bytes of what it is sent."""
    messages = _messages([model], rows, mix)
    entries = [ENTRY.pack(len(m), _id_at(m, mix), min(most, len(m) - 5)) + m for m in messages]
    path.write_bytes(MAGIC + HEAD.pack(ECHO, 0.0, 0.0, len(entries)) + b"".join(entries))


def _messages(models: Sequence[str], rows: NDArray[np.float32], mix: Mix) -> list[bytes]:
    chosen = rows if mix.rows else rows[:1]
    id = ID if mix.id else ""
    return [framed(request(models[i % len(models)], matrix, id=id, typed=mix.typed)) for i, matrix in enumerate(chosen)]


def _id_at(message: bytes, mix: Mix) -> int:
    return message.index(ID.encode()) if mix.id else 0


# -- running ----------------------------------------------------------------------------------------------------------


def start(
    program: Path, address: str, requests: Path, load: Load, seconds: float, mix: Mix, log: Path, tls: bool = False
) -> subprocess.Popen[str]:
    words = [str(program), "--connect", address, "--requests", str(requests), "--log", str(log)]
    words += ["--connections", str(load.connections), "--streams", str(load.streams), "--seconds", f"{seconds:g}"]
    words += [*mix.options(), *["--tls"] * tls]
    return subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str], seconds: float) -> Summary:
    """Wait for it and read its summary. Raises BenchmarkError if it fails or takes more than `seconds`."""
    try:
        said, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        with contextlib.suppress(ValueError):
            process.communicate()
        raise BenchmarkError(f"the load generator was still running after {seconds:.0f} s") from None
    if process.returncode:
        raise BenchmarkError(f"the load generator ended with {process.returncode}: {errors.strip()}")
    return Summary(**json.loads(said))


def read_log(path: Path) -> Log:
    table = np.fromfile(path, LOG)
    return Log(table["ended"] * 1e-6, table["took"] * 1e-6, table["right"] == 1)
