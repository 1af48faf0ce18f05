"""The packages and the order among them: each imports those of lower layers only, and some less than that.

Read from the syntax tree, so an import inside a function or under TYPE_CHECKING counts like any other; then really
imported, in a fresh interpreter.
"""

from __future__ import annotations

import ast
import functools
import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.unit.package_imports import FILES, PACKAGE, ROOT, imports_in, imports_of, loaded_by, name_of

# Packages and single modules of forwardpass/, callees first. Each imports from rows above its own, and from itself.
LAYERS = (
    ("errors",),
    ("observability", "watched_files", "optional_imports", "settings_file"),
    ("protocol", "settings", "testing"),
    ("model", "batching", "security"),
    ("execution", "client", "transport"),
    ("inference", "console"),
    ("repository",),
    ("loadtest",),
    ("api", "insight", "flight"),
    ("status",),
    ("server", "export"),
    ("processes",),
    ("cli",),
    ("__main__",),
)
# What these may import of forwardpass, where that is less than all below them.
ONLY = {
    "protocol": {"errors"},
    "client": {"errors", "protocol", "watched_files"},
    "batching": {"errors", "protocol"},
}
# What these may import beside the standard library.
LIBRARIES = {
    "errors": (),
    "watched_files": (),
    "optional_imports": (),
    "settings_file": (),
    "testing": (),
    "batching": (),
    "observability": ("numpy", "prometheus_client", "pynvml", "opentelemetry"),
    "settings": ("pydantic",),
    "protocol": ("numpy", "google.protobuf", "orjson"),
    "model": ("numpy", "google.protobuf", "pydantic", "onnx"),
    "security": (),
    "execution": ("numpy", "onnxruntime"),
    "client": ("numpy", "google.protobuf", "grpc", "opentelemetry"),
    "transport": ("ngh2", "grpc", "starlette", "uvicorn", "httptools", "orjson"),
    "inference": ("numpy", "google.protobuf"),
    "console": ("numpy", "orjson"),
    "repository": ("numpy",),
    "loadtest": ("numpy", "prometheus_client"),
    "api": ("google.protobuf",),
    "insight": ("numpy", "torch"),
    "flight": ("numpy",),
    "status": ("numpy", "starlette"),
    "server": ("prometheus_client",),
    "processes": ("prometheus_client",),
    "export": ("numpy", "onnx", "torch", "pydantic", "skl2onnx", "onnxmltools", "lightgbm", "xgboost"),
    "cli": ("numpy", "rich", "shtab"),
    "__main__": (),
}
RANK = {package: rank for rank, row in enumerate(LAYERS) for package in row}
PACKAGES = [package for package in RANK if (PACKAGE / package).is_dir()]
LARGEST_SHARE = 0.2  # of all lines, that one package may have

# What a server or a client needs: none of these may load torch.
SERVING = (
    "client", "transport", "batching", "execution", "model", "inference", "repository", "api", "observability",
    "security", "server", "settings", "status", "processes",
)  # fmt: skip


OPTIONAL = ("onnx_graph", "otel_spans")  # modules of these that need an extra, and are imported when that is used
TRACED = {"forwardpass.observability.otel_spans", "forwardpass.client.tracing"}  # where opentelemetry is


@functools.cache
def parsed(path: Path) -> ast.Module:
    """A file's syntax tree, not to be changed."""
    return ast.parse(path.read_text("utf-8"))


@functools.cache
def imports_from(path: Path) -> list[ast.ImportFrom]:
    return [node for node in ast.walk(parsed(path)) if isinstance(node, ast.ImportFrom)]


def package_of(module: str) -> str:
    """The package or module directly below forwardpass: forwardpass.protocol.wire is in protocol."""
    return module.partition(".")[2].partition(".")[0]


def files_of(package: str) -> list[Path]:
    return [path for path in FILES if package_of(name_of(path)) == package]


def imports(package: str) -> Iterator[tuple[str, str]]:
    for path in files_of(package):
        yield from imports_of(path)


