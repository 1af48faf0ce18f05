"""Every setting of the server, declared once: its name, unit, default and advice.

The command line (`--grpc-port`), the environment (`FORWARDPASS_GRPC_PORT`), a file (`--config`) and the README's table
are made from the fields below. Precedence: command line, then environment, then the file, then default. What belongs to
one model rather than to the server is in `model/options.py`.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from forwardpass.errors import SettingsError
from forwardpass.observability.latency_watch import LatencyCondition
from forwardpass.observability.model_metrics import LATENCY_BOUNDS
from forwardpass.settings_file import read_settings

PREFIX = "FORWARDPASS_"
CONFIG = (
    "A TOML file of settings by these names, with _ in place of -: grpc_port = 9001. An option comes before its "
    "variable, that before the file, that before the default; a name that is no setting is an error. Paths in it are "
    "relative to where the server is started."
)
MIB = 1 << 20
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*((?:[KMGT]i?)?B?)", re.IGNORECASE)
UNITS = {
    prefix + binary + unit: (1024 if binary else 1000) ** power
    for power, prefix in enumerate(("", "k", "m", "g", "t"))
    for binary in (("", "i") if prefix else ("",))
    for unit in ("", "b")
}


class Settings(BaseModel):
    """One server's settings. Times are in seconds, sizes in bytes, unless the description states otherwise."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    repository: Path = Field(Path("models"), description="The folder of models, or one model's own folder.")
    model_name: str = Field(
        "",
        description="Serve the repository's folder as the one model of this name: model.onnx directly in it, as "
        "version 1, or VERSION/model.onnx. KServe mounts models so.",
    )
    model_control: Literal["none", "poll", "explicit", "on-demand"] = Field(
        "none",
        description="How models come and go while the server runs: none: as they are at the start; poll: as the folder "
        "changes; explicit: by RepositoryModelLoad and RepositoryModelUnload; on-demand: a model is loaded by its "
        "first request, and the folder is looked at as with poll.",
    )
    load_model: tuple[str, ...] = Field(
        (),
        description="With explicit and on-demand control, the models to load at the start, with commas between them; "
        "* for all.",
    )
    model_memory: int = Field(
        0,
        ge=0,
        description="With on-demand control, the memory that loaded models may take together, such as 2GiB: beyond it "
        "those that were not asked for the longest are unloaded. It counts what networks take, not what runs do "
        "(docs/repositories.md). 0: no limit.",
    )
    poll_seconds: float = Field(
        15.0, gt=0, description="With poll and on-demand, seconds between two looks at the folder."
    )
    strict: bool = Field(
        False,
        description="Ready only once every model that should serve does; without it, once all were tried. The Helm "
        "chart turns it on; docs/kubernetes.md has the reasons.",
    )
    host: str = Field(
        "127.0.0.1",
        description="Where to listen: an address, a name (every address found for it), :: for every interface, by IPv4 "
        "and IPv6, or unix:/path for processes of this machine.",
    )
    grpc_port: int = Field(8001, ge=0, le=65535, description="Port for gRPC; 0 picks a free one and prints it.")
    http_port: int = Field(
        8000,
        ge=-1,
        le=65535,
        description="Port for the same protocol over HTTP, in JSON or with binary tensors; 0 picks one, -1 turns it "
        "off. Not opened with a host of unix:/path, whose file's permissions say who may call.",
    )
    metrics_port: int = Field(
        8002, ge=-1, le=65535, description="Port for Prometheus' /metrics over HTTP; 0 picks one, -1 turns it off."
    )
    status_page: bool = Field(
        True,
        description="Serve the status page at / of the HTTP port, or of the metrics port where there is none: figures, "
        "models and their layers, a row to try, the last errors. With tokens it asks for one.",
    )
    health_port: int = Field(
        -1,
        ge=-1,
        le=65535,
        description="A port more that answers grpc.health.v1 alone, in plaintext: for probes, which can do neither TLS "
        "nor certificates. 0 picks one, -1 turns it off.",
    )
    transport: Literal["auto", "direct", "grpcio"] = Field(
        "auto",
        description="How HTTP/2 is spoken: direct (libnghttp2, the quicker one; needs Linux) or grpcio. auto "
        "takes direct where it can.",
    )
    tls_certificate: Path | None = Field(
        None,
        description="The server's certificate with those between it and its authority, in PEM; with it the port speaks "
        "TLS. It, the key and the clients' authority are read again when they change.",
    )
    tls_key: Path | None = Field(None, description="The certificate's key in PEM, not encrypted.")
    tls_client_ca: Path | None = Field(
        None,
        description="Authorities in PEM; only clients with a certificate that one of them signed get in (mutual TLS).",
    )
    tokens: Path | None = Field(
        None,
        description="A file of bearer tokens, a line each: infer TOKEN or admin TOKEN, or sha256:DIGEST in its place. "
        "With it every call except health needs one; load, unload, shared memory and settings need admin. Read again "
        "when it changes.",
    )
    reflection: bool = Field(False, description="Offer server reflection, for buf curl, grpcurl and the like.")
    shared_memory: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Whether clients may register system shared memory. auto: where only this machine reaches the "
        "port, or tokens are asked for.",
    )
    provider: str = Field(
        "auto",
        description="Where networks run: auto, cpu, cuda, cuda:N or, on several devices, cuda:N,M; openvino, where "
        "onnxruntime-openvino is installed in place of onnxruntime. A model's own option comes before it. auto takes "
        "the first CUDA device where there is one that works, and prints the reason; CUDA that was asked for and "
        "cannot be had is an error.",
    )
    allow_tf32: bool = Field(
        False,
        description="On CUDA, let products of 32-bit floats keep 10 bits of their mantissa (TF32), for models that do "
        "not set it: quicker, and no longer what the CPU answers.",
    )
    gpu_mem_limit: int = Field(
        0,
        ge=0,
        description="Bytes of a device that one instance may take for weights and runs, beside its buffers; 0: no "
        "limit.",
    )
    intra_op_threads: int = Field(
        0,
        ge=0,
        description="Threads inside one run; 0 lets the server choose and print the reason. More than 1 makes one "
        "pool that all models share.",
    )
    instances: int = Field(
        0,
        ge=0,
        description="Runs of one model at the same time, on CUDA on each device, for models that do not set it; 0 lets "
        "the server choose.",
    )
    processes: int = Field(
        1,
        ge=0,
        le=1024,
        description="Processes that serve behind one port (docs/processes.md): one receives and answers on one core. "
        "0, or auto: as many as receiving needs to keep every core busy, by the size of the networks; it is printed.",
    )
    min_processes: int = Field(
        1, ge=1, description="With several processes, the server is not ready while fewer than these are."
    )
    max_batch_size: int = Field(
        0,
        ge=0,
        description="Rows in one matrix, for models that do not set it; 0 has it measured when a model is loaded: the "
        "least that has most of the throughput of any, at most 1024.",
    )
    ignore_unsupported: bool = Field(
        False,
        description="Serve models whose config.pbtxt asks for what is not supported and changes no answer, such as "
        "TensorRT, without it, with a warning; else they are refused.",
    )
    cpu_memory: int = Field(
        0,
        ge=0,
        description="Memory that networks on the CPU may take, runs and weights together, such as 8GiB; a run that "
        "would exceed it fails as RESOURCE_EXHAUSTED before it has taken it (docs/limits.md). 0: three quarters of the "
        "cgroup's limit, or of the machine's memory where there is none.",
    )
    max_message_bytes: int = Field(
        16 * MIB, ge=1024, description="The largest request in bytes; a larger one is refused as RESOURCE_EXHAUSTED."
    )
    max_requests: int = Field(16384, ge=1, description="Requests in flight over all models; one more is refused.")
    max_bytes: int = Field(
        512 * MIB,
        ge=1024,
        description="Bytes of requests in flight over all models; and on each port as many of messages that are not "
        "read yet and of answers that have not left, of which one connection gets what is free for the others.",
    )
    max_streams: int = Field(1024, ge=1, description="Concurrent calls on one connection.")
    max_metadata_bytes: int = Field(16384, ge=1024, description="Request metadata in bytes; more is refused.")
    inline_run_limit: float | None = Field(
        None,
        ge=0,
        description="A run predicted to be shorter than this many seconds is made by the thread that received the "
        "request, which saves a hand-over; 0 always hands over, as CUDA does, and as is done for networks whose runs "
        "take as long as values say (loops, rows of any size, text). Unset: 0.0005, and 0.002 on one core, where "
        "handing over gains nothing.",
    )
    run_timeout: float = Field(
        30.0,
        gt=0,
        description="Seconds after which a run is ended and its requests fail with DEADLINE_EXCEEDED. A CUDA graph "
        "cannot be ended once it runs.",
    )
    drain_wait: float = Field(
        0.0,
        ge=0,
        description="Seconds that the server goes on accepting calls after its health says NOT_SERVING, when it stops: "
        "the time that clients and load balancers need to look elsewhere. 5 to 10 on Kubernetes.",
    )
    max_connection_age: float = Field(
        0.0,
        ge=0,
        description="Seconds, give or take a tenth, after which a client is asked to connect anew, so that new servers "
        "get their share; calls under way finish. 0: never.",
    )
    max_unread_seconds: float = Field(
        2.0,
        gt=0,
        description="Seconds that a call without a deadline may wait before the gRPC port can look at it, which past "
        "the server's capacity grows without end; older ones are refused. A call with a deadline is refused once its "
        "time is nearly over.",
    )
    grace: float = Field(20.0, ge=0, description="Seconds that requests in flight get to finish when the server stops.")
    flight_batches: int = Field(
        4096,
        ge=0,
        le=1 << 20,
        description="Batches that the flight recorder keeps, and as many refusals, for `forwardpass flight` to draw; 0 "
        "turns it off. docs/flight-recorder.md has its cost.",
    )
    flight_folder: Path | None = Field(
        None,
        description="Where SIGUSR1, a lost device and --flight-when write it. Unset: the system's temporary folder.",
    )
    flight_when: str = Field(
        "",
        description="Write it, once a minute at most, when the requests of a model in the last second meet a condition "
        "on latency: p99>20ms. Empty: never.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="How much is logged.")
    log_format: Literal["console", "json"] = Field(
        "console",
        description="console: lines for people, the log on stderr and what the server says of itself on stdout; json: "
        "all of it on stdout, an object a line (docs/logs.md).",
    )
    access_log: float = Field(
        0.0,
        ge=0,
        le=1,
        description="The share of requests that get a line in the log, and with any, every error up to 20 a second; 0 "
        "turns it off.",
    )

    tracing: Literal["auto", "on", "off"] = Field(
        "auto",
        description="OpenTelemetry's traces, which need the extra otel. auto: where OTEL_TRACES_EXPORTER or "
        "OTEL_EXPORTER_OTLP_ENDPOINT is set. Where they go and which share of requests has one is set by the standard "
        "OTEL_* variables (docs/tracing.md).",
    )
    trace_baggage: tuple[str, ...] = Field(
        (), description="Entries of the W3C's baggage that spans record, with commas between them."
    )

    @field_validator("load_model", "trace_baggage", mode="before")
    @classmethod
    def _split(cls, names: object) -> object:
        given = [names] if isinstance(names, str) else list(names) if isinstance(names, (list, tuple)) else []
        return tuple(n for text in given for n in map(str.strip, text.split(",")) if n)

    @field_validator("processes", mode="before")
    @classmethod
    def _count(cls, given: object) -> object:
        return 0 if given == "auto" else given

    @field_validator("model_memory", "cpu_memory", mode="before")
    @classmethod
    def _size(cls, given: object) -> object:
        return bytes_of(given) if isinstance(given, str) else given

    @field_validator("processes")
    @classmethod
    def _one(cls, count: int, info: ValidationInfo) -> int:
        if count > 1 and info.data.get("model_control") == "on-demand":
            raise ValueError("expected 1 with model_control on-demand")
        return count

    @field_validator("flight_when")
    @classmethod
    def _condition(cls, text: str, info: ValidationInfo) -> str:
        if text:
            LatencyCondition.parse(text, LATENCY_BOUNDS)
            if not info.data.get("flight_batches"):
                raise ValueError("expected flight_batches above 0 with it")
        return text

    @field_validator("load_model")
    @classmethod
    def _explicit(cls, names: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        if names and info.data.get("model_control") not in ("explicit", "on-demand"):
            raise ValueError("expected model_control explicit or on-demand with it")
        return names

    @field_validator("model_memory")
    @classmethod
    def _on_demand(cls, nbytes: int, info: ValidationInfo) -> int:
        if nbytes and info.data.get("model_control") != "on-demand":
            raise ValueError("expected model_control on-demand with it")
        return nbytes


def bytes_of(text: str) -> int:
    """A size in bytes: a whole number, or one with a unit. Raises ValueError."""
    found = SIZE.fullmatch(text.strip())
    if found is None:
        raise ValueError("expected bytes as a number, or with a unit: 500MB, 2GiB")
    return int(float(found[1]) * UNITS[found[2].lower()])


def _annotation(name: str) -> Any:
    return Settings.model_fields[name].annotation


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add one option per setting. Options not given stay absent, so that the environment and the defaults apply."""
    text = f"{CONFIG} [None; {PREFIX}CONFIG]"
    parser.add_argument("--config", type=Path, default=argparse.SUPPRESS, metavar="FILE", help=text)
    for name, field in Settings.model_fields.items():
        default, option = field.default, f"--{name.replace('_', '-')}"
        text = f"{field.description} [{default}; {PREFIX}{name.upper()}]".replace("%", "%%")
        if name == "repository":
            parser.add_argument(name, nargs="?", default=argparse.SUPPRESS, help=text)
        elif isinstance(default, bool):
            parser.add_argument(option, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
        elif isinstance(default, tuple):
            parser.add_argument(option, action="append", default=argparse.SUPPRESS, metavar="NAMES", help=text)
        else:
            annotation = _annotation(name)
            choices = get_args(annotation) if get_origin(annotation) is Literal else None
            parser.add_argument(
                option,
                default=argparse.SUPPRESS,
                choices=choices,
                metavar=None if choices else name.rsplit("_", 1)[-1].upper(),
                help=text,
            )


def from_sources(arguments: Mapping[str, Any], environ: Mapping[str, str] | None = None) -> Settings:
    """Settings from parsed arguments, then the environment, then the file that either names, then the defaults.

    Raises SettingsError, which names each invalid setting, what was expected and what came.
    """
    environ = os.environ if environ is None else environ
    values: dict[str, Any] = {}
    origin: dict[str, str] = {}
    file = arguments.get("config") or environ.get(PREFIX + "CONFIG")
    if file:
        values = read_settings(Path(file), Settings.model_fields)
        origin = {name: f"{file}: {name}" for name in values}
    for name in Settings.model_fields:
        variable = PREFIX + name.upper()
        if name in arguments:
            values[name] = arguments[name]
            origin[name] = "--" + name.replace("_", "-") if name != "repository" else "REPOSITORY"
        elif environ.get(variable, "") != "":
            values[name] = environ[variable]
            origin[name] = variable
    try:
        return Settings(**values)
    except ValidationError as error:
        problems = [
            f"{origin.get(str(e['loc'][0]), e['loc'][0])}: {e['msg']}, got {e['input']!r}" for e in error.errors()
        ]
        raise SettingsError("; ".join(problems)) from None


def table() -> str:
    """The README's table of settings, as Markdown."""
    lines = ["| option | environment | default | meaning |", "| --- | --- | --- | --- |"]
    for name, field in Settings.model_fields.items():
        option = "`REPOSITORY`" if name == "repository" else f"`--{name.replace('_', '-')}`"
        lines.append(f"| {option} | `{PREFIX}{name.upper()}` | `{field.default}` | {field.description} |")
    lines.append(f"| `--config` | `{PREFIX}CONFIG` | `None` | {CONFIG} |")
    return "\n".join(lines)
