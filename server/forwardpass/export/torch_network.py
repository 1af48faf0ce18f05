"""The caller's network as a function of arrays: unchanged, and in float64 as the reference for parity.

Works on copies in evaluation mode: the caller's module, its mode, its device and its gradients are not changed.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from forwardpass.errors import ExportError
from forwardpass.export.input_spec import InputSpec
from forwardpass.model.contract import Tolerance, compare

Values = Mapping[str, NDArray[Any]]


class TorchNetwork:
    """A module whose forward takes the inputs of `specs` and returns tensors, alone or in what `_flatten` knows.

    `specs` are kept in the order of forward's parameters. `output_names` is set by `try_on`.
    """

    def __init__(self, module: nn.Module, specs: Sequence[InputSpec]) -> None:
        """Raises ExportError if the module cannot be copied, or its forward does not take these inputs."""
        if not isinstance(module, nn.Module):
            raise ExportError(f"expected a torch.nn.Module, got {type(module).__name__}")
        try:
            self.module = copy.deepcopy(module).cpu().eval()
        except Exception as error:
            raise ExportError(f"{type(module).__name__} cannot be copied: {_reason(error)}") from error
        self.specs, self._by_name = _bind(module, specs)
        self.output_names: list[str] = []
        self.reference: Literal["float64", "float32"] = "float64"
        self._plain = True  # torch's exporter knows the answer's form
        self._double = copy.deepcopy(self.module).double()

    @property
    def parameters(self) -> int:
        """The number of elements of all parameters."""
        return sum(parameter.numel() for parameter in self.module.parameters())

    def coarsest(self, values: Values) -> np.dtype[Any]:
        """The narrowest float among parameters, buffers and inputs: it limits the accuracy of the outputs."""
        tensors = [*self.module.parameters(), *self.module.buffers(), *(torch.from_numpy(v) for v in values.values())]
        bits = [torch.finfo(t.dtype).bits for t in tensors if t.is_floating_point()]
        return np.dtype(f"float{min(bits, default=32)}")

    def arguments(self, values: Values) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
        """Arrays as forward's positional and keyword arguments."""
        tensors = {spec.name: torch.from_numpy(values[spec.name]) for spec in self.specs}
        return ((), tensors) if self._by_name else (tuple(tensors.values()), {})

    def traced(self) -> nn.Module:
        """The module for torch's exporter: itself, or one with plain parameters and a tuple of tensors."""
        variable = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(self.module.forward).parameters.values())
        if self._plain and not (variable and self._by_name):
            return self.module
        return _Plain(self.module, [spec.name for spec in self.specs], self._by_name)

    def try_on(self, values: Values, names: Sequence[str] | None) -> None:
        """Run the network once, to determine the outputs' names and whether float64 can be the reference.

        The names are the caller's, else the keys of a dict, else `output`, or `output_0`, `output_1`, ...
        Raises ExportError if forward fails on these values or does not return tensors only.
        """
        args, kwargs = self.arguments(values)
        try:
            with torch.no_grad():
                answer = self.module(*args, **kwargs)
        except Exception as error:
            given = ", ".join(f"{name} {list(value.shape)}" for name, value in values.items())
            raise ExportError(f"{type(self.module).__name__}.forward failed on {given}: {_reason(error)}") from error
        leaves = _flatten(answer, "")
        if not leaves:
            raise ExportError(
                f"{type(self.module).__name__}.forward gave no tensor, but {_described(answer)}; expected {UNDERSTOOD}"
            )
        self._plain = _is_plain(answer)
        own = [f"output_{path}".rstrip("_") if path[:1].isdecimal() or not path else path for path, _ in leaves]
        if names is not None and len(names) != len(own):
            raise ExportError(f"the network has {len(own)} outputs; got {len(names)} names: {', '.join(names)}")
        self.output_names = list(names) if names is not None else own
        taken = [*(spec.name for spec in self.specs), *self.output_names]
        twice = sorted({name for name in taken if taken.count(name) > 1})
        if twice:
            raise ExportError(f"inputs and outputs need names of their own; twice there: {', '.join(twice)}")
        self.reference = "float64"
        # A network that creates float32 tensors in forward does not run in float64: then it is its own reference.
        if not self.takes(values):
            self.reference = "float32"
        if compare(self.expected(values), self.expected(values), Tolerance(rtol=0, atol=0)).failure is not None:
            raise ExportError(f"{type(self.module).__name__} gives other answers to the same rows when asked again")

    def takes(self, values: Values) -> bool:
        """Whether the reference runs on these values."""
        try:
            self.expected(values)
        except Exception:
            return False
        return True

    def expected(self, values: Values) -> dict[str, NDArray[Any]]:
        """The outputs of the reference, by name: floats as float64, all others in their own dtypes."""
        if self.reference == "float64":
            module = self._double
            wide = {
                name: value.astype(np.float64) if value.dtype.kind == "f" else value for name, value in values.items()
            }
        else:
            module, wide = self.module, dict(values)
        args, kwargs = self.arguments(wide)
        with torch.no_grad():
            answer = module(*args, **kwargs)
        tensors = [tensor.detach() for _, tensor in _flatten(answer, "")]
        arrays = [(t.double() if t.is_floating_point() else t).contiguous().numpy() for t in tensors]
        return dict(zip(self.output_names, arrays, strict=True))