def libraries(modules: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in modules}


def test_the_reader_of_imports_sees_every_kind() -> None:
    # The tests below are only as good as this: each way to import, in the places where one could hide.
    source = """
import a.b as c
from forwardpass import errors
from ..errors import Status
from . import nothing_of_ours
def later():
    import d
    importlib.import_module("e.f")
    __import__("g")
if TYPE_CHECKING:
    from h import i
"""
    assert [module for _, module in sorted(imports_in(source, "forwardpass.api"))] == [
        "a.b",
        "forwardpass.errors",
        "forwardpass.errors",
        "forwardpass.api",
        "d",
        "e.f",
        "g",
        "h",
    ]


def test_every_package_has_its_place_in_the_layers() -> None:
    here = {package_of(name_of(path)) for path in FILES} - {""}
    assert here == RANK.keys() == LIBRARIES.keys()
    assert ONLY.keys() <= RANK.keys()
    assert all(RANK[below] < RANK[package] for package, allowed in ONLY.items() for below in allowed)


@pytest.mark.parametrize("package", RANK)
def test_imports_go_to_lower_layers(package: str) -> None:
    lower = {other for other in RANK if RANK[other] < RANK[package]}
    allowed = ONLY.get(package, lower) | {package, ""}
    wrong = [
        f"{where} imports {module}"
        for where, module in imports(package)
        if module.partition(".")[0] == "forwardpass" and package_of(module) not in allowed
    ]
    assert not wrong, f"{package} may import {sorted(allowed)}:\n" + "\n".join(wrong)


def test_the_root_imports_only_the_client() -> None:
    assert {package_of(module) for _, module in imports_of(PACKAGE / "__init__.py") if "forwardpass" in module} == {
        "client"
    }


@pytest.mark.parametrize("package", RANK)
def test_libraries_are_those_of_the_package(package: str) -> None:
    wrong = [
        f"{where} imports {module}"
        for where, module in imports(package)
        if module.partition(".")[0] not in sys.stdlib_module_names | {"forwardpass"}
        and not any(f"{module}.".startswith(f"{library}.") for library in LIBRARIES[package])
    ]
    assert not wrong, f"{package} may import {LIBRARIES[package]}:\n" + "\n".join(wrong)


@pytest.mark.parametrize("package", ["errors", "watched_files", "protocol", "client", "batching"])
def test_importing_a_package_loads_only_what_it_may_import(package: str) -> None:
    lower = {other for other in RANK if RANK[other] < RANK[package]}
    allowed = ONLY.get(package, lower) | {package, ""}
    statement = f"import {', '.join(sorted(name_of(path) for path in files_of(package)))}"
    ours = {name for name in loaded_by(statement) if name.partition(".")[0] == "forwardpass"}
    assert f"forwardpass.{package}" in ours
    assert not {name for name in ours if package_of(name) not in allowed}


def test_importing_the_root_loads_nothing_heavy() -> None:
    assert not libraries(loaded_by("import forwardpass")) & {"torch", "onnxruntime", "numpy", "grpc", "google"}


def test_opentelemetry_is_imported_in_two_files_and_loaded_on_demand() -> None:
    places = {name_of(path) for path in FILES for _, module in imports_of(path) if module.startswith("opentelemetry")}
    assert places == TRACED
    assert "opentelemetry" not in libraries(loaded_by("import forwardpass.client, forwardpass.server.server"))


def test_importing_the_client_loads_no_runtime() -> None:
    assert not libraries(loaded_by("import forwardpass.client")) & {"torch", "onnx", "onnxruntime"}


def test_importing_all_of_a_server_loads_no_torch() -> None:
    names = [name_of(path) for package in SERVING for path in files_of(package) if path.stem not in OPTIONAL]
    unwanted = {"torch", "onnx", "onnxscript", "sklearn", "mlxtend"}
    assert not libraries(loaded_by(f"import {', '.join(names)}")) & unwanted


