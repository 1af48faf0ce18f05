"""What the tests of tritonclient's gRPC and HTTP clients share: a repository, both kinds of client, and the tables.

A table of docs/compatibility.md has a row for each method and option. Tests say by `@backs` which rows they stand for,
and the two checks hold the table against the clients and against the tests, so that no row claims what nothing shows.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import models
import numpy as np
import onnxruntime
import pytest
from tritonclient.utils import triton_to_np_dtype

SECONDS = 60.0
DOCUMENT = Path(__file__).parents[2] / "docs" / "compatibility.md"
LABELS = ("low", "middle", "high")
MODELS = {"chain", "words", "hold", "two", *(f"echo_{name}" for name in models.ELEMENTS)}
X = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
ROW = re.compile(r"^\| `(?P<name>[^`]+)` \| (?P<sync>[^|]+) \| (?P<aio>[^|]+) \|", re.MULTILINE)

Test = Callable[..., None]


class Surface:
    """The table of one module's clients, and the tests that back it."""

    def __init__(self, table: str, module: Any, aio_module: Any) -> None:
        self._table, self._modules = table, (module, aio_module)
        self._backed: dict[str, list[str]] = {}  # row -> tests

    def backs(self, *rows: str) -> Callable[[Test], Test]:
        def note(test: Test) -> Test:
            for row in rows:
                self._backed.setdefault(row, []).append(test.__name__)
            return test

        return note

    def rows(self) -> dict[str, tuple[str, str]]:
        """A row's name, and what it says of the sync and of the asyncio client."""
        text = DOCUMENT.read_text("utf-8")
        start, end = f"<!-- table: {self._table} -->", f"<!-- end of table: {self._table} -->"
        table = text[text.index(start) : text.index(end)]
        return {m["name"]: (m["sync"].strip(), m["aio"].strip()) for m in ROW.finditer(table)}

    def check_methods(self) -> None:
        """That the table has every method of both clients, and no other as a client's own."""
        table = self.rows()
        theirs = [_methods(module) for module in self._modules]
        for place, own in enumerate(theirs):
            assert own <= set(table), f"not in the table: {sorted(own - set(table))}"
            for name in theirs[0] | theirs[1]:
                absent = table[name][place] == "-"
                assert absent is (name not in own), f"{name}: the table says {table[name]}"

    def check_options(self, *named: str) -> None:
        """That every option of both clients' `infer` that is not one of `named` is in a row `infer: …`."""
        words = {word for row in self.rows() if row.startswith("infer: ") for word in re.findall(r"\w+", row)}
        for module in self._modules:
            options = set(inspect.signature(module.InferenceServerClient.infer).parameters) - {"self", *named}
            assert options <= words, f"not in the table: {sorted(options - words)}"

    def check_backed(self) -> None:
        """That every row is backed by a test, and every test by a row."""
        rows = self.rows()
        assert set(rows) == set(self._backed)
        assert {word for said in rows.values() for word in said} <= {"works", "not applicable", "in part", "-"}


def _methods(module: Any) -> set[str]:
    members = inspect.getmembers(module.InferenceServerClient, inspect.isfunction)
    return {name for name, _ in members if not name.startswith("_")}


class AsyncioClient:
    """An asyncio client: each coroutine is run to its end on a loop of its own."""

    def __init__(self, module: Any, address: str, **options: Any) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()

        async def make() -> Any:
            return module.InferenceServerClient(address, **options)

        self.client = self.run(make())

    def run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(SECONDS)

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.client, name)
        return (lambda *a, **k: self.run(method(*a, **k))) if inspect.iscoroutinefunction(method) else method

    def close(self) -> None:
        self.run(self.client.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def save_models(folder: Path) -> Path:
    """A repository with `MODELS`."""
    models.save(folder, "chain", models.chain(), 'labels = "labels.txt"\nmax_batch_size = 16\npriority_levels = 2\n')
    (folder / "chain" / "labels.txt").write_text("\n".join(LABELS) + "\n")
    models.save(folder, "words", models.echo(models.STRING, ("batch", 1)))
    models.save(folder, "hold", models.hold(), "instances = 2\n")
    models.save(folder, "two", models.two_by_two())
    for name, element in models.ELEMENTS.items():
        models.save(folder, f"echo_{name}", models.echo(element))
    return folder


def elements(datatype: str) -> np.ndarray[Any, Any]:
    """Two rows for `echo_DATATYPE`, in the array that tritonclient wants for it."""
    kind = triton_to_np_dtype(datatype)
    if datatype == "BYTES":
        return np.array([["one", ""], ["drei ü", "4"]], dtype=object)
    if datatype in ("FP16", "BF16", "FP32", "FP64"):
        return np.array([[0.5, -1.75], [float("inf"), 96.0]], kind)
    return np.array([[0, 1], [1, 100]], kind)


def same(found: np.ndarray[Any, Any], given: np.ndarray[Any, Any]) -> bool:
    """Whether the elements are the same, where text may be bytes."""
    if given.dtype == object:
        found = np.array([text.decode() if isinstance(text, bytes) else text for text in found.ravel()], object)
    return bool(np.array_equal(found.reshape(given.shape), given))


def expected(repository: Path) -> np.ndarray[Any, Any]:
    """What `chain` makes of `X`."""
    session = onnxruntime.InferenceSession(str(repository / "chain" / "1" / "model.onnx"))
    found: np.ndarray[Any, Any] = session.run(None, {"x": X})[0]
    return found


def shared_memory_key() -> Iterator[str]:
    """The key of a file of shared memory that begins with `X`; skips the test where there is none."""
    if not Path("/dev/shm").is_dir():
        pytest.skip("there is no /dev/shm here")
    path = Path("/dev/shm", f"forwardpass-surface-{os.getpid()}")
    path.write_bytes(X.tobytes() + bytes(4096))
    yield "/" + path.name
    path.unlink()
