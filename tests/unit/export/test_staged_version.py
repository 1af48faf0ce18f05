"""All or nothing: a version appears complete or not at all, whoever is killed, races or runs out of disk."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from forwardpass.errors import ExportError
from forwardpass.export.staged_version import PREFIX, StagedVersion, versions
from forwardpass.model.contract import CONTRACT_FILE, Contract

PROCESS = Path(__file__).with_name("staging_process.py")


def write_marker(folder: Path, number: int) -> None:
    (folder / "number").write_text(str(number))


def start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, PROCESS, *map(str, arguments)], stdout=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> str:
    try:
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0
    return output


def test_a_version_is_there_only_once_it_is_published(tmp_path: Path) -> None:
    with StagedVersion(tmp_path / "deep" / "repository", "m") as staging:
        staging.write("model.onnx", b"network")
        assert versions(tmp_path / "deep" / "repository" / "m") == []
        place = staging.publish(write_marker)
        assert sorted(path.name for path in place.iterdir()) == ["model.onnx", "number"]
    assert place == tmp_path / "deep" / "repository" / "m" / "1"
    assert [path.name for path in place.parent.iterdir()] == ["1"]


def test_the_next_free_number_is_above_the_highest(tmp_path: Path) -> None:
    for name in ("2", "7", "007", "x", ".hidden"):
        (tmp_path / "m" / name).mkdir(parents=True)
    with StagedVersion(tmp_path, "m") as staging:
        assert staging.publish(write_marker).name == "8"
    assert versions(tmp_path / "m") == [2, 7, 8]
    assert (tmp_path / "m" / "8" / "number").read_text() == "8"


@pytest.mark.parametrize("present", ["empty", "full"])
def test_an_existing_version_is_not_overwritten(tmp_path: Path, present: str) -> None:
    (tmp_path / "m" / "1").mkdir(parents=True)
    if present == "full":
        (tmp_path / "m" / "1" / "model.onnx").write_bytes(b"old")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ExportError, match="exists already"):
        StagedVersion(tmp_path, "m", 1)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("present", ["empty", "full"])
def test_a_version_that_appeared_meanwhile_is_not_overwritten(tmp_path: Path, present: str) -> None:
    with pytest.raises(ExportError, match="exists already"), StagedVersion(tmp_path, "m", 1) as staging:
        (tmp_path / "m" / "1").mkdir()
        if present == "full":
            (tmp_path / "m" / "1" / "model.onnx").write_bytes(b"new")
        staging.publish(write_marker)
    assert list((tmp_path / "m").iterdir()) == [tmp_path / "m" / "1"]
    assert list((tmp_path / "m" / "1").iterdir()) == (
        [tmp_path / "m" / "1" / "model.onnx"] if present == "full" else []
    )


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", ".hidden", "a\0b", "a\n", "x" * 129, "ü"])
def test_a_name_that_cannot_be_a_folder_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ExportError, match="model name"):
        StagedVersion(tmp_path, name)


def test_an_error_leaves_nothing_not_even_new_folders(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), StagedVersion(tmp_path / "new", "m") as staging:
        staging.write("model.onnx", b"network")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    with pytest.raises(ZeroDivisionError), StagedVersion(tmp_path, "m"):
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.rglob("*")] == ["m"]


def test_a_repository_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "repository").write_text("")
    with pytest.raises(ExportError, match="cannot be written"), StagedVersion(tmp_path / "repository", "m"):
        raise AssertionError("a file was taken for a folder")


def test_the_new_version_can_be_read_by_others(tmp_path: Path) -> None:
    with StagedVersion(tmp_path, "m") as staging:
        staging.write("model.onnx", b"network")
        place = staging.publish(write_marker)
    plain = tmp_path / "plain"
    plain.mkdir()
    assert place.stat().st_mode == plain.stat().st_mode  # as the umask has it, not closed like a temporary folder


@pytest.mark.parametrize(
    ("size", "limit", "says"),
    [
        (10_000, 4096, "model.onnx: cannot be written (10000 bytes): File too large"),
        (100, 300, "m/1: cannot be written: File too large"),  # the model fits, the contract does not
    ],
)
def test_no_space_leaves_nothing_and_says_where(tmp_path: Path, size: int, limit: int, says: str) -> None:
    said = finish(start("no-space", tmp_path / "repository", size, limit))
    assert says in said
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_goes_with_the_next_export_and_a_living_one_keeps_its_own(tmp_path: Path) -> None:
    killed, living = start("hold", tmp_path), start("hold", tmp_path)
    try:
        folders = []
        for process in (killed, living):
            assert process.stdout is not None
            folders.append(Path(process.stdout.readline().strip()))
        killed.kill()
        killed.communicate(timeout=60)
        assert all(folder.is_dir() for folder in folders)
        with StagedVersion(tmp_path, "m") as staging:
            staging.publish(write_marker)
        assert [folder.is_dir() for folder in folders] == [False, True]
        assert len(list((tmp_path / "m").glob(f"{PREFIX}*"))) == 2  # the living one's folder and its lock
    finally:
        for process in (killed, living):
            process.kill()
            process.communicate(timeout=60)


def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, PROCESS, "hold", tmp_path / "repository"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # Python's own account of the interrupt
        text=True,
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert list(tmp_path.iterdir()) == []


def test_processes_that_race_get_different_numbers(tmp_path: Path) -> None:
    racers = [start("publish", tmp_path, 25) for _ in range(4)]
    numbers = sorted(int(line) for racer in racers for line in finish(racer).split())
    assert numbers == list(range(1, 101))
    for number in numbers:
        place = tmp_path / "m" / str(number)
        contract = Contract.load(place / CONTRACT_FILE)
        contract.verify_files(place)
        assert contract.version == number
    assert versions(tmp_path / "m") == numbers
    assert not list((tmp_path / "m").glob(f"{PREFIX}*"))


@pytest.mark.slow
def test_dying_at_any_line_leaves_the_old_versions_or_the_complete_new_one(tmp_path: Path) -> None:
    died, *seen = map(int, finish(start("lines", tmp_path)).split())
    # Those that died before the rename left version 1 alone, those after it a complete version 2; the last one lived.
    before = seen.count(1)
    assert seen == [1] * before + [2] * (died + 1 - before)
    assert before > 50
    assert died - before > 5
    assert not list((tmp_path / "m").glob(f"{PREFIX}*"))  # the last one swept what the others left
