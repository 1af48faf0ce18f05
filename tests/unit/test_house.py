"""The rules of the house, held by reading the code: who may import whom, what a file must have, what the metadata says.

Imports are read from the syntax tree, so one inside a function or under TYPE_CHECKING counts like any other; then the
modules are really imported, in a fresh interpreter, and what came along is looked at.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest
from tests.unit.package_imports import FILES, PACKAGE, ROOT, imports_in, imports_of, loaded_by, name_of

import forwardpass

SERVING = PACKAGE / "serving"

# What serving/ is made of, in the order of a request's way, callees first. A module imports from rows above its own,
# never from its own row or below; beside those, from the leaves. `test_architecture` holds the order of the packages.
ORDER = (
    ("histogram", "log_limit", "addresses"),
    ("listeners",),
    ("interface", "auth", "gpu_metrics"),
    ("matrix", "wishes", "metrics"),
    ("contents", "shared_memory", "request_template"),
    ("wire",),
    ("replies",),
    ("threads", "onnx_runtime", "cuda_driver", "instance_thread", "buckets"),
    ("placement", "staging"),
    ("session",),
    ("cuda_network", "interruption"),
    ("cuda_session",),
    ("invariance", "text_lines", "external_data"),
    ("model_config",),
    ("pbtxt", "declared"),
    ("model_files",),
    ("model_statistics", "listing"),
    ("admission",),
    ("run_time", "knee", "request"),
    ("refusals", "deadline_planner", "request_head"),
    ("batch_queue", "warm_up", "batch_size", "instances", "lone"),
    ("runner",),
    ("worker",),
    ("loader",),
    ("full_config", "entries"),
    ("repository",),
    ("control",),
    ("health", "service"),
    ("intake",),
    ("reflection", "stream", "tls"),
    ("loop_door",),
    ("methods",),
    ("grpc_messages", "grpc_server", "idle_resets", "response_fields"),
    ("http2_send_side",),
    ("http2_connection", "direct_call"),
    ("client_socket",),
    ("sockets",),
    ("direct_front",),
    ("guards", "runtime_settings", "stop"),
    ("metrics_port", "state_dump"),
    ("lifecycle",),
)
RANK = {f"forwardpass.serving.{name}": rank for rank, row in enumerate(ORDER) for name in row}
LEAVES = {
    "forwardpass",
    "forwardpass.errors",
    "forwardpass.settings",
    "forwardpass.contract",
    "forwardpass.watched_files",
    *(name_of(path) for path in (PACKAGE / "protocol").glob("*.py")),
}

# What a server or a client may import beside the standard library: the base dependencies, by the names they are
# imported under, and what the extras `cpu` and `gpu` bring: onnxruntime and, for metrics of GPUs, pynvml. So neither
# torch nor anything of `train`.
ALLOWED = (
    "numpy",
    "google.protobuf",
    "grpc",
    "pydantic",
    "prometheus_client",
    "ngh2",
    "onnxruntime",
    "pynvml",
)

LINES = 400
LONGER: dict[str, str] = {}  # files over the limit, as posix paths below server/forwardpass/, and why

CLIENT = [PACKAGE / "client" / "__init__.py"]
# All that a server or a client is made of. Left out: the root and the command table, which load the exporter when it is
# asked for, and the demonstration, which compares with PyTorch.
SERVER_SIDE = [
    *sorted(SERVING.rglob("*.py")),
    *sorted((PACKAGE / "protocol").rglob("*.py")),
    *sorted((PACKAGE / "client").rglob("*.py")),
    *sorted(path for path in PACKAGE.glob("*.py") if path.stem not in ("__init__", "cli", "demo")),
]
# `python FILE` puts the file's own folder first on the path, so a name taken there hides the standard library's too.
SCRIPTS = sorted(path for folder in ("models", "benchmarks", "proto") for path in (ROOT / folder).rglob("*.py"))


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
    assert [module for _, module in sorted(imports_in(source, "forwardpass.serving"))] == [
        "a.b",
        "forwardpass.errors",
        "forwardpass.errors",
        "forwardpass.serving",
        "d",
        "e.f",
        "g",
        "h",
    ]


def test_nothing_in_serving_is_unknown_to_the_order() -> None:
    unknown = {name_of(path) for path in SERVING.rglob("*.py")} - RANK.keys() - {"forwardpass.serving"}
    assert not unknown, f"give {sorted(unknown)} a place in ORDER, above whatever imports it"


def test_imports_go_one_way() -> None:
    wrong = []
    for path in SERVING.rglob("*.py"):
        rank = RANK.get(name_of(path), -1)  # -1: the package's own __init__ imports none of its modules
        for where, module in imports_of(path):
            if module.partition(".")[0] != "forwardpass" or module in LEAVES:
                continue
            if module not in RANK or RANK[module] >= rank:
                wrong.append(f"{where} imports {module}")
    assert not wrong, "not above it in ORDER, and no leaf:\n" + "\n".join(wrong)


def test_leaves_import_only_leaves() -> None:
    wrong = [
        f"{where} imports {module}"
        for path in FILES
        if name_of(path) in LEAVES - {"forwardpass"}
        for where, module in imports_of(path)
        if module.partition(".")[0] == "forwardpass" and module not in LEAVES
    ]
    assert not wrong, "\n".join(wrong)


def test_server_and_client_import_only_what_the_base_install_has() -> None:
    wrong = []
    for path in SERVER_SIDE:
        for where, module in imports_of(path):
            top = module.partition(".")[0]
            if top in sys.stdlib_module_names or any(f"{module}.".startswith(f"{name}.") for name in ALLOWED):
                continue
            if top != "forwardpass" or module.startswith(
                ("forwardpass.export", "forwardpass.insight", "forwardpass.loadtest")
            ):
                wrong.append(f"{where} imports {module}")
    assert not wrong, "not in a serving install:\n" + "\n".join(wrong)


def _libraries(modules: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in modules}


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert not _libraries(loaded_by("import forwardpass")) & {"torch", "onnxruntime", "numpy", "grpc", "google"}


@pytest.mark.parametrize("path", CLIENT, ids=name_of)
def test_importing_the_client_loads_no_runtime(path: Path) -> None:
    assert not _libraries(loaded_by(f"import {name_of(path)}")) & {"torch", "onnx", "onnxruntime"}


def test_importing_all_of_serving_loads_no_torch() -> None:
    names = [name_of(path) for path in SERVING.rglob("*.py")]
    unwanted = {"torch", "onnx", "onnxscript", "sklearn", "mlxtend"}
    assert not _libraries(loaded_by(f"import {', '.join(names)}")) & unwanted


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
