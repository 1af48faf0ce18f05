"""Trace and log settings over the wire: reading them, and changing those that can change while the server runs.

What is traced is set when the server starts, and changing it is an error. Of the log only the level can be changed:
where it goes and its format are the server's settings.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from forwardpass import protocol
from forwardpass.errors import InvalidRequest, UnknownMethod, printable
from forwardpass.observability.tracing import Tracing

# The settings of a server that traces nothing, for tools to show.
UNTRACED = {
    "trace_level": ["OFF"],
    "trace_rate": ["0"],
    "trace_count": ["0"],
    "log_frequency": ["0"],
    "trace_file": [""],
    "trace_mode": ["triton"],
}
# And where each is set.
_SET_BY = {
    "trace_level": "--tracing",
    "trace_rate": "OTEL_TRACES_SAMPLER and OTEL_TRACES_SAMPLER_ARG",
    "trace_count": "nothing: there is no limit on it",
    "log_frequency": "nothing: traces are exported, not written to files",
    "trace_file": "nothing: OTEL_EXPORTER_OTLP_ENDPOINT sets where traces go",
    "trace_mode": "nothing: it is the only one",
}


def trace_settings(tracing: Tracing | None) -> dict[str, list[str]]:
    """What is traced, as Triton's settings have it: one request of `trace_rate`, without regard to their parents."""
    if tracing is None:
        return UNTRACED
    ratio = tracing.sampler.ratio
    rate = round(1 / ratio) if ratio else 0
    return {
        **UNTRACED,
        "trace_level": ["TIMESTAMPS"],
        "trace_rate": [str(rate)],
        "trace_count": ["-1"],
        "trace_mode": ["opentelemetry"],
    }


# The protocol's switches and their levels. A logger has one level, so each includes those after it.
SWITCHES = {"log_info": logging.INFO, "log_warning": logging.WARNING, "log_error": logging.ERROR}
SILENT = logging.CRITICAL + 1


class LogSettings:
    """The RPCs TraceSetting and LogSettings, as functions from request message to response message."""

    def __init__(
        self,
        resolve: Callable[[str, str], object],
        logger: logging.Logger | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        """`resolve(model, version)` raises for an unknown model. `logger`: the root logger by default."""
        self._trace = trace_settings(tracing)
        self._resolve = resolve
        self._logger = logger or logging.getLogger()
        self.methods: Mapping[str, Callable[[Any], Any]] = {
            "TraceSetting": self.trace_setting,
            "LogSettings": self.log_settings,
        }

    def trace_setting(self, request: Any) -> Any:
        """Return the trace settings. Raises UnknownMethod for one that would change: they are set at the start."""
        if request.model_name:
            self._resolve(request.model_name, "")
        for name, value in request.settings.items():
            if name not in self._trace:
                raise InvalidRequest(f"'{printable(name)}' is no trace setting; expected {', '.join(self._trace)}")
            if list(value.value) not in ([], self._trace[name]):
                raise UnknownMethod(
                    f"{name} stays {self._trace[name][0] or 'empty'}: trace settings cannot be changed while the "
                    f"server runs; it is set by {_SET_BY[name]}"
                )
        response = protocol.TraceSettingResponse()
        for name, values in self._trace.items():
            response.settings[name].value.extend(values)
        return response

    def log_settings(self, request: Any) -> Any:
        """Return the log settings, after applying the request's changes: all of them, or none if one is invalid."""
        level = self._level(request.settings)
        if level is not None:
            self._logger.setLevel(level)
        level = self._logger.getEffectiveLevel()
        response = protocol.LogSettingsResponse()
        response.settings["log_file"].string_param = ""
        for name, threshold in SWITCHES.items():
            response.settings[name].bool_param = level <= threshold
        response.settings["log_verbose_level"].uint32_param = int(level <= logging.DEBUG)
        response.settings["log_format"].string_param = "default"
        return response

    def _level(self, settings: Any) -> int | None:
        """The level that `settings` request; None: they request none."""
        now = self._logger.getEffectiveLevel()
        on = {name: now <= threshold for name, threshold in SWITCHES.items()}
        verbose = now <= logging.DEBUG
        asked = False
        for name, value in settings.items():
            kind = value.WhichOneof("parameter_choice")
            if name in SWITCHES and kind == "bool_param":
                on[name], asked = value.bool_param, True
            elif name == "log_verbose_level" and kind == "uint32_param":
                verbose, asked = value.uint32_param > 0, True
            elif name in ("log_file", "log_format") and kind == "string_param":
                if value.string_param not in ("", "default" if name == "log_format" else ""):
                    raise UnknownMethod(f"{name} cannot be changed while the server runs; --log-format sets the format")
            else:
                known = ", ".join((*SWITCHES, "log_verbose_level", "log_file", "log_format"))
                raise InvalidRequest(f"'{printable(name)}' as {kind or 'nothing'}: expected {known}, each of its kind")
        if not asked:
            return None
        switches = list(on.values())
        if switches != sorted(switches) or (verbose and not all(switches)):
            raise InvalidRequest(
                "expected each level with all that are graver (log_verbose_level, log_info, log_warning, log_error)"
            )
        if verbose:
            return logging.DEBUG
        return next((SWITCHES[name] for name, is_on in on.items() if is_on), SILENT)
