"""Every method and path of the HTTP port. For an RPC with a plain REST form: the message it makes, the JSON it answers.

One row for each; OpenAPI's description and the table in docs/http.md are made from the same rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from forwardpass import protocol
from forwardpass.errors import InvalidRequest, printable
from forwardpass.protocol.json_messages import (
    UINT64_LIMIT,
    bounded,
    text_field,
    to_json,
    whole_number,
    write_repository_parameters,
)

Path = Mapping[str, str]  # the parts of a path that stand in braces
Body = dict[str, Any]  # a request's JSON object; empty if it had none


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One method and path. `request` makes the RPC's message and may raise InvalidRequest."""

    method: str
    path: str
    rpc: str  # of the inference service
    summary: str
    request: Callable[[Path, Body], Any]
    response: Callable[[Any], Any] = to_json


def _of(kind: str, **fields: str) -> Callable[[Path, Body], Any]:
    """A maker of messages of a `kind`, whose `fields` come from the path's parts of the given names."""
    message = protocol.message(f"inference.{kind}")

    def make(path: Path, _body: Body) -> Any:
        return message(**{field: path[part] for field, part in fields.items() if part in path})

    return make


def _index(_path: Path, body: Body) -> Any:
    ready = body.get("ready", False)
    if not isinstance(ready, bool):
        raise InvalidRequest("ready: expected true or false")
    return protocol.RepositoryIndexRequest(ready=ready)


def _load(path: Path, body: Body) -> Any:
    request = protocol.RepositoryModelLoadRequest(model_name=path["model"])
    write_repository_parameters(body.get("parameters") or {}, request.parameters)
    return request


def _unload(path: Path, body: Body) -> Any:
    request = protocol.RepositoryModelUnloadRequest(model_name=path["model"])
    write_repository_parameters(body.get("parameters") or {}, request.parameters)
    return request


def _register(path: Path, body: Body) -> Any:
    return protocol.SystemSharedMemoryRegisterRequest(
        name=path["region"],
        key=text_field(body.get("key"), "key"),
        offset=whole_number(body.get("offset", 0), "offset", UINT64_LIMIT),
        byte_size=whole_number(body.get("byte_size"), "byte_size", UINT64_LIMIT),
    )


def _register_cuda(path: Path, _body: Body) -> Any:
    return protocol.CudaSharedMemoryRegisterRequest(name=path["region"])  # not offered, whatever the handle


def _named(body: Body) -> Iterator[tuple[str, Any]]:
    """The settings in a body, by name. Raises InvalidRequest for too many, or names that a message can't hold."""
    bounded(body, "settings")
    for key, value in body.items():
        yield text_field(key, f"setting '{printable(key)}'"), value


def _trace(path: Path, body: Body) -> Any:
    request = protocol.TraceSettingRequest(model_name=path.get("model", ""))
    for key, value in _named(body):
        values = [] if value is None else value if isinstance(value, list) else [value]
        bounded(values, key)
        request.settings[key].value.extend([text_field(v, key) for v in values])
    return request


def _log(_path: Path, body: Body) -> Any:
    request = protocol.LogSettingsRequest()
    for key, value in _named(body):
        if isinstance(value, bool):
            request.settings[key].bool_param = value
        elif isinstance(value, int):
            request.settings[key].uint32_param = whole_number(value, key, 1 << 32)
        else:
            request.settings[key].string_param = text_field(value, key)
    return request


def _nothing(_response: Any) -> Any:
    return {}


def _traced(response: Any) -> Any:
    """A list for the levels, as Triton has it, and one string for every other setting."""
    return {
        key: list(setting.value) if key == "trace_level" else ",".join(setting.value)
        for key, setting in sorted(response.settings.items())
    }


def _config(response: Any) -> Any:
    return to_json(response)["config"]


def _settings(response: Any) -> Any:
    return to_json(response)["settings"]


def _regions(response: Any) -> Any:
    return list(to_json(response)["regions"].values())


_MODEL = "/v2/models/{model}"
_VERSION = "/v2/models/{model}/versions/{version}"
_ONE = {"name": "model", "version": "version"}


def _of_model(suffix: str, rpc: str, summary: str, kind: str, response: Callable[[Any], Any]) -> tuple[Endpoint, ...]:
    """A GET for a model, and one for a version of it."""
    request = _of(kind, **_ONE)
    return tuple(Endpoint("GET", base + suffix, rpc, summary, request, response) for base in (_MODEL, _VERSION))


