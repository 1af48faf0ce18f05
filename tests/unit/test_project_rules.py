"""Rules of the project that are no imports: what a file must have, what documents and metadata say."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.unit.package_imports import FILES, PACKAGE, ROOT, name_of

import forwardpass

LINES = 400
LONGER: dict[str, str] = {}  # files over the limit, as posix paths below server/forwardpass/, and why

POSITIONAL = 6  # parameters that a caller may pass without their names
MORE_POSITIONAL = {  # functions below server/forwardpass/ over the limit, and why
    "inference/request.py InferenceRequest.__init__": "one is made for every request; keywords would double its time",
    "inference/intake.py Intake._enqueue": "called for every request",
    "batching/request.py Request.__init__": "as its subclass, which has the same fields first",
    "export/fp16_tolerance.py _Gemm._run": "onnx's reference evaluator passes the operator's attributes so",
}

# `python FILE` puts the file's own folder first on the path, so a name taken there hides the standard library's too.
SCRIPTS = sorted(path for folder in ("models", "benchmarks", "proto") for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", [*FILES, *SCRIPTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_takes_a_name_of_the_standard_library(path: Path) -> None:
    taken = sys.stdlib_module_names & {path.stem, path.parent.name}
    assert not taken, f"{path.relative_to(ROOT)}: {taken} is a module of Python's own; pick another name"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_file_says_its_job_and_keeps_to_the_limit(path: Path) -> None:
    source = path.read_text("utf-8")
    if source:  # an empty __init__.py has no job
        assert ast.get_docstring(ast.parse(source)), f"{name_of(path)} opens without a docstring"
    lines = source.count("\n")
    key = path.relative_to(PACKAGE).as_posix()
    if key in LONGER:
        assert lines > LINES, f"{key} has {lines} lines again: take it off LONGER"
    else:
        assert lines <= LINES, f"{key} has {lines} lines, more than {LINES}: divide it, or say in LONGER why not"


def test_longer_files_exist() -> None:
    assert all((PACKAGE / key).is_file() and reason for key, reason in LONGER.items())


def positional_parameters(tree: ast.AST, owner: str = "") -> Iterator[tuple[str, int]]:
    """Every function in a syntax tree with its class, and how many parameters may be passed without their names."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            names = [a.arg for a in (*node.args.posonlyargs, *node.args.args) if a.arg not in ("self", "cls")]
            yield f"{owner}{node.name}", len(names)
        yield from positional_parameters(node, f"{node.name}." if isinstance(node, ast.ClassDef) else owner)


def test_no_caller_has_to_count_parameters() -> None:
    source = "class A:\n async def f(self, a, /, b, *, c): ...\ndef g(a, b=1, *rest, c=2, **more): ..."
    assert list(positional_parameters(ast.parse(source))) == [("A.f", 2), ("g", 2)]
    found = {
        f"{path.relative_to(PACKAGE).as_posix()} {name}": count
        for path in FILES
        for name, count in positional_parameters(ast.parse(path.read_text("utf-8")))
        if count > POSITIONAL
    }
    wrong = {name: count for name, count in found.items() if name not in MORE_POSITIONAL}
    assert not wrong, f"more than {POSITIONAL} positional parameters: group them, or put `*,` before some: {wrong}"
    assert MORE_POSITIONAL.keys() <= found.keys(), "within the limit again: take it off MORE_POSITIONAL"


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_no_machine_of_ours_shows_in_the_documents(name: str) -> None:
    text = (ROOT / name).read_text("utf-8")
    # A path below a home folder, or below the checkout that this runs in, is of use to nobody else.
    found = re.findall(r"(?<![\w.~-])/(?:home|root|Users|work)/\S*", text)
    assert not found and str(ROOT) not in text, f"{name} names paths of one machine: {found or ROOT}"


def test_the_metadata_tells_the_version_and_the_licence() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["version"] == forwardpass.__version__
    licence = (ROOT / "LICENSE").read_text("utf-8")
    assert project["license"] == "Apache-2.0"
    assert "Apache License" in licence and "Version 2.0, January 2004" in licence and "END OF TERMS" in licence


def test_the_base_install_has_neither_torch_nor_onnxruntime() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    base = {re.split(r"[^A-Za-z0-9._-]", requirement)[0].lower() for requirement in project["dependencies"]}
    assert base, "pyproject.toml lists no dependencies"
    assert not {name for name in base if name.startswith(("torch", "onnxruntime"))}
    # One build of ONNX Runtime each: installed together, the two overwrite each other's files.
    extras = project["optional-dependencies"]
    assert [r for r in extras["cpu"] if r.startswith("onnxruntime>")]
    assert [r for r in extras["gpu"] if r.startswith("onnxruntime-gpu[")]
    assert not [r for name, extra in extras.items() if name not in ("cpu", "gpu") for r in extra if "onnxruntime" in r]
