"""Models that come, change and go in a running repository: who serves when, who finishes what, and what is told."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.service import models
from tests.unit.made import Collector, message, read

from forwardpass import protocol
from forwardpass.batching.admission import Admission
from forwardpass.errors import (
    ControlRefused,
    InvalidRequest,
    ModelLoading,
    ModelUnusable,
    Overloaded,
    RequestError,
    SettingsError,
    UnknownModel,
)
from forwardpass.execution.cpu_budget import CpuBudget
from forwardpass.inference.intake import Intake
from forwardpass.observability.model_metrics import ModelMetrics
from forwardpass.repository import control as control_module
from forwardpass.repository import repository as repository_module
from forwardpass.repository.control import ModelControl
from forwardpass.repository.loader import LoadedModel, LoadRequest
from forwardpass.repository.model_folder import ModelFolder
from forwardpass.repository.model_version import ModelVersion, VersionState
from forwardpass.repository.repository import Repository
from forwardpass.settings import Settings

X = np.arange(8, dtype=np.float32).reshape(2, 4)


class House:
    """A repository on disk, what serves it, and a transport."""

    def __init__(self, root: Path, mode: str = "explicit", **more: Any) -> None:
        self.root = root
        root.mkdir(exist_ok=True)
        self.settings = Settings(repository=root, model_control=mode, **more)  # type: ignore[arg-type]
        self.admission = Admission(10_000, 1 << 30)
        self.repository = Repository(self.settings, CpuBudget(2, "for a test"), self.admission)
        self.control = ModelControl(self.repository, self.settings)
        self.sink = Collector()
        self.intake = Intake(self.sink, self.repository, self.admission, ModelMetrics("", ""), 1 << 20)

    def put(self, name: str, version: int = 1, seed: int | None = None) -> Path:
        folder = self.root / name / str(version)
        if folder.exists():
            shutil.rmtree(folder)
        return models.save(self.root, name, models.chain(seed=version if seed is None else seed), version=version)

    def start(self) -> House:
        for entry in self.repository.discover():
            self.repository.load(entry)
        return self

    def load(self, name: str, **parameters: str | bytes) -> None:
        kinds = {str: "string_param", bytes: "bytes_param"}
        given = {k: protocol.ModelRepositoryParameter(**{kinds[type(v)]: v}) for k, v in parameters.items()}
        asyncio.run(self.control.load(name, given))

    def files(self, name: str, config: str, files: dict[str, bytes]) -> None:
        self.load(name, config=config, **{f"file:{path}": data for path, data in files.items()})

    def unload(self, name: str) -> None:
        asyncio.run(self.control.unload(name))

    def index(self) -> dict[tuple[str, str], str]:
        return {(e.name, e.version): e.state.value for e in self.repository.entries()}

    def ask(self, name: str, version: str = "") -> tuple[str, bytes]:
        """The version that answers X, and its answer."""
        self.intake.begin()
        call = message([("x", X)], model_name=name, model_version=version).SerializeToString()
        request = self.intake.take(f"{name} {version}", call, None)
        self.intake.flush()
        while self.intake.run_pending():
            pass
        if request is None:
            (error,) = self.sink.answers.popitem()[1]
            assert isinstance(error, RequestError)
            raise error
        (answer,) = self.sink.wait([request])
        self.sink.answers.clear()
        assert isinstance(answer, bytes), answer
        response, (y,) = read(answer)
        return str(response.model_version), y.tobytes()


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    made = House(tmp_path / "models", load_model="*")
    yield made
    made.control.close()
    assert made.repository.close(5.0)
    assert made.admission.requests == 0


def specific(*versions: int) -> str:
    return json.dumps({"version_policy": {"specific": {"versions": list(versions)}}})


opened: list[str] | None = None  # files that were opened for reading, while a test counts them


def audit(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and opened is not None and str(arguments[1]).startswith("r"):
        opened.append(str(arguments[0]))


sys.addaudithook(audit)  # sees every opened file, whatever opens it; it cannot be removed


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], int]:
    """How often a file was opened for reading since it was last counted."""
    monkeypatch.setattr(sys.modules[__name__], "opened", [])

    def count(path: Path) -> int:
        assert opened is not None
        found = opened.count(str(path))
        opened.clear()
        return found

    return count


@pytest.mark.parametrize(
    ("file", "text"), [("model.toml", "max_batch_size = 4"), ("config.pbtxt", "max_batch_size: 4")]
)
def test_the_options_are_read_once_for_a_load(
    tmp_path: Path, file: str, text: str, reads: Callable[[Path], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control_module, "SETTLE_SECONDS", 0.0)
    house = House(tmp_path / "models", "poll")
    house.put("m")
    options = house.root / "m" / file
    options.write_text(text)
    house.start()
    assert house.index() == {("m", "1"): "READY"} and reads(options) == 1, "at start"
    assert house.repository.resolve("m", "").run_rows == 4
    house.control.look()
    assert reads(options) == 1, "at a poll without a change"
    options.write_text(text.replace("4", "8"))
    house.control.look()
    assert house.repository.resolve("m", "").run_rows == 8
    assert reads(options) == 2, "at a poll that finds a change, and again when nobody writes it any more"
    house.control.close()
    assert house.repository.close(5.0)


def test_the_options_are_read_once_for_a_load_by_request(house: House, reads: Callable[[Path], int]) -> None:
    house.put("m")
    options = house.root / "m" / "model.toml"
    options.write_text("max_batch_size = 4")
    house.start()
    reads(options)
    options.write_text("max_batch_size = 8")
    house.load("m")
    assert house.repository.resolve("m", "").run_rows == 8 and reads(options) == 1


def test_an_empty_version_asks_for_the_highest_that_serves(house: House) -> None:
    for version in (2, 10, 3):
        house.put("m", version)
    (house.root / "m" / "model.toml").write_text('versions = "all"')
    house.start()
    assert house.ask("m")[0] == "10" and house.ask("m", "3")[0] == "3"
    (house.root / "m" / "10" / "model.onnx").write_bytes(b"no network")
    shutil.rmtree(house.root / "m" / "3")
    with pytest.raises(ModelUnusable, match=r"version 10: serves as it was; .* is not an ONNX file"):
        house.load("m")
    # Nothing was taken away: 10 serves as it was loaded, and 3 since not all of the rest could be loaded.
    assert house.index() == {("m", "2"): "READY", ("m", "3"): "READY", ("m", "10"): "READY"}
    house.put("m", 10, seed=4)
    house.load("m")
    assert house.index() == {("m", "2"): "READY", ("m", "10"): "READY"}
    with pytest.raises(UnknownModel, match="has no version '3'; it has 2, 10"):
        house.ask("m", "3")


def test_a_new_version_that_fails_leaves_the_old_one_to_answer(house: House) -> None:
    house.put("m")
    before = house.start().ask("m")
    house.put("m", 2)
    (house.root / "m" / "2" / "model.onnx").write_bytes(b"")
    with pytest.raises(ModelUnusable, match=r"model 'm' version 2: model\.onnx is empty"):
        house.load("m")
    assert house.index() == {("m", "1"): "READY", ("m", "2"): "UNAVAILABLE"}
    assert house.ask("m") == before
    with pytest.raises(ModelUnusable, match=r"version 2 of model 'm' could not be loaded: model\.onnx is empty"):
        house.ask("m", "2")


def test_what_was_not_changed_is_left_alone(house: House) -> None:
    house.put("m", 1)
    house.put("m", 2)
    (house.root / "m" / "model.toml").write_text('versions = "all"')
    house.start()
    first, second = (house.repository.resolve("m", v) for v in "12")
    house.put("m", 2, seed=9)
    house.load("m")
    assert house.repository.resolve("m", "1") is first
    assert house.repository.resolve("m", "2") is not second
    house.load("m")
    (house.root / "m" / "model.toml").write_text('versions = "all"\nmax_batch_size = 3')
    house.load("m")
    assert house.repository.resolve("m", "1") is not first


def test_a_request_that_was_decoded_before_a_swap_is_answered_by_the_version_it_was_decoded_for(house: House) -> None:
    """However long a transport takes between finding a version and submitting to it."""
    for version in (1, 2):
        house.put("m", version)
    house.start()
    answers = {}
    for version in (1, 2):
        house.load("m", config=specific(version))
        answers[str(version)] = house.ask("m")
    house.load("m", config=specific(1))
    intake, call = house.intake, message([("x", X)]).SerializeToString()
    intake.begin()
    held = [intake.take(i, call, None) for i in range(3)]
    old = house.repository.resolve("m", "1")
    house.load("m", config=specific(2))  # returns when version 1 has nothing left, as far as it can know
    assert house.repository.resolve("m", "") is not old
    intake.flush()
    while intake.run_pending():
        pass
    for answer in house.sink.wait([r for r in held if r is not None]):
        assert isinstance(answer, bytes)
        response, (y,) = read(answer)
        assert (response.model_version, y.tobytes()) == answers["1"]
    house.sink.answers.clear()
    assert house.ask("m") == answers["2"]


def test_what_waits_is_answered_before_a_version_goes(house: House) -> None:
    models.save(house.root, "slow", models.hold())
    house.start()
    worker = house.repository.resolve("slow", "")
    x = np.array([[2e6]], np.float32)  # about a second
    intake = house.intake
    intake.begin()
    first = intake.take("a", message([("x", x)], model_name="slow").SerializeToString(), None)
    intake.flush()
    runner = threading.Thread(target=lambda: [None for _ in iter(intake.run_pending, False)])
    runner.start()
    while not worker.queue.running_requests and "a" not in house.sink.answers:
        time.sleep(0.001)
    house.unload("slow")
    runner.join()
    assert first is not None
    (answer,) = house.sink.wait([first])
    assert isinstance(answer, bytes)
    with pytest.raises(UnknownModel, match="version 1 of model 'slow' is not loaded"):
        house.ask("slow")


def test_counters_go_on_over_a_reload(house: House) -> None:
    house.put("m")
    house.start()
    for seed in (1, 2, 3):
        house.put("m", 1, seed)
        house.load("m")
        house.ask("m")
    assert house.repository.loaded("m", "").worker.metrics.counts().answered == 3


def test_only_what_is_asked_for_is_loaded_at_the_start(tmp_path: Path) -> None:
    house = House(tmp_path / "models", load_model="a, c")
    for name in "abc":
        house.put(name)
    house.start()
    assert house.index() == {("a", "1"): "READY", ("b", ""): "UNAVAILABLE", ("c", "1"): "READY"}
    with pytest.raises(UnknownModel, match="model 'b' is not loaded"):
        house.ask("b")
    house.load("b")
    assert house.ask("b")[0] == "1"
    house.put("d")
    asyncio.run(house.control.refresh())
    assert house.index()["d", ""] == "UNAVAILABLE"
    shutil.rmtree(house.root / "d")
    asyncio.run(house.control.refresh())
    assert ("d", "") not in house.index()
    house.repository.close(5.0)
    with pytest.raises(SettingsError, match="load_model: there is no model 'z'"):
        House(house.root, load_model=("a", "z")).repository.discover()
    assert House(tmp_path / "empty").repository.discover() == []  # models may come later
    with pytest.raises(SettingsError, match="no models in"):
        House(tmp_path / "empty", "none").repository.discover()


@pytest.mark.parametrize("mode", ["none", "poll"])
def test_without_explicit_control_requests_change_nothing(tmp_path: Path, mode: str) -> None:
    house = House(tmp_path / "models", mode)
    house.put("m")
    house.start()
    for change in (house.load, house.unload):
        with pytest.raises(ControlRefused, match=f"--model-control explicit; this server has {mode}"):
            change("m")
    assert house.index() == {("m", "1"): "READY"}
    house.repository.close(5.0)


def test_files_in_a_request_are_a_model_of_their_own(house: House, tmp_path: Path) -> None:
    network = models.chain(seed=5).SerializeToString()
    house.put("m")
    on_disk = house.start().ask("m")
    house.files("m", '{"max_batch_size": 4}', {"3/model.onnx": network})
    assert house.ask("m")[0] == "3" and house.ask("m")[1] != on_disk[1]
    sent = house.repository.loaded("m", "")
    assert sent.max_batch_size == 4
    house.files("new", "{}", {"1/model.onnx": network})
    assert house.ask("new")[1] == house.ask("m", "3")[1]
    with pytest.raises(ModelUnusable, match="new' version 1: serves as it was"):
        house.files("new", "{}", {"1/model.onnx": b"nothing"})
    assert house.ask("new")[1] == house.ask("m")[1]
    house.load("m")  # what is on disk again
    assert house.ask("m") == on_disk
    with pytest.raises(UnknownModel, match="there is no model 'new' in the repository; it has m"):
        house.load("new")
    house.unload("new")
    assert house.index()["new", "1"] == "UNAVAILABLE"
    assert not house.control._sent


@pytest.mark.parametrize(
    ("name", "config", "files", "reason"),
    [
        ("", "{}", {}, "names no model"),
        ("m", "{", {}, "config: not a ModelConfig as JSON"),
        ("m", '{"sequence_batching": {}}', {}, "config: sequence_batching is not supported"),
        ("m", '{"name": "x"}', {}, "config: name: expected 'm'"),
        ("m", "{}", {"../x/model.onnx": b""}, "expected VERSION/NAME"),
        ("m", "{}", {"/etc/passwd": b""}, "expected VERSION/NAME"),
        ("m", "{}", {"1/\0": b""}, "expected VERSION/NAME"),
        ("m", "{}", {"": b""}, "expected VERSION/NAME"),
        ("../m", "{}", {"1/model.onnx": b""}, "expected one that a folder could have"),
        ("x\n", "{}", {"1/model.onnx": b""}, "expected one that a folder could have"),
        ("x" * 5000, "{}", {"1/model.onnx": b""}, "expected one that a folder could have"),
    ],
)
def test_bad_parameters_are_told(
    house: House, name: str, config: str, files: dict[str, bytes], reason: str, tmp_path: Path
) -> None:
    house.put("m")
    before = house.start().ask("m")
    with pytest.raises(InvalidRequest) as caught:
        house.files(name, config, files)
    assert reason in str(caught.value) and str(caught.value).isprintable()
    assert house.ask("m") == before and house.index() == {("m", "1"): "READY"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["models"]


def test_parameters_that_are_not_known_are_told(house: House) -> None:
    house.put("m")
    house.start()
    for parameter in ({"conf": "{}"}, {"config": b"{}"}, {"file:1/model.onnx": "text"}):
        with pytest.raises(InvalidRequest, match="expected 'config' as a string or 'file:VERSION/NAME' as bytes"):
            house.load("m", **parameter)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="'config': expected it with files"):
        house.load("m", **{"file:1/model.onnx": b""})


@pytest.mark.parametrize(
    "paths",
    [
        ["1/" + "a/" * 2000 + "model.onnx"],
        ["1/" + "a/" * 16 + "model.onnx"],
        ["1/" + "a" * 256],
        ["1/" + "é" * 200],
        ["1/" + "/".join(["a" * 200] * 8)],
        ["1/model.onnx", "1/model.onnx/weights"],
    ],
    ids=["2,000 folders", "17 folders", "a long name", "a name of many bytes", "a long path", "a file as a folder"],
)
def test_paths_that_no_folder_could_have_are_refused(house: House, tmp_path: Path, paths: list[str]) -> None:
    house.put("m")
    house.start()
    with pytest.raises(InvalidRequest, match="expected") as caught:
        house.files("m", "{}", {"1/good.onnx": b"", **dict.fromkeys(paths, b"")})
    assert str(caught.value).isprintable() and len(str(caught.value)) < 300
    assert sorted(p.name for p in tmp_path.iterdir()) == ["models"]


@pytest.mark.parametrize("shape", [(1 << 40, 1 << 40), ("batch", 1 << 62), (1 << 62,)], ids=str)
def test_a_network_of_sizes_out_of_range_is_refused_by_name(house: House, shape: tuple[int | str, ...]) -> None:
    """Before anything of that size is made."""
    house.start()
    network = models.echo(models.FLOAT, shape).SerializeToString()
    with pytest.raises(ModelUnusable, match=r"'x': the sizes of \[.*\] are out of range"):
        house.files("new", "{}", {"1/model.onnx": network})


def test_a_network_that_finds_no_memory_says_so(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object) -> None:
        raise MemoryError("Unable to allocate 8.00 TiB")

    house.put("m")
    house.start()
    monkeypatch.setattr(repository_module, "load", load)
    with pytest.raises(ModelUnusable, match="it takes more memory than there is: Unable"):
        house.files("new", "{}", {"1/model.onnx": models.echo().SerializeToString()})


@pytest.mark.parametrize("name", ["nothing", "../models/m", "m/1", "m\0", "x" * 10_000])
def test_no_path_is_made_from_a_name(house: House, name: str) -> None:
    house.put("m")
    house.start()
    for change in (house.load, house.unload):
        with pytest.raises(UnknownModel, match="there is no model") as caught:
            change(name)
        assert str(caught.value).isprintable() and len(str(caught.value)) < 200


def test_changes_wait_for_each_other_up_to_a_bound(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    house.put("m")
    house.start()
    monkeypatch.setattr(control_module, "MOST_WAITING", 3)

    async def several() -> list[BaseException | None]:
        changes = [house.control.load("m", {}) for _ in range(5)]
        return await asyncio.gather(*changes, return_exceptions=True)

    found = asyncio.run(several())
    assert [type(f) for f in found] == [type(None)] * 3 + [Overloaded] * 2
    house.load("m")


def test_looking_follows_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_module, "SETTLE_SECONDS", 0.01)
    house = House(tmp_path / "models", "poll")
    house.put("m")
    first = house.start().ask("m")
    worker = house.repository.resolve("m", "")
    house.control.look()
    house.control.look()
    assert house.repository.resolve("m", "") is worker  # nothing was changed
    house.put("m", 2)
    house.put("other")
    house.control.look()
    assert house.index() == {("m", "2"): "READY", ("other", "1"): "READY"}
    assert house.ask("m")[0] == "2"
    (house.root / "m" / "config.pbtxt").write_text("max_batch_size: 4\nresponse_cache { enable: true }")
    house.control.look()
    ((entry,), _) = [[e for e in house.repository.entries() if e.name == n] for n in ("m", "other")]
    assert (
        entry.state is VersionState.READY and "config.pbtxt:2: response_cache.enable is not supported" in entry.reason
    )
    shutil.rmtree(house.root / "m" / "2")
    (house.root / "m" / "config.pbtxt").unlink()
    house.control.look()
    assert house.ask("m") == first
    shutil.rmtree(house.root / "other")
    house.control.look()
    assert house.index() == {("m", "1"): "READY"}
    with pytest.raises(UnknownModel, match="there is no model 'other'"):
        house.ask("other")
    house.repository.close(5.0)


def test_a_file_that_is_still_being_written_is_left_for_the_next_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = House(tmp_path / "models", "poll")
    house.put("m")
    house.start()
    house.control.look()
    worker = house.repository.resolve("m", "")
    path = house.put("m", 1, seed=8) / "model.onnx"
    whole = path.read_bytes()
    path.write_bytes(whole[:100])

    def meanwhile(_seconds: float) -> None:
        if path.stat().st_size < len(whole):
            path.write_bytes(whole)

    monkeypatch.setattr(house.repository.interruption, "wait", meanwhile)
    house.control.look()
    assert house.repository.resolve("m", "") is worker
    assert all(not e.reason for e in house.repository.entries())
    house.control.look()
    assert house.repository.resolve("m", "") is not worker
    house.repository.close(5.0)


def test_polling_goes_on_whatever_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    house = House(tmp_path / "models", "poll", poll_seconds=0.01)
    looks = 0

    def look() -> None:
        nonlocal looks
        looks += 1
        raise (SettingsError("gone"), RuntimeError("unforeseen"), ModelLoading("busy"))[looks % 3]

    monkeypatch.setattr(house.control, "look", look)

    async def poll() -> None:
        task = asyncio.create_task(house.control.poll())
        while looks < 7:
            await asyncio.sleep(0.01)
        task.cancel()

    asyncio.run(poll())


def test_whoever_watches_is_told_of_every_change(house: House) -> None:
    house.put("m")
    seen: list[dict[tuple[str, str], str]] = []
    house.repository.changed = lambda: seen.append(house.index())
    house.start()
    house.unload("m")
    states = [state for index in seen for state in index.values()]
    assert states == ["LOADING", "READY", "UNLOADING", "UNAVAILABLE"]


def test_what_nobody_foresaw_is_one_models_misfortune(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    house.put("m")
    before = house.start().ask("m")
    house.put("m", 1, seed=3)

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr("forwardpass.repository.repository.load", fail)
    with pytest.raises(ModelUnusable, match="internal error; the server's log has the details"):
        house.load("m")
    assert house.ask("m") == before
    entry = ModelVersion(
        "n", "1", house.root / "m" / "1", VersionState.LOADING, model_folder=ModelFolder("n", house.root / "m")
    )
    assert house.repository.load(entry).state is VersionState.UNAVAILABLE


class HeldLoads:
    """The real `load`, which waits for `go` where the model is named slow."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go, self.began = threading.Event(), threading.Event()
        load = repository_module.load

        def held(request: LoadRequest) -> LoadedModel:
            if request.name == "slow":
                self.began.set()
                assert self.go.wait(30)
            return load(request)

        monkeypatch.setattr(repository_module, "load", held)