ENDPOINTS: tuple[Endpoint, ...] = (
    Endpoint("GET", "/v2", "ServerMetadata", "Name, version and extensions.", _of("ServerMetadataRequest")),
    Endpoint("GET", "/v2/models/stats", "ModelStatistics", "Of every model.", _of("ModelStatisticsRequest")),
    *_of_model("", "ModelMetadata", "A model's inputs and outputs.", "ModelMetadataRequest", to_json),
    *_of_model("/config", "ModelConfig", "A model's options, completed.", "ModelConfigRequest", _config),
    *_of_model("/stats", "ModelStatistics", "A model's counts and times.", "ModelStatisticsRequest", to_json),
    Endpoint(
        "POST", "/v2/repository/index", "RepositoryIndex", "Every model version and its state.", _index,
        lambda r: to_json(r)["models"],
    ),
    Endpoint(
        "POST", "/v2/repository/models/{model}/load", "RepositoryModelLoad", "Load a model, or load it again.", _load,
        _nothing,
    ),
    Endpoint(
        "POST", "/v2/repository/models/{model}/unload", "RepositoryModelUnload", "Serve a model no more.", _unload,
        _nothing,
    ),
    Endpoint(
        "GET", "/v2/systemsharedmemory/status", "SystemSharedMemoryStatus", "Every registered region.",
        _of("SystemSharedMemoryStatusRequest"), _regions,
    ),
    Endpoint(
        "GET", "/v2/systemsharedmemory/region/{region}/status", "SystemSharedMemoryStatus", "One registered region.",
        _of("SystemSharedMemoryStatusRequest", name="region"), _regions,
    ),
    Endpoint(
        "POST", "/v2/systemsharedmemory/region/{region}/register", "SystemSharedMemoryRegister", "Register a region.",
        _register, _nothing,
    ),
    Endpoint(
        "POST", "/v2/systemsharedmemory/region/{region}/unregister", "SystemSharedMemoryUnregister", "Forget a region.",
        _of("SystemSharedMemoryUnregisterRequest", name="region"), _nothing,
    ),
    Endpoint(
        "POST", "/v2/systemsharedmemory/unregister", "SystemSharedMemoryUnregister", "Forget every region.",
        _of("SystemSharedMemoryUnregisterRequest"), _nothing,
    ),
    Endpoint(
        "GET", "/v2/cudasharedmemory/status", "CudaSharedMemoryStatus", "Not offered.",
        _of("CudaSharedMemoryStatusRequest"), _regions,
    ),
    Endpoint(
        "GET", "/v2/cudasharedmemory/region/{region}/status", "CudaSharedMemoryStatus", "Not offered.",
        _of("CudaSharedMemoryStatusRequest", name="region"), _regions,
    ),
    Endpoint(
        "POST", "/v2/cudasharedmemory/region/{region}/register", "CudaSharedMemoryRegister", "Not offered.",
        _register_cuda, _nothing,
    ),
    Endpoint(
        "POST", "/v2/cudasharedmemory/region/{region}/unregister", "CudaSharedMemoryUnregister", "Not offered.",
        _of("CudaSharedMemoryUnregisterRequest", name="region"), _nothing,
    ),
    Endpoint(
        "POST", "/v2/cudasharedmemory/unregister", "CudaSharedMemoryUnregister", "Forget every region: there are none.",
        _of("CudaSharedMemoryUnregisterRequest"), _nothing,
    ),
    *(
        Endpoint(method, base + "/trace/setting", "TraceSetting", summary, _trace, _traced)
        for method, summary in (("GET", "The trace settings."), ("POST", "Change trace settings."))
        for base in ("/v2", _MODEL)
    ),
    Endpoint("GET", "/v2/logging", "LogSettings", "The log settings.", _of("LogSettingsRequest"), _settings),
    Endpoint("POST", "/v2/logging", "LogSettings", "Change log settings.", _log, _settings),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Special:
    """A method and path that the application answers by a function of its own, of this `name`."""

    method: str
    path: str
    name: str
    summary: str
    body: str = ""  # the kind of its request and response bodies; "": any JSON


SPECIALS: tuple[Special, ...] = (
    Special("GET", "/v2/health/live", "live", "200 as long as the process answers."),
    Special("GET", "/v2/health/ready", "ready", "Whether the server is ready: 200, or 503."),
    *(
        Special("GET", f"{base}/ready", "model_ready", "Whether a model is ready: 200, or 503.")
        for base in (_MODEL, _VERSION)
    ),
    *(Special("POST", f"{base}/infer", "infer", "Run a model on rows.", "Infer") for base in (_MODEL, _VERSION)),
    Special("GET", "/", "alive", "KServe's v1 liveness: 200 as long as the process answers."),
    Special("GET", "/v1/models", "v1_models", "The names of the models that are ready."),
    Special("GET", "/v1/models/{model}", "v1_model", "Whether a model is ready, and its versions."),
    *(
        Special("POST", f"/v1/models/{{model}}{version}:predict", "predict", "Run a model on rows.", "Predict")
        for version in ("", "/versions/{version}")
    ),
    Special("POST", "/v1/models/{model}:explain", "explain", "Not offered."),
    Special("GET", "/v2/flight", "flight", "The last batches, for `forwardpass flight`; needs the role admin."),
    Special("GET", "/openapi.json", "describe", "All of this, for tools."),
)  # fmt: skip


def table() -> str:
    """The table of docs/http.md, as Markdown."""
    lines = ["| method | path | |", "| --- | --- | --- |"]
    rows: tuple[Endpoint | Special, ...] = (*SPECIALS, *ENDPOINTS)
    lines += [f"| {row.method} | `{row.path}` | {row.summary} |" for row in rows]
    return "\n".join(lines)
