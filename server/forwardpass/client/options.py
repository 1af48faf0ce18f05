"""The options of a request, declared once for both clients and their streams: name, type, default and meaning.

A method takes them as `**options: Unpack[InferOptions]`, which type checkers and editors complete by name. `shows` lets
`help` and `inspect.signature` list them too, and `filled` raises TypeError for any other, since Python would not.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, TypedDict, TypeVar, cast

from forwardpass.client.results import Parameter

F = TypeVar("F", bound=Callable[..., Any])
OptionsT = TypeVar("OptionsT", bound=Mapping[str, object])


class MapOptions(TypedDict, total=False):
    """Those of every request."""

    version: str  # "": the server's choice
    outputs: Iterable[str] | None  # names of the outputs to send; None: the model's default outputs
    timeout: float | None  # seconds; None: the client's default, or on a stream no limit
    priority: int  # 1 is the most urgent; 0: the model's default
    parameters: Mapping[str, Parameter] | None  # sent unchanged


class SubmitOptions(MapOptions, total=False):
    """Those of a single request on a stream."""

    id: str  # returned in the answer


class InferOptions(SubmitOptions, total=False):
    """Those of a call."""

    timings: bool  # whether the answer must have the server's timings


# The defaults of each kind.
MAP: Final[MapOptions] = {"version": "", "outputs": None, "timeout": None, "priority": 0, "parameters": None}
SUBMIT: Final[SubmitOptions] = {**MAP, "id": ""}
INFER: Final[InferOptions] = {**SUBMIT, "timings": False}


def filled(defaults: OptionsT, options: Mapping[str, object]) -> OptionsT:
    """Every option: as given in `options`, else its default. Raises TypeError for one that has none."""
    chosen = {**defaults, **options}
    if len(chosen) > len(defaults):
        wrong = next(name for name in options if name not in defaults)
        raise TypeError(f"unexpected keyword argument '{wrong}': expected one of {', '.join(defaults)}")
    return cast("OptionsT", chosen)


def shows(defaults: Mapping[str, object]) -> Callable[[F], F]:
    """Decorate a method that takes `**options` so that its signature lists each of them with its default."""

    def decorate(method: F) -> F:
        signature = inspect.signature(method)
        own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        types = {name: type_.__forward_arg__ for name, type_ in InferOptions.__annotations__.items()}
        options = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=types[name])
            for name, default in defaults.items()
        ]
        method.__signature__ = signature.replace(parameters=own + options)  # type: ignore[attr-defined]
        return method

    return decorate
