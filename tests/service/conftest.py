"""Whole servers for the tests here: `forwardpass serve` in a process of its own, on free ports of 127.0.0.1.

Lets the tests import `models`, which lies beside them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from forwardpass.testing.server_process import ServerProcess

sys.path.append(str(Path(__file__).parent))

Serve = Callable[..., ServerProcess]

# What is asked of both transports in every run of the tests; of the rest, the half behind the grpcio transport, which
# users choose, is for `make test-slow`: it is a fifth of the time.
BOTH = {"test_infer", "test_stream", "test_faults", "test_transports", "test_health"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent not in item.path.parents or item.path.stem in BOTH:
            continue
        parameters = getattr(item, "callspec", None)
        if parameters is not None and "grpcio" in parameters.params.values():
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="module", autouse=True)
def patient_servers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Runs that the tests mean to be long are no longer ended on a busy machine, unless a test asks for that; what
    servers leave of themselves goes to pytest's folder; and batch sizes are not measured, which takes most of a start,
    unless a module says that it is about that: MEASURES."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FORWARDPASS_RUN_TIMEOUT", "600")
        patch.setenv("FORWARDPASS_FLIGHT_FOLDER", str(tmp_path_factory.mktemp("flight")))
        if not getattr(request.module, "MEASURES", False):
            patch.setenv("FORWARDPASS_MAX_BATCH_SIZE", "64")
        yield


@pytest.fixture
def serve() -> Iterator[Serve]:
    """`serve(repository, *options)`: a server of the test's own, ready. It is stopped when the test ends."""
    with ExitStack() as stack:
        yield lambda repository, *options: stack.enter_context(ServerProcess(repository, *options))


@pytest.fixture(scope="module", params=["direct", "grpcio"])
def server(request: pytest.FixtureRequest, digits_repository: Path) -> Iterator[ServerProcess]:
    """A server of `digits`, once behind each transport, shared by the tests of one module: leave it as it was."""
    with ServerProcess(digits_repository, "--transport", request.param) as running:
        yield running
        assert running.stop() == 0, running.tail()
