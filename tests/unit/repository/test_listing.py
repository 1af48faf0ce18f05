"""A look at the repository that fails takes no model away; what cannot be a model is named, with the reason."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.unit.repository.test_control import House

from forwardpass.errors import RepositoryUnreadable, SettingsError
from forwardpass.repository import control as control_module
from forwardpass.repository.listing import RepositoryListing
from forwardpass.repository.model_version import VersionState

NOBODY = 65534

Breaks = Callable[[Path], "contextlib.AbstractContextManager[None]"]


@contextlib.contextmanager
def no_descriptors(_folder: Path) -> Iterator[None]:
    """As with as many connections as the process may have: nothing can be opened."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.open("/dev/null", os.O_RDONLY)  # from here on none is free
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextlib.contextmanager
def unreadable(folder: Path) -> Iterator[None]:
    """Mode 0111, for somebody who is not root."""
    mode, user = folder.stat().st_mode, os.geteuid()
    folder.chmod(0o111)
    if user == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(user)
        folder.chmod(mode)


@contextlib.contextmanager
def unmounted(folder: Path) -> Iterator[None]:
    """An empty mount point is there in place of what was mounted on it."""
    folder.rename(folder.with_name("elsewhere"))
    folder.mkdir()
    yield
    folder.rmdir()
    folder.with_name("elsewhere").rename(folder)


@contextlib.contextmanager
def gone(folder: Path) -> Iterator[None]:
    folder.rename(folder.with_name("elsewhere"))
    yield
    folder.with_name("elsewhere").rename(folder)


@pytest.fixture
def house(monkeypatch: pytest.MonkeyPatch) -> Iterator[House]:
    """Two models, one with options, that somebody who is not root can reach."""
    monkeypatch.setattr(control_module, "SETTLE_SECONDS", 0.001)
    with tempfile.TemporaryDirectory() as root:
        Path(root).chmod(0o755)
        made = House(Path(root) / "models", "poll")
        made.put("plain")
        made.put("told")
        (made.root / "told" / "config.pbtxt").write_text("max_batch_size: 4")
        made.start().control.look()
        yield made
        made.control.close()
        assert made.repository.close(5.0)


@pytest.mark.parametrize("broken", [no_descriptors, unreadable, unmounted, gone])
def test_a_repository_that_cannot_be_read_loses_no_model(house: House, broken: Breaks) -> None:
    workers = [house.repository.resolve(name, "") for name in ("plain", "told")]
    with broken(house.root):
        for _ in range(2):
            with pytest.raises(RepositoryUnreadable, match=r"the repository .* cannot be read"):
                house.control.look()
    assert house.repository.listing.failures == 2
    house.control.look()
    assert [house.repository.resolve(name, "") for name in ("plain", "told")] == workers
    assert all(not e.reason and e.state is VersionState.READY for e in house.repository.entries())
    house.put("plain", 2)
    house.control.look()
    assert house.ask("plain")[0] == "2"  # and it goes on following what changes


@pytest.mark.parametrize("where", ["plain", "plain/1", "told"])
@pytest.mark.parametrize("broken", [unreadable, unmounted])
def test_a_model_that_cannot_be_read_stays(house: House, broken: Breaks, where: str) -> None:
    name = where.partition("/")[0]
    before = house.ask(name)
    with broken(house.root / where):
        house.control.look()
        assert house.ask(name) == before
        if where != "plain/1":  # a version's file is found in a folder that can't be listed
            (entry,) = [e for e in house.repository.entries() if e.name == name]
            assert entry.state is VersionState.READY and "serves as it was" in entry.reason
    house.control.look()
    assert house.ask(name) == before
    assert not [e.reason for e in house.repository.entries() if e.reason]


def test_a_listing_that_worked_unloads(house: House) -> None:
    shutil.rmtree(house.root / "plain")
    house.control.look()
    assert house.index() == {("told", "1"): "READY"}
    shutil.rmtree(house.root / "told")  # the last one: the folder is the same, and empty
    house.control.look()
    assert house.index() == {} and house.repository.listing.failures == 0


def test_a_load_that_failed_is_tried_again_though_nothing_changed(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With growing gaps: a model that will never load must not be loaded at every look."""
    tries = []
    reload = house.repository.reload

    def counting(model_folder: object) -> object:
        tries.append(model_folder)
        return reload(model_folder)  # type: ignore[arg-type]

    monkeypatch.setattr(house.repository, "reload", counting)
    path = house.put("late")
    (path / "model.onnx").write_bytes(b"no network")
    looks = []
    for look in range(16):
        house.control.look()
        if tries:
            looks.append(look)
            tries.clear()
    assert looks == [0, 1, 3, 7, 15]


def test_at_the_start_it_is_an_error(house: House) -> None:
    with no_descriptors(house.root), pytest.raises(SettingsError, match="cannot be read: Too many open files"):
        house.repository.discover()


def test_what_cannot_be_a_model_or_a_version_is_named(tmp_path: Path) -> None:
    for name in (
        "good/1/model.onnx", "good/007/model.onnx", "good/v2/model.onnx", "good/3/best.onnx", "good/5/.keep",
        "good/assets/labels.txt", "misnamed/1/best.onnx", "bare/model.toml", "notes/README", "flat/best.onnx",
        "lost+found/x", ".git/1/model.onnx",
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "good" / "4").mkdir()
    (tmp_path / "typo" / "1").mkdir(parents=True)
    (tmp_path / "typo" / "1" / "model.onnx").touch()
    (tmp_path / "typo" / "config.pbtxt").write_text('default_model_filename: "modle.onnx"')
    listing = RepositoryListing(tmp_path, "")
    # What looks like a model is one that fails, rather than nothing.
    assert sorted(listing.model_folders()) == ["flat", "good", "misnamed", "typo"]
    number = "expected a folder named by a whole number from 1 on, without zeros before it"
    none = "there is no version in it: expected NAME/VERSION/model.onnx"
    assert listing.skipped == {
        ("bare", ""): none,
        ("flat", "best.onnx"): "expected VERSION/model.onnx",
        ("good", "007"): number,
        ("good", "3"): "expected model.onnx in it, it has best.onnx",
        ("good", "4"): "expected model.onnx in it, it is empty",
        ("good", "5"): "expected model.onnx in it, it has .keep",
        ("good", "v2"): number,
        ("misnamed", "1"): "expected model.onnx in it, it has best.onnx",
        ("notes", ""): none,
        ("typo", "1"): "expected modle.onnx in it, it has model.onnx",
    }


def test_it_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "m" / "007").mkdir(parents=True)
    listing = RepositoryListing(tmp_path, "")
    for _ in range(3):
        listing.model_folders()
    shutil.rmtree(tmp_path)
    for _ in range(3):
        with pytest.raises(RepositoryUnreadable):
            listing.model_folders()
    said = [r.getMessage() for r in caplog.records]
    assert len(said) == 2 and said[0].startswith("m/007 is skipped: ") and said[1].endswith("models stay as they are")
    assert listing.failures == 3
