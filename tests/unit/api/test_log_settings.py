"""Trace and log settings: what they say, what they change, and what they refuse to pretend."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest

from forwardpass import protocol
from forwardpass.api.log_settings import SILENT, UNTRACED, LogSettings
from forwardpass.errors import InvalidRequest, UnknownMethod, UnknownModel
from forwardpass.observability.trace_context import Sampler
from forwardpass.observability.tracing import Tracing


def resolve(name: str, _version: str) -> object:
    if name != "here":
        raise UnknownModel(f"there is no model '{name}'")
    return name


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    found = logging.getLogger("forwardpass-test-runtime-settings")
    found.setLevel(logging.INFO)
    yield found
    found.setLevel(logging.NOTSET)


@pytest.fixture
def service(logger: logging.Logger) -> LogSettings:
    return LogSettings(resolve, logger)


def trace(**settings: list[str]) -> Any:
    return protocol.TraceSettingRequest(settings={name: {"value": value} for name, value in settings.items()})


def log(**settings: Any) -> Any:
    kinds = {bool: "bool_param", int: "uint32_param", str: "string_param"}
    return protocol.LogSettingsRequest(settings={n: {kinds[type(v)]: v} for n, v in settings.items()})


def said(response: Any) -> dict[str, Any]:
    return {name: getattr(v, v.WhichOneof("parameter_choice")) for name, v in response.settings.items()}


def test_nothing_is_traced(service: LogSettings) -> None:
    request = protocol.TraceSettingRequest(model_name="here")
    for asked in (request, trace(trace_level=["OFF"], trace_rate=[])):
        assert {name: list(v.value) for name, v in service.trace_setting(asked).settings.items()} == UNTRACED


@pytest.mark.parametrize(
    "settings", [{"trace_level": ["TIMESTAMPS"]}, {"trace_file": ["/tmp/x"]}, {"trace_rate": ["1"]}]
)
def test_tracing_is_not_pretended(service: LogSettings, settings: dict[str, list[str]]) -> None:
    with pytest.raises(UnknownMethod, match="cannot be changed while the server runs; it is set by"):
        service.trace_setting(trace(**settings))


@pytest.mark.parametrize(("ratio", "rate"), [(1.0, "1"), (0.01, "100"), (0.0, "0")])
def test_what_is_traced_is_told(logger: logging.Logger, ratio: float, rate: str) -> None:
    maker: Any = None  # makes no spans here
    service = LogSettings(resolve, logger, Tracing(maker, Sampler(ratio), bounds=()))
    told = {name: list(v.value) for name, v in service.trace_setting(trace()).settings.items()}
    assert told == UNTRACED | {
        "trace_level": ["TIMESTAMPS"], "trace_rate": [rate], "trace_count": ["-1"], "trace_mode": ["opentelemetry"],
    }  # fmt: skip
    service.trace_setting(trace(trace_level=["TIMESTAMPS"]))
    with pytest.raises(UnknownMethod, match="--tracing"):
        service.trace_setting(trace(trace_level=["OFF"]))


def test_settings_and_models_that_are_not_there_are_named(service: LogSettings) -> None:
    with pytest.raises(InvalidRequest, match="'nonsense'"):
        service.trace_setting(trace(nonsense=["1"]))
    with pytest.raises(UnknownModel):
        service.trace_setting(protocol.TraceSettingRequest(model_name="elsewhere"))


def test_the_log_says_what_it_does(service: LogSettings) -> None:
    assert said(service.log_settings(log())) == {
        "log_file": "",
        "log_info": True,
        "log_warning": True,
        "log_error": True,
        "log_verbose_level": 0,
        "log_format": "default",
    }


@pytest.mark.parametrize(
    ("settings", "level"),
    [
        ({"log_info": False}, logging.WARNING),
        ({"log_info": False, "log_warning": False}, logging.ERROR),
        ({"log_info": False, "log_warning": False, "log_error": False}, SILENT),
        ({"log_verbose_level": 2}, logging.DEBUG),
        ({"log_verbose_level": 0}, logging.INFO),
        ({"log_file": "", "log_format": "default"}, logging.INFO),
    ],
)
def test_the_level_is_changed_and_told(
    service: LogSettings, logger: logging.Logger, settings: dict[str, Any], level: int
) -> None:
    told = said(service.log_settings(log(**settings)))
    assert logger.level == level
    assert {name: told[name] for name in settings} == {
        n: min(v, 1) if n == "log_verbose_level" else v for n, v in settings.items()
    }
    assert service.log_settings(log()) == service.log_settings(log())


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"log_warning": False}, InvalidRequest),  # info without warnings
        ({"log_error": False}, InvalidRequest),
        ({"log_verbose_level": 1, "log_info": False}, InvalidRequest),
        ({"log_info": 1}, InvalidRequest),
        ({"log_verbose_level": True}, InvalidRequest),
        ({"nonsense": True}, InvalidRequest),
        ({"log_file": "/tmp/log", "log_info": False}, UnknownMethod),
        ({"log_format": "ISO8601"}, UnknownMethod),
    ],
)
def test_what_cannot_be_is_refused_and_changes_nothing(
    service: LogSettings, logger: logging.Logger, settings: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        service.log_settings(log(**settings))
    assert logger.level == logging.INFO
