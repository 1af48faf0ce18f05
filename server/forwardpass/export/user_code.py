"""Finds what `FILE.py:NAME` or `package.module:NAME` names, by running the user's file as Python would."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any, NamedTuple

from forwardpass.errors import ExportError


class Named(NamedTuple):
    """What a target names. `value`: None where the module has no such name."""

    file: str
    name: str
    module: Any
    value: Any


def look_up(target: str) -> Named:
    """Run the file, or import the module. Raises ExportError."""
    file, colon, name = target.rpartition(":")
    if not colon or not file or not name.isidentifier():
        raise ExportError(
            f"{target!r}: expected FILE.py:NAME or package.module:NAME, the class of the network, a function that "
            "makes it, or the network itself"
        )
    module = _load(file)
    return Named(file, name, module, getattr(module, name, None))


def is_estimator(value: Any) -> bool:
    """Whether this is an estimator object of scikit-learn's kind, fitted or not."""
    return not isinstance(value, type) and hasattr(value, "fit") and hasattr(value, "predict")


def _load(file: str) -> Any:
    """Run a file or import a module, with the folder of both importable, and no arguments on the command line."""
    path = Path(file)
    sys.path.insert(0, str(Path.cwd()))
    arguments, sys.argv = sys.argv, [file]  # which a file that parses them at its top would take for its own
    try:
        if path.is_file():
            return _load_file(path)
        if not file.endswith(".py") and all(part.isidentifier() for part in file.split(".")):
            return importlib.import_module(file)
    except ExportError:
        raise
    except (Exception, SystemExit) as error:
        raise ExportError(f"{file}: failed as it was imported: {type(error).__name__}: {error}") from error
    finally:
        sys.argv = arguments
    raise ExportError(f"{file}: there is no such file")


def _load_file(path: Path) -> Any:
    """A file as a module of its own; as one of its package where it lies in one, so that relative imports work."""
    folder = path.resolve().parent
    name = path.stem
    while (folder / "__init__.py").is_file() and name.isidentifier():
        name, folder = f"{folder.name}.{name}", folder.parent
    sys.path.insert(0, str(path.resolve().parent))
    if "." in name:
        sys.path.insert(0, str(folder))
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(f"_exported_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ExportError(f"{path}: is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # dataclasses, for example, look up their module
    spec.loader.exec_module(module)
    return module
