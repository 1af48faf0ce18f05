"""What an administrator does over the wire: loading models, their statistics and configuration, the log's level.

Operations without a channel, as in `operations`. With tokens, those that change something need the role admin.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from google.protobuf.json_format import MessageToDict

from forwardpass import protocol
from forwardpass.client import notebook
from forwardpass.client.errors import InvalidArgument
from forwardpass.client.operations import Steps

Ask = Callable[[str, Any, float | None], Steps[Any]]  # method, request, timeout: the parsed response

# By level, what it includes; the protocol's switches.
LEVELS: Final = ("debug", "info", "warning", "error")
_SWITCHES: Final = ("log_info", "log_warning", "log_error")


@dataclass(frozen=True, slots=True)
class ModelStats:
    """What a model version did since it was first loaded. Means are in seconds, None before the first request."""

    name: str
    version: str
    requests: int  # answered
    failed: int  # and refused
    rows: int
    batches: int
    mean_total: float | None  # from arrival to answer, of those answered
    mean_queue: float | None
    mean_run: float | None  # of its whole batch, for each request in it
    last_request: float | None  # seconds since 1970

    @property
    def mean_batch(self) -> float | None:
        """Rows of a batch."""
        return self.rows / self.batches if self.batches else None


class StatsList(list[ModelStats]):
    """A list, which a notebook shows as a table."""

    def _repr_html_(self) -> str:
        rows = [(s.name, s.version, s.requests, s.failed, s.rows, s.batches) for s in self]
        header = ("name", "version", "requests", "failed", "rows", "batches")
        return notebook.table(f"{len(rows)} model versions", header, rows)


def load(ask: Ask, model: str, timeout: float | None) -> Steps[None]:
    yield from ask("RepositoryModelLoad", protocol.RepositoryModelLoadRequest(model_name=model), timeout)


def unload(ask: Ask, model: str, timeout: float | None) -> Steps[None]:
    yield from ask("RepositoryModelUnload", protocol.RepositoryModelUnloadRequest(model_name=model), timeout)


def statistics(ask: Ask, model: str, version: str, timeout: float | None) -> Steps[list[ModelStats]]:
    request = protocol.ModelStatisticsRequest(name=model, version=version)
    response = yield from ask("ModelStatistics", request, timeout)
    return StatsList(_stats(found) for found in response.model_stats)


def config(ask: Ask, model: str, version: str, timeout: float | None) -> Steps[dict[str, Any]]:
    response = yield from ask("ModelConfig", protocol.ModelConfigRequest(name=model, version=version), timeout)
    fields: dict[str, Any] = MessageToDict(response.config, preserving_proto_field_name=True)
    return fields


def log_level(ask: Ask, level: str | None, timeout: float | None) -> Steps[str]:
    request = protocol.LogSettingsRequest()
    if level is not None:
        if level not in LEVELS:
            raise InvalidArgument(f"level: expected one of {', '.join(LEVELS)}, got {level!r}")
        place = LEVELS.index(level)
        request.settings["log_verbose_level"].uint32_param = int(place == 0)
        for graver, name in enumerate(_SWITCHES, 1):
            request.settings[name].bool_param = graver >= place
    settings = (yield from ask("LogSettings", request, timeout)).settings
    if settings["log_verbose_level"].uint32_param:
        return LEVELS[0]
    on = (LEVELS[place] for place, name in enumerate(_SWITCHES, 1) if settings[name].bool_param)
    return next(on, "none")


def _stats(found: Any) -> ModelStats:
    parts = found.inference_stats
    return ModelStats(
        name=found.name,
        version=found.version,
        requests=parts.success.count,
        failed=parts.fail.count,
        rows=found.inference_count,
        batches=found.execution_count,
        mean_total=_mean(parts.success),
        mean_queue=_mean(parts.queue),
        mean_run=_mean(parts.compute_infer),
        last_request=found.last_inference / 1e3 if found.last_inference else None,
    )


def _mean(duration: Any) -> float | None:
    return duration.ns / duration.count / 1e9 if duration.count else None