def test_a_slow_load_holds_up_no_other_model(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("slow", "a", "b", "c"):
        house.put(name)
    held = HeldLoads(monkeypatch)

    async def change() -> None:
        slow = asyncio.ensure_future(house.control.load("slow", {}))
        assert await asyncio.to_thread(held.began.wait, 30)
        await asyncio.gather(*(house.control.load(name, {}) for name in ("a", "b", "c")))
        await house.control.unload("a")
        await house.control.load("b", {})
        assert not slow.done()
        held.go.set()
        await slow

    asyncio.run(change())
    assert house.index() == {("a", "1"): "UNAVAILABLE"} | {(n, "1"): "READY" for n in ("b", "c", "slow")}
    house.repository.close(5.0)


def test_at_the_start_a_slow_load_holds_up_no_other_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    house = House(tmp_path / "models", "none")
    for name in ("a", "slow", "z"):
        house.put(name)
    held = HeldLoads(monkeypatch)

    async def start() -> None:
        loads = {entry.name: house.control.start(entry) for entry in house.repository.discover()}
        slow = asyncio.ensure_future(loads.pop("slow"))
        await asyncio.gather(*loads.values())
        assert not slow.done()
        held.go.set()
        await slow

    asyncio.run(start())
    assert set(house.index().values()) == {"READY"}
    house.repository.close(5.0)


def test_a_look_loads_what_is_new_beside_what_is_slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    house = House(tmp_path / "models", "poll")
    held = HeldLoads(monkeypatch)
    for name in ("slow", "new"):
        house.put(name)
    look = threading.Thread(target=house.control.look)
    look.start()
    assert held.began.wait(30)
    while house.index().get(("new", "1")) != "READY":
        time.sleep(0.001)
    assert look.is_alive()
    held.go.set()
    look.join(30)
    assert set(house.index().values()) == {"READY"}
    house.repository.close(5.0)


def test_changes_of_one_model_take_turns(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    house.put("slow")
    held = HeldLoads(monkeypatch)

    async def change() -> None:
        load = asyncio.ensure_future(house.control.load("slow", {}))
        assert await asyncio.to_thread(held.began.wait, 30)
        unload = asyncio.ensure_future(house.control.unload("slow"))
        await asyncio.sleep(0.05)
        assert not unload.done()
        held.go.set()
        await asyncio.gather(load, unload)

    asyncio.run(change())
    assert house.index() == {("slow", "1"): "UNAVAILABLE"}
    house.repository.close(5.0)


def test_all_loads_end_when_the_server_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    house = House(tmp_path / "models", "none")
    for i in range(30):
        house.put(f"m{i}", seed=i)
    held = HeldLoads(monkeypatch)
    house.put("slow")

    async def start() -> list[object]:
        loads = [asyncio.ensure_future(house.control.start(entry)) for entry in house.repository.discover()]
        assert await asyncio.to_thread(held.began.wait, 30)
        house.control.close()
        held.go.set()
        return await asyncio.gather(*loads, return_exceptions=True)

    ended = asyncio.run(start())
    assert len(ended) == 31
    assert house.control.close(30.0)
    assert ("slow", "1") in house.index() and house.index()["slow", "1"] != "READY"
