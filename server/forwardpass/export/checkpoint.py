"""Builds a user's network from `FILE.py:NAME`, its constructor's arguments, and a file of weights.

Runs the user's file, as Python would; the weights are read only as tensors (`weights_only`), never unpickled.
"""

from __future__ import annotations

import importlib.util
import pickle
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from forwardpass.errors import ExportError

# The keys under which common training loops store the state dict, and the prefixes that wrappers add to its names.
_NESTED = ("state_dict", "model_state_dict", "model")
_WRAPPERS = ("module.", "_orig_mod.")
_SHOWN = 4  # names of each kind shown in one error


def build(target: str, arguments: Mapping[str, Any]) -> tuple[nn.Module, bool]:
    """The network that `FILE.py:NAME` creates with these arguments, and whether NAME is a class.

    NAME is a module class, or a function that returns a module. Raises ExportError.
    """
    file, colon, name = target.rpartition(":")
    if not colon or not file or not name.isidentifier():
        raise ExportError(f"{target!r}: expected FILE.py:NAME, the class of the network or a function that makes it")
    path = Path(file)
    if not path.is_file():
        raise ExportError(f"{file}: there is no such file")
    made = getattr(_load(path), name, None)
    if not callable(made):
        raise ExportError(f"{file}: has no class or function {name!r}")
    try:
        network = made(**arguments)
    except Exception as error:
        given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        raise ExportError(f"{name}({given}) failed: {type(error).__name__}: {error}") from error
    if not isinstance(network, nn.Module):
        raise ExportError(f"{name} made a {type(network).__name__}; expected a torch.nn.Module")
    return network, isinstance(made, type)


def load_weights(network: nn.Module, path: Path) -> None:
    """Load a file of weights into a network; names must match exactly. Raises ExportError naming what does not fit.

    The file holds a state dict, or a checkpoint with one under `state_dict`, `model_state_dict` or `model`.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ExportError(f"{path}: cannot be read: {error.strerror or error}") from error
    except pickle.UnpicklingError as error:
        raise ExportError(
            f"{path}: holds more than tensors, or is no file of weights; expected what "
            "torch.save(network.state_dict(), ...) writes"
        ) from error
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ExportError(f"{path}: is no file of weights: {reason[0]}") from error
    state = _state_dict(content, path)
    problems = _misfits(network.state_dict(), state)
    if problems:
        raise ExportError(f"{path}: does not fit {type(network).__name__}: {'; '.join(problems)}")
    network.load_state_dict(state)


def _load(path: Path) -> Any:
    """Run a file as a separate module, with its folder importable, as with `python FILE`."""
    sys.path.insert(0, str(path.resolve().parent))
    spec = importlib.util.spec_from_file_location(f"_exported_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ExportError(f"{path}: is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # dataclasses, for example, look up their module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ExportError(f"{path}: failed as it was imported: {type(error).__name__}: {error}") from error
    return module


def _state_dict(content: Any, path: Path) -> dict[str, torch.Tensor]:
    if isinstance(content, Mapping):
        for key in _NESTED:
            if isinstance(content.get(key), Mapping):
                content = content[key]
                break
    if not isinstance(content, Mapping) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ExportError(f"{path}: holds a {type(content).__name__}; expected a state dict, tensors by their names")
    state = {str(name): value for name, value in content.items()}
    for wrapper in _WRAPPERS:
        if state and all(name.startswith(wrapper) for name in state):
            state = {name.removeprefix(wrapper): value for name, value in state.items()}
    return state


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