class _Plain(nn.Module):
    """A network with one parameter for each input, and its answer's tensors in a tuple."""

    def __init__(self, network: nn.Module, names: Sequence[str], by_name: bool) -> None:
        super().__init__()
        self.network = network

        def forward(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
            return tuple(tensor for _, tensor in _flatten(network(*args, **kwargs), ""))

        # torch's exporter matches inputs to the parameters that inspect shows.
        kind = inspect.Parameter.KEYWORD_ONLY if by_name else inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters = [inspect.Parameter(name if by_name else f"x{i}", kind) for i, name in enumerate(names)]
        forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        self.forward: Callable[..., Any] = forward


def _bind(module: nn.Module, specs: Sequence[InputSpec]) -> tuple[list[InputSpec], bool]:
    """Inputs in the order of forward's parameters, and whether they are passed by name: if all match a parameter."""
    signature = inspect.signature(module.forward)
    names = [spec.name for spec in specs]
    parameters = signature.parameters.values()
    takes = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    any_name = any(p.kind is p.VAR_KEYWORD for p in parameters)
    known = [name for name in names if name in takes]
    # Names that only **kwargs would take are names of parameters where nothing else could take them.
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.VAR_POSITIONAL)]
    by_name = len(known) == len(names) or (any_name and (bool(known) or not positional))
    try:
        if by_name:
            signature.bind(**dict.fromkeys(names))
            order = {name: place for place, name in enumerate([*takes, *(n for n in names if n not in takes)])}
            return sorted(specs, key=lambda spec: order[spec.name]), True
        signature.bind(*names)
    except TypeError as error:
        raise ExportError(
            f"{type(module).__name__}.forward{signature} does not take {', '.join(names)}: {error}; expected the names "
            "of its parameters, in any order (**kwargs takes every name), or other names in the order of its parameters"
        ) from None
    for place, name in enumerate(names):
        if name in takes and takes.index(name) != place:
            raise ExportError(
                f"{type(module).__name__}.forward{signature}: input {name!r} is number {place + 1}, but the parameter "
                f"of that name is number {takes.index(name) + 1}; name all inputs as the parameters, or order them so"
            )
    return list(specs), False


def _flatten(answer: Any, path: str) -> list[tuple[str, torch.Tensor]]:
    """Tensors in the order of torch's exporter, each with its keys, fields and indices joined by `_`; None is none."""
    if isinstance(answer, torch.Tensor):
        if answer.dtype in (torch.bfloat16, torch.complex64, torch.complex128):
            at = f"output {path!r}" if path else "its output"
            raise ExportError(
                f"{at} has dtype {answer.dtype}, which has no name in the protocol; expected one of a real number, "
                "as .float() or torch.view_as_real make it"
            )
        return [(path, answer)]
    parts = _parts(answer)
    if parts is None:
        at = f" at {path!r}" if path else ""
        raise ExportError(f"forward gave {_described(answer)}{at}; expected {UNDERSTOOD}")
    return [leaf for key, value in parts for leaf in _flatten(value, f"{path}_{key}" if path else key)]


UNDERSTOOD = "tensors, alone or in tuples, lists, dicts, named tuples and dataclasses, by whose names outputs are named"


def _parts(answer: Any) -> list[tuple[str, Any]] | None:
    """Names and values of what an answer holds; None: not known."""
    if answer is None:
        return []
    if isinstance(answer, Mapping):
        return [(str(key), value) for key, value in answer.items()]
    if isinstance(answer, tuple) and hasattr(answer, "_fields"):
        return list(zip(answer._fields, answer, strict=True))
    if isinstance(answer, tuple | list):
        return [(str(place), value) for place, value in enumerate(answer)]
    if dataclasses.is_dataclass(answer) and not isinstance(answer, type):
        return [(field.name, getattr(answer, field.name)) for field in dataclasses.fields(answer)]
    return None


def _is_plain(answer: Any) -> bool:
    """Whether torch's exporter takes the answer as it is: tensors in Python's own containers."""
    if isinstance(answer, torch.Tensor):
        return True
    own = type(answer) in (tuple, list, dict) or (isinstance(answer, tuple) and hasattr(answer, "_fields"))
    return own and all(_is_plain(value) for _, value in _parts(answer) or ())


def _described(answer: Any) -> str:
    """An answer's type, with what is in it."""
    parts = _parts(answer)
    if answer is None or parts is None:
        return f"a {type(answer).__name__} ({str(answer)[:40]})"
    inside = ", ".join(f"{key}: {type(value).__name__}" for key, value in parts[:6])
    return f"a {type(answer).__name__} of {inside}" if inside else f"an empty {type(answer).__name__}"


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
