"""Models on disk as a server sees them: found, loaded or refused with a reason, looked up without touching a path."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
from tests.service import models

from forwardpass.batching.admission import Admission
from forwardpass.errors import InvalidRequest, ModelLoading, ModelUnusable, SettingsError, UnknownModel
from forwardpass.execution.cpu_budget import CpuBudget
from forwardpass.repository import repository as repository_module
from forwardpass.repository.loader import LoadedModel, LoadRequest
from forwardpass.repository.model_version import ModelVersion, VersionState
from forwardpass.repository.repository import Repository
from forwardpass.settings import Settings


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Repository]:
    """A repository of `tmp_path`, of which nothing has been announced yet."""
    settings = Settings(repository=tmp_path, max_batch_size=16)
    made = Repository(settings, CpuBudget(2, "for a test"), Admission(100, 1 << 20))
    yield made
    assert made.close(5.0)


def load_all(repository: Repository) -> dict[str, ModelVersion]:
    return {e.name: repository.load(e) for e in repository.discover()}


def test_a_model_is_loading_until_it_is_loaded(opened: Repository, tmp_path: Path) -> None:
    models.save(tmp_path, "m", models.chain())
    changes = []
    opened.changed = lambda: changes.append([e.state for e in opened.entries()])
    (entry,) = opened.discover()
    assert (entry.name, entry.version, entry.state) == ("m", "1", VersionState.LOADING)
    for version in ("", "1"):
        with pytest.raises(ModelLoading, match="version 1 of model 'm' is still loading") as caught:
            opened.resolve("m", version)
        assert caught.value.retry_after is not None
    generation = opened.generation
    assert opened.load(entry).state is VersionState.READY
    assert opened.generation > generation
    worker = opened.resolve("m", "")
    assert worker is opened.resolve("m", "1") is opened.loaded("m", "").worker
    assert (worker.name, worker.version) == ("m", "1")
    assert changes == [[VersionState.LOADING], [VersionState.READY]]


@pytest.mark.parametrize(
    ("name", "version", "error", "words"),
    [
        ("", "", InvalidRequest, "names no model"),
        ("nobody", "", UnknownModel, "there is no model 'nobody'; served are m"),
        ("m", "2", UnknownModel, "model 'm' has no version '2'; it has 1"),
        ("m", "01", UnknownModel, "has no version '01'"),
        ("../m", "", UnknownModel, "'../m'"),
        ("m/1", "", UnknownModel, "'m/1'"),
        ("m\0\n", "", UnknownModel, "'m\\x00\\x0a'"),
        ("x" * 5000, "", UnknownModel, "xxx…'"),
    ],
)
def test_what_is_not_there_is_named(
    opened: Repository, tmp_path: Path, name: str, version: str, error: type[Exception], words: str
) -> None:
    models.save(tmp_path, "m", models.chain())
    load_all(opened)
    shutil.rmtree(tmp_path / "m")  # no path is looked at any more
    with pytest.raises(error) as caught:
        opened.resolve(name, version)
    assert words in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "content", [b"", b"junk" * 500, models.chain().SerializeToString()[:100]], ids=["empty", "corrupt", "truncated"]
)
def test_a_model_that_cannot_be_loaded_says_why_and_harms_no_other(
    opened: Repository, tmp_path: Path, content: bytes
) -> None:
    models.save(tmp_path, "good", models.chain())
    (models.save(tmp_path, "bad", models.chain()) / "model.onnx").write_bytes(content)
    entries = load_all(opened)
    assert (entries["good"].state, entries["bad"].state) == (VersionState.READY, VersionState.UNAVAILABLE)
    assert "model.onnx" in entries["bad"].reason and "\n" not in entries["bad"].reason
    with pytest.raises(ModelUnusable, match="version 1 of model 'bad' could not be loaded: "):
        opened.resolve("bad", "")
    assert opened.resolve("good", "").name == "good"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("max_batch_sizes = 8\n", "max_batch_sizes is not an option"),
        ("max_batch_size = -1\n", "max_batch_size"),
        ("max_batch_size = \n", "not TOML"),
        ('provider = "abacus"\n', "provider"),
        ('labels = "nowhere.txt"\n', "nowhere.txt"),
        ('labels = "binary.txt"\n', "binary.txt"),
    ],
)
def test_wrong_options_are_that_models_alone(opened: Repository, tmp_path: Path, options: str, words: str) -> None:
    models.save(tmp_path, "good", models.chain())
    models.save(tmp_path, "bad", models.chain(), options)
    (tmp_path / "bad" / "binary.txt").write_bytes(b"\xff\xfe\x00")
    entries = load_all(opened)
    assert (entries["good"].state, entries["bad"].state) == (VersionState.READY, VersionState.UNAVAILABLE)
    assert words in entries["bad"].reason


@pytest.mark.parametrize("change", ["a bit", "a byte more", "a file more", "no network", "no contract file"])
def test_tampered_files_are_refused(opened: Repository, tmp_path: Path, digits_repository: Path, change: str) -> None:
    shutil.copytree(digits_repository / "digits", tmp_path / "digits")
    folder = tmp_path / "digits" / "1"
    network = folder / "model.onnx"
    data = bytearray(network.read_bytes())
    match change:
        case "a bit":
            data[-10] ^= 1
            network.write_bytes(data)
        case "a byte more":
            network.write_bytes(data + b"\0")
        case "a file more":
            (folder / "extra.bin").write_bytes(b"")
        case "no network":
            network.rename(folder / "other.onnx")
            shutil.copy(folder / "other.onnx", network)
        case "no contract file":
            (folder / "contract.json").write_text("{}")
    entry = load_all(opened)["digits"]
    assert entry.state is VersionState.UNAVAILABLE and entry.reason
    if change.startswith("a b"):
        assert "model.onnx: was changed: sha256 is" in entry.reason


def test_the_trained_model_loads_with_its_contract(opened: Repository, tmp_path: Path, digits_repository: Path) -> None:
    shutil.copytree(digits_repository / "digits", tmp_path / "digits")
    entry = load_all(opened)["digits"]
    assert entry.loaded is not None and entry.loaded.contract is not None
    assert "the same bits" in entry.loaded.why and "contract of" in entry.loaded.why and "holds" in entry.loaded.why
    assert entry.loaded.worker.signature.outputs[0].labels == tuple("0123456789")


def test_only_the_latest_version_is_served(opened: Repository, tmp_path: Path) -> None:
    for version in (2, 10, 9):
        models.save(tmp_path, "m", models.chain(), version=version)
    assert [e.version for e in opened.discover()] == ["10"]


def test_folders_that_are_no_versions_are_left_alone(opened: Repository, tmp_path: Path) -> None:
    folder = models.save(tmp_path, "m", models.chain(), version=3)
    for name in ("0", "-1", "1.5", "v4", "٣", "latest", "9" * 30):
        shutil.copytree(folder, tmp_path / "m" / name)
    (tmp_path / "m" / "7").mkdir()  # empty: still being written
    (tmp_path / "README.md").write_text("not a model")
    (tmp_path / ".git").mkdir()
    (tmp_path / "_staging").mkdir()
    assert [(e.name, e.version) for e in opened.discover()] == [("m", "3")]


def test_a_repository_of_nothing_is_an_error(opened: Repository, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(SettingsError, match=r"no models in .*expected NAME/VERSION/model\.onnx"):
        opened.discover()


def test_one_models_own_folder_is_a_repository(tmp_path: Path) -> None:
    models.save(tmp_path, "mine", models.chain())
    made = Repository(Settings(repository=tmp_path / "mine", max_batch_size=8), CpuBudget(1, ""), Admission(10, 1000))
    assert load_all(made)["mine"].state is VersionState.READY
    assert made.close(5.0)


def test_what_nobody_foresaw_is_one_models_misfortune(
    opened: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    models.save(tmp_path, "bad", models.chain())
    models.save(tmp_path, "good", models.chain())
    really = repository_module.load

    def load(request: LoadRequest) -> LoadedModel:
        if request.name == "bad":
            raise KeyError("surprise")
        return really(request)

    monkeypatch.setattr(repository_module, "load", load)
    with caplog.at_level(logging.ERROR):
        entries = load_all(opened)
    assert entries["good"].state is VersionState.READY
    assert entries["bad"].reason == "internal error; the server's log has the details"
    assert "surprise" in caplog.text


def test_a_network_whose_answers_are_not_its_contracts_is_refused(
    opened: Repository, tmp_path: Path, digits_repository: Path
) -> None:
    shutil.copytree(digits_repository / "digits", tmp_path / "digits")
    path = tmp_path / "digits" / "1" / "contract.json"
    contract = json.loads(path.read_text())
    contract["samples"]["expected"]["logits"][0][0] += 0.5
    path.write_text(json.dumps(contract))
    entry = load_all(opened)["digits"]
    assert entry.state is VersionState.UNAVAILABLE
    assert "output 'logits' at [0, 0]: expected" in entry.reason


def test_workers_answer_through_the_repository(opened: Repository, tmp_path: Path) -> None:
    models.save(tmp_path, "m", models.chain())
    load_all(opened)
    (worker,) = opened.workers()
    x = np.ones((2, 4), np.float32)
    assert worker.session.run([x], (0,))[0].shape == (2, 3)


@pytest.mark.parametrize("failed", [{"2": "no memory there"}, {"": "its options cannot be read there"}])
def test_what_another_process_cannot_load_is_not_served_here(
    opened: Repository, tmp_path: Path, failed: dict[str, str]
) -> None:
    models.save(tmp_path, "m", models.chain())
    load_all(opened)
    worker = opened.resolve("m", "")
    models.save(tmp_path, "m", models.chain(seed=2), version=2)
    asked = []

    def agree(name: str, reasons: Mapping[str, str]) -> Mapping[str, str]:
        asked.append((name, dict(reasons)))
        return failed

    opened.agree = agree
    (entry,) = opened.reload(opened.model_folders()["m"])
    assert asked == [("m", {})]
    assert (entry.version, entry.loaded, entry.reason) == ("2", None, next(iter(failed.values())))
    assert opened.resolve("m", "") is worker
    opened.agree = lambda _name, _reasons: {}
    (entry,) = opened.reload(opened.model_folders()["m"])  # what was withdrawn is tried again
    assert entry.loaded is not None and opened.resolve("m", "").version == "2"


def test_what_cannot_be_loaded_here_is_what_other_processes_are_told(opened: Repository, tmp_path: Path) -> None:
    models.save(tmp_path, "m", models.chain())
    load_all(opened)
    asked: list[Mapping[str, str]] = []

    def agree(_name: str, reasons: Mapping[str, str]) -> Mapping[str, str]:
        asked.append(dict(reasons))
        return reasons

    opened.agree = agree
    folder = tmp_path / "m" / "2"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"nonsense")
    opened.reload(opened.model_folders()["m"])
    (tmp_path / "m" / "model.toml").write_text("nonsense = 1")
    opened.reload(opened.model_folders()["m"])
    assert "not an ONNX file" in asked[0]["2"]
    assert "nonsense" in asked[1][""]
    assert opened.resolve("m", "").version == "1"
