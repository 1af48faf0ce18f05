"""One model's options: read from model.toml, refused by name, and never ignored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from forwardpass.errors import ConfigError
from forwardpass.model.options import ModelConfig, table


def read(folder: Path, text: str | bytes) -> ModelConfig:
    path = folder / "model.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return ModelConfig.load(folder)


def test_without_a_file_there_are_defaults(tmp_path: Path) -> None:
    assert ModelConfig.load(tmp_path) == ModelConfig()
    assert read(tmp_path, "") == ModelConfig()


def test_options_are_read(tmp_path: Path) -> None:
    found = read(tmp_path, "max_batch_size = 8\npreferred_batch_sizes = [2, 4]\ndeadline_scheduling = false\n")
    assert (found.max_batch_size, found.preferred_batch_sizes, found.deadline_scheduling) == (8, [2, 4], False)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("max_batchsize = 8", ["max_batchsize is not an option", "the options are max_batch_size, "]),
        ("max_batch_size = -1", ["max_batch_size: ", "got -1"]),
        ('max_batch_size = "eight"', ["max_batch_size: ", "got 'eight'"]),
        ("instances = 0", ["instances: ", "got 0"]),
        ("priority_levels = 2\ndefault_priority = 3", ["default_priority"]),
        ("max_queue_delay_us = 99999999", ["max_queue_delay_us: "]),
        ("max_batch_size = ", ["not TOML"]),
        ("[queue]\nrows = 3", ["queue is not an option"]),
        (b"\xff\xfe", ["cannot be read"]),
    ],
)
def test_what_cannot_be_is_told_with_the_file_the_option_and_what_came(
    tmp_path: Path, text: str | bytes, words: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text)
    for word in [str(tmp_path / "model.toml"), *words]:
        assert word in str(caught.value)


def test_several_mistakes_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"one is not an option.*; two is not an option"):
        read(tmp_path, "one = 1\ntwo = 2\n")


def test_the_table_has_every_option_with_its_default_and_meaning() -> None:
    rows = table().splitlines()[2:]
    for (name, field), row in zip(ModelConfig.model_fields.items(), rows, strict=True):
        default: Any = field.default
        assert row.startswith(f"| `{name}` | ") and field.description and field.description in row
        if isinstance(default, bool):
            assert f"| {str(default).lower()} |" in row
