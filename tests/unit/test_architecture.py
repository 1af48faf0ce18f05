"""The packages and the order among them: each imports those of lower layers only, and those with a rule less than that.

Read from the syntax tree, so an import inside a function or under TYPE_CHECKING counts like any other; then really
imported, in a fresh interpreter.
"""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.unit.package_imports import FILES, PACKAGE, ROOT, imports_of, loaded_by, name_of

# Packages and single modules of forwardpass/, callees first. A room imports from rows above its own, and from itself.
# What is in no row yet is above all of them: `test_house` has the order within `serving`.
LAYERS = (
    ("errors",),
    ("protocol", "watched_files"),
    ("client",),
)
# What these may import of forwardpass, where that is less than all below them.
ONLY = {
    "protocol": {"errors"},
    "client": {"errors", "protocol", "watched_files"},
}
# What these may import beside the standard library.
LIBRARIES = {
    "errors": (),
    "watched_files": (),
    "protocol": ("numpy", "google.protobuf"),
    "client": ("numpy", "google.protobuf", "grpc"),
}
RANK = {room: rank for rank, row in enumerate(LAYERS) for room in row}
PACKAGES = [room for room in RANK if (PACKAGE / room).is_dir()]


def room_of(module: str) -> str:
    """The package or module directly below forwardpass: forwardpass.protocol.wire is in protocol."""
    return module.partition(".")[2].partition(".")[0]


def files_of(room: str) -> list[Path]:
    return [path for path in FILES if room_of(name_of(path)) == room]


def imports(room: str) -> Iterator[tuple[str, str]]:
    for path in files_of(room):
        yield from imports_of(path)


def test_every_room_of_the_table_exists() -> None:
    assert [room for room in RANK if not files_of(room)] == []
    assert LIBRARIES.keys() == RANK.keys() and ONLY.keys() <= RANK.keys()
    assert all(RANK[below] < RANK[room] for room, allowed in ONLY.items() for below in allowed)


@pytest.mark.parametrize("room", RANK)
def test_imports_go_to_lower_layers(room: str) -> None:
    lower = {other for other in RANK if RANK[other] < RANK[room]}
    allowed = ONLY.get(room, lower) | {room}
    wrong = [
        f"{where} imports {module}"
        for where, module in imports(room)
        if module.partition(".")[0] == "forwardpass" and room_of(module) not in allowed
    ]
    assert not wrong, f"{room} may import {sorted(allowed)}:\n" + "\n".join(wrong)


@pytest.mark.parametrize("room", RANK)
def test_libraries_are_those_of_the_room(room: str) -> None:
    wrong = [
        f"{where} imports {module}"
        for where, module in imports(room)
        if module.partition(".")[0] not in sys.stdlib_module_names | {"forwardpass"}
        and not any(f"{module}.".startswith(f"{library}.") for library in LIBRARIES[room])
    ]
    assert not wrong, f"{room} may import {LIBRARIES[room]}:\n" + "\n".join(wrong)


@pytest.mark.parametrize("room", RANK)
def test_importing_a_room_loads_only_what_it_may_import(room: str) -> None:
    allowed = ONLY.get(room, {other for other in RANK if RANK[other] < RANK[room]}) | {room, ""}
    ours = {name for name in loaded_by(f"import forwardpass.{room}") if name.partition(".")[0] == "forwardpass"}
    assert f"forwardpass.{room}" in ours
    assert not {name for name in ours if room_of(name) not in allowed}


@pytest.mark.parametrize("room", RANK)
def test_no_private_name_crosses_a_file(room: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno} imports {alias.name}"
        for path in files_of(room)
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("forwardpass")
        for alias in node.names
        if alias.name.startswith("_")
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_says_what_it_is_for_and_names_what_is_public(package: str) -> None:
    module = importlib.import_module(f"forwardpass.{package}")
    assert module.__doc__ and "Imports " in module.__doc__ and "Public are " in module.__doc__
    assert module.__all__ and all(hasattr(module, name) for name in module.__all__)