@pytest.mark.parametrize("package", RANK)
def test_no_private_name_crosses_a_file(package: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno} imports {alias.name}"
        for path in files_of(package)
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("forwardpass")
        for alias in node.names
        if alias.name.startswith("_") and alias.name != "__version__"
    ]
    assert not wrong, "\n".join(wrong)


def test_no_package_holds_more_than_its_share() -> None:
    lines = {package: sum(path.read_text("utf-8").count("\n") for path in files_of(package)) for package in RANK}
    most = LARGEST_SHARE * sum(lines.values())
    assert not {package: count for package, count in lines.items() if count > most}


def test_tests_mirror_the_packages() -> None:
    folders = {
        path.parent.relative_to(ROOT / "tests/unit").parts[0] for path in (ROOT / "tests/unit").glob("*/**/test_*.py")
    }
    assert folders <= set(PACKAGES), "tests of a package are in the folder of its name"


def defined_in(path: Path) -> set[str]:
    """The names at a module's top: its own, and those it imports."""
    names: set[str] = set()
    for node in parsed(path).body:
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                names.add(name)
            case ast.Assign(targets=targets):
                names |= {n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)}
            case ast.AnnAssign(target=ast.Name(id=name)):
                names.add(name)
            case ast.ImportFrom(names=imported) | ast.Import(names=imported):
                names |= {alias.asname or alias.name for alias in imported}
            case ast.Try(body=body):
                names |= {alias.asname or alias.name for n in body if isinstance(n, ast.Import) for alias in n.names}
    return names


def listed(package: str) -> dict[str, set[str]]:
    """What a package's docstring names as public: `module` (Name, Name)."""
    doc = ast.get_docstring(parsed(PACKAGE / package / "__init__.py")) or ""
    _, _, text = " ".join(doc.split()).partition("Public are ")
    found = re.findall(r"`([\w.]+)`(?: \(([\w, ]+)\))?", text)
    return {module: set(re.findall(r"\w+", names)) for module, names in found}


def used_elsewhere(package: str) -> Iterator[tuple[str, str, str]]:
    """(where, module below the package, name or "") of what other packages import of it."""
    for path in FILES:
        if package_of(name_of(path)) in (package, ""):
            continue
        for node in imports_from(path):
            if f"{node.module}.".startswith(f"forwardpass.{package}."):
                module = str(node.module).removeprefix(f"forwardpass.{package}").lstrip(".")
                for alias in node.names:
                    below = ".".join(filter(None, (module, alias.name)))
                    file = (PACKAGE / package).joinpath(*below.split("."))
                    where = f"{path.relative_to(ROOT)}:{node.lineno}"
                    if file.with_suffix(".py").is_file():
                        yield where, below, ""
                    elif module:
                        yield where, module, alias.name


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_says_what_it_is_for_and_names_what_is_public(package: str) -> None:
    tree = parsed(PACKAGE / package / "__init__.py")
    doc = ast.get_docstring(tree) or ""
    assert "Imports " in doc or package == "export"
    if "__all__" in defined_in(PACKAGE / package / "__init__.py"):
        module = importlib.import_module(f"forwardpass.{package}")
        assert module.__all__ and all(hasattr(module, name) for name in module.__all__)
        return
    public = listed(package)
    for module, names in public.items():
        assert not names - defined_in((PACKAGE / package).joinpath(*module.split(".")).with_suffix(".py")), module
    wrong = [
        f"{where} imports {module} {name}"
        for where, module, name in used_elsewhere(package)
        if module not in public or (name and name not in public[module])
    ]
    assert not wrong, f"not named in {package}/__init__.py:\n" + "\n".join(wrong)


def test_class_names_are_unique() -> None:
    # A client's error has the name of the server's and is one of its kind, so that one `except` does for both.
    found: dict[str, list[str]] = {}
    for path in FILES:
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, []).append(name_of(path))
    both = ["forwardpass.client.errors", "forwardpass.errors"]
    assert not {name: where for name, where in found.items() if len(where) > 1 and sorted(where) != both}
