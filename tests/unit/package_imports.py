"""What the package's files import, read from the syntax tree: for the tests that hold its order."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "server" / "forwardpass"
FILES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    """A file of the package by its module's name: …/inference/decoder.py is forwardpass.inference.decoder."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _is_ours(module: str) -> bool:
    path = PACKAGE.parent.joinpath(*module.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def imports_in(source: str, package: str) -> Iterator[tuple[int, str]]:
    """(line, module) of every import in a file of `package`; in `from p import m`, m itself where it is our module."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                above = package.split(".")[: len(package.split(".")) - level + 1] if level else []
                base = ".".join([*above, *([module] if module else [])])
                for alias in names:
                    below = f"{base}.{alias.name}"
                    yield node.lineno, below if _is_ours(below) else base
            case ast.Call(
                func=ast.Attribute(attr="import_module") | ast.Name(id="import_module" | "__import__"),
                args=[ast.Constant(value=str(named)), *_],
            ):
                yield node.lineno, named


def imports_of(path: Path) -> Iterator[tuple[str, str]]:
    """(`file:line`, module) of every import in a file of the package."""
    name = name_of(path)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for line, module in imports_in(path.read_text("utf-8"), package):
        yield f"{path.relative_to(ROOT)}:{line}", module


def loaded_by(statement: str) -> set[str]:
    """The modules in memory after `statement`, in an interpreter of its own."""
    report = f"{statement}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", report], check=True, capture_output=True, text=True, timeout=60)
    return set(done.stdout.split())
