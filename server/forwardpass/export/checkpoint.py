"""Builds a user's network from `FILE.py:NAME` or `module:NAME`, its constructor's arguments, and a file of weights.

Runs the user's file, as Python would; the weights are read only as tensors (`weights_only`), unless more is allowed.
"""

from __future__ import annotations

import pickle
import sys
import types
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from forwardpass.errors import ExportError
from forwardpass.export.user_code import Named, look_up

# The keys under which common training loops store the state dict, and the prefixes that wrappers add to its names.
_NESTED = (
    "state_dict", "model_state_dict", "model", "params_ema", "params", "ema", "net", "network", "module", "weights",
    "generator",
)  # fmt: skip
_WRAPPERS = ("module.", "_orig_mod.")
_SHOWN = 4  # names of each kind shown in one error


def build(target: str, arguments: Mapping[str, Any], found: Named | None = None) -> tuple[nn.Module, bool]:
    """The network that NAME of `FILE.py:NAME` or `package.module:NAME` makes, and whether its weights are random.

    NAME is a module class, a function that returns a module, or a module, which has its weights already. `found`: what
    `look_up` gives for the target, where that is known. Raises ExportError.
    """
    file, name, module, made = found or look_up(target)
    if isinstance(made, nn.Module):
        if arguments:
            raise ExportError(f"{name} is a network already; it takes no arguments, got {', '.join(arguments)}")
        return made, False
    if not callable(made):
        there = sorted(key for key, value in vars(module).items() if _may_be_network(value) and not key.startswith("_"))
        known = f"; it has {_some(there)}" if there else ""
        raise ExportError(f"{file}: has no class, function or network {name!r}{known}")
    try:
        network = made(**arguments)
    except Exception as error:
        given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        raise ExportError(f"{name}({given}) failed: {type(error).__name__}: {error}") from error
    if not isinstance(network, nn.Module):
        raise ExportError(f"{name} made a {type(network).__name__}; expected a torch.nn.Module")
    return network, isinstance(made, type)


def _may_be_network(value: Any) -> bool:
    """Whether a name of a user's module is worth suggesting: a network or a class of them, of the user's own."""
    if isinstance(value, type):
        return issubclass(value, nn.Module) and not value.__module__.startswith("torch")
    return isinstance(value, nn.Module)


def load_weights(network: nn.Module, path: Path, key: str = "", unsafe_pickle: bool = False) -> None:
    """Load a file of weights into a network; names must match exactly. Raises ExportError naming what does not fit.

    The file holds a state dict, a checkpoint with one under a usual key (or under `key`, with dots between keys within
    keys), TorchScript, or arrays in .npz by name. `unsafe_pickle`: it may be a pickled network, or hold other objects;
    reading it then runs whatever code it names.
    """
    state = _state_dict(_content(path, type(network) if unsafe_pickle else None), path, key)
    problems = _misfits(network.state_dict(), state)
    if problems:
        raise ExportError(f"{path}: does not fit {type(network).__name__}: {'; '.join(problems)}")
    network.load_state_dict(state)


def _content(path: Path, trusted_for: type[nn.Module] | None) -> Any:
    """What is in the file. `trusted_for`: unpickle all of it, for a network of that class."""
    try:
        if path.suffix.lower() == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return {name: torch.from_numpy(np.array(arrays[name])) for name in arrays.files}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchScript is on its way out, and its files are still about
            try:
                if trusted_for is not None:
                    return torch.load(path, "cpu", _pickle_for(trusted_for), weights_only=False)
                return torch.load(path, map_location="cpu", weights_only=True)
            except RuntimeError as error:
                if "TorchScript" not in str(error):
                    raise
                return torch.jit.load(str(path), map_location="cpu").state_dict()  # type: ignore[no-untyped-call]
    except OSError as error:
        raise ExportError(f"{path}: cannot be read: {error.strerror or error}") from error
    except pickle.UnpicklingError as error:
        more = "" if trusted_for else ". If you trust the file with running code, --unsafe-pickle reads all of it"
        raise ExportError(
            f"{path}: holds more than tensors, or is no file of weights; expected what "
            f"torch.save(network.state_dict(), ...) writes{more}"
        ) from error
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ExportError(f"{path}: is no file of weights: {reason[0]}") from error


def _pickle_for(kind: type[nn.Module]) -> Any:
    """The module pickle, which finds classes of a training script (`__main__`) in the module of `kind` instead."""

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            own = sys.modules.get(kind.__module__)
            if module == "__main__" and hasattr(own, name):
                return getattr(own, name)
            return super().find_class(module, name)

    made = types.ModuleType("pickle_for_a_network")
    made.__dict__.update(vars(pickle), Unpickler=Unpickler)
    return made


def _state_dict(content: Any, path: Path, key: str) -> dict[str, torch.Tensor]:
    content = _tensors_of(content)
    for part in key.split(".") if key else ():
        if not isinstance(content, Mapping) or part not in content:
            there = f"it has {_some([str(k) for k in content])}" if isinstance(content, Mapping) else "there is no key"
            raise ExportError(f"{path}: has no {part!r} of the key {key!r}; {there}")
        content = _tensors_of(content[part])
    if isinstance(content, Mapping) and not key:
        for usual in _NESTED:
            if isinstance(found := _tensors_of(content.get(usual)), Mapping):
                content = found
                break
    if not isinstance(content, Mapping) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        what = f"a {type(content).__name__}"
        if isinstance(content, Mapping):
            what += f" with {_some([str(k) for k in content])}"
        raise ExportError(
            f"{path}: holds {what}; expected a state dict, tensors by their names (--key says where, if it is within)"
        )
    state = {str(name): value for name, value in content.items()}
    for wrapper in _WRAPPERS:
        if state and all(name.startswith(wrapper) for name in state):
            state = {name.removeprefix(wrapper): value for name, value in state.items()}
    return state


def _tensors_of(content: Any) -> Any:
    """The state dict of a network; anything else as it is."""
    return content.state_dict() if isinstance(content, nn.Module) else content


def _misfits(wanted: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor]) -> list[str]:
    shapes = [
        f"{name} has shape {list(given[name].shape)}, expected {list(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in given and given[name].shape != tensor.shape
    ]
    kinds = (
        ("missing", [name for name in wanted if name not in given]),
        ("unexpected", [name for name in given if name not in wanted]),
        ("wrong shape", shapes),
    )
    return [f"{kind}: {_some(names)}" for kind, names in kinds if names]


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
