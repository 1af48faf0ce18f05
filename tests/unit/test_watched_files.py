"""Files that change: seen once, tried once, and the last good reading kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from forwardpass.errors import SettingsError
from forwardpass.watched_files import Watched, read_bytes


class Reader:
    """Reads a file of text; "bad" cannot be used. Counts how often it did."""

    def __init__(self, path: Path) -> None:
        self.path, self.times = path, 0

    def __call__(self) -> str:
        self.times += 1
        text = read_bytes(self.path, "text").decode()
        if text.startswith("bad"):
            raise SettingsError(f"{self.path} is bad")
        return text


@pytest.fixture
def reader(tmp_path: Path) -> Reader:
    path = tmp_path / "file"
    path.write_text("one")
    return Reader(path)


def test_a_file_is_read_when_it_changed_and_not_before(reader: Reader) -> None:
    watched = Watched("the file", [reader.path], reader)
    assert (watched.value, watched.look(), reader.times) == ("one", False, 1)
    reader.path.write_text("three")
    assert watched.look() and watched.value == "three"
    assert not watched.look() and reader.times == 2
    assert (watched.reloads, watched.failures) == (1, 0)


def test_a_bad_one_is_tried_once_and_changes_nothing(reader: Reader, caplog: pytest.LogCaptureFixture) -> None:
    watched = Watched("the file", [reader.path], reader)
    reader.path.write_text("bad!")
    assert not watched.look() and not watched.look()
    assert watched.value == "one" and reader.times == 2
    assert (watched.reloads, watched.failures) == (0, 1)
    (record,) = caplog.records
    assert "the file changed and cannot be used" in record.getMessage() and record.levelname == "ERROR"
    reader.path.write_text("good again")
    assert watched.look() and watched.value == "good again"


def test_a_file_that_vanished_is_a_change(reader: Reader) -> None:
    watched = Watched("the file", [reader.path], reader)
    reader.path.unlink()
    assert not watched.look() and watched.value == "one" and watched.failures == 1
    reader.path.write_text("two")
    assert watched.look() and watched.value == "two"


def test_a_file_of_the_same_size_and_time_is_known_by_its_number(reader: Reader) -> None:
    import os

    watched = Watched("the file", [reader.path], reader)
    status = reader.path.stat()
    other = reader.path.with_name("other")
    other.write_text("two")
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.replace(reader.path)
    assert watched.look() and watched.value == "two"


def test_what_changes_while_it_is_read_is_read_again(reader: Reader) -> None:
    class Disturbed(Reader):
        def __call__(self) -> str:
            found = super().__call__()
            if found == "first change":
                self.path.write_text("second change!")
            return found

    disturbed = Disturbed(reader.path)
    watched = Watched("the file", [reader.path], disturbed)
    reader.path.write_text("first change")
    assert watched.look() and watched.value == "first change"
    assert watched.look() and watched.value == "second change!"
    assert not watched.look()


def test_the_first_reading_must_succeed(reader: Reader) -> None:
    reader.path.write_text("bad")
    with pytest.raises(SettingsError, match="is bad"):
        Watched("the file", [reader.path], reader)


def test_it_is_read_again_when_it_must_be_though_it_did_not_change(reader: Reader) -> None:
    watched = Watched("the file", [reader.path], reader, every=3600.0)
    assert watched.read_again() == "" and reader.times == 2 and watched.reloads == 1
    reader.path.write_text("bad")
    assert watched.read_again().endswith("is bad") and watched.value == "one" and watched.failures == 1
    assert not watched.look() and reader.times == 3
