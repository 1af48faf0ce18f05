"""Options changed in place: what is not changed stays as it was written, in both kinds of file."""

from __future__ import annotations

from pathlib import Path

import pytest

from forwardpass.errors import LoadTestError
from forwardpass.loadtest.options_file import MARK, check, commented, edited, nameless, path_of
from forwardpass.model import triton_config
from forwardpass.model.options import ModelConfig

OPTIONS = {"max_batch_size": 64, "instances": 2, "intra_op_threads": 1, "max_queue_delay_us": 200}

TOML = """\
# What we agreed on.
max_batch_size = 8  # small
labels = "labels.txt"
  instances=1

[queue_policies.1]
timeout_us = 5000  # instances = 9
"""

PBTXT = """\
name: "m"  # as the folder
max_batch_size: 8  # small
input [ { name: "x", data_type: TYPE_FP32, dims: [ 4 ] } ]
instance_group [
  { kind: KIND_CPU, count: 1 }
]
dynamic_batching {
  preferred_batch_size: [ 8 ]
}
parameters { key: "intra_op_thread_count" value: { string_value: "3" } }
parameters { key: "note" value { string_value: "count: 5 }" } }
"""


def values(found: ModelConfig) -> dict[str, int]:
    return {name: getattr(found, name) for name in OPTIONS}


def test_a_model_toml_is_changed_in_place(tmp_path: Path) -> None:
    text = edited(TOML, "model.toml", OPTIONS)
    (tmp_path / "model.toml").write_text(text)
    check(tmp_path, OPTIONS)
    found = ModelConfig.load(tmp_path)
    assert (found.labels, found.queue_policies[1].timeout_us) == ("labels.txt", 5000)
    assert text.startswith("# What we agreed on.\nmax_batch_size = 64  # small\nlabels")
    assert text.endswith("\n[queue_policies.1]\ntimeout_us = 5000  # instances = 9\n")


def test_a_config_pbtxt_is_changed_in_place(tmp_path: Path) -> None:
    text = edited(PBTXT, "config.pbtxt", OPTIONS)
    (tmp_path / "config.pbtxt").write_text(text)
    check(tmp_path, OPTIONS)
    assert values(triton_config.load(tmp_path / "config.pbtxt", "m")) == OPTIONS
    assert "max_batch_size: 64  # small\n" in text and "  { kind: KIND_CPU, count: 2 }\n" in text
    assert "dynamic_batching { max_queue_delay_microseconds: 200\n  preferred_batch_size: [ 8 ]\n}\n" in text
    assert 'string_value: "count: 5 }"' in text and text.count("\n") == PBTXT.count("\n")
    assert edited(text, "config.pbtxt", OPTIONS) == text


@pytest.mark.parametrize(("name", "text"), [("model.toml", ""), ("config.pbtxt", ""), ("config.pbtxt", "# none")])
def test_what_is_not_there_is_added(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(edited(text, name, OPTIONS))
    check(tmp_path, OPTIONS)


def test_what_cannot_be_changed_in_place_is_said(tmp_path: Path) -> None:
    groups = "instance_group [ { count: 1 kind: KIND_CPU }, { count: 1 kind: KIND_CPU } ]\n"
    (tmp_path / "config.pbtxt").write_text(edited(groups, "config.pbtxt", {"instances": 3}))
    with pytest.raises(LoadTestError, match="instances cannot be changed in place: expected 3, got 2"):
        check(tmp_path, {"instances": 3})


def test_a_candidate_has_no_name_of_its_own() -> None:
    assert nameless(PBTXT).startswith("  # as the folder\nmax_batch_size")


@pytest.mark.parametrize("text", ["a = 1\n", "# by hand\na = 1\n"])
def test_an_earlier_comment_is_replaced_and_no_other(text: str) -> None:
    once = commented(text, [f"{MARK}today.", "# 1"])
    assert once == f"{MARK}today.\n# 1\n\n" + text
    assert commented(once, [f"{MARK}again."]) == f"{MARK}again.\n\n" + text


def test_the_file_that_is_there_is_the_one(tmp_path: Path) -> None:
    assert path_of(tmp_path).name == "model.toml"
    (tmp_path / "config.pbtxt").touch()
    assert path_of(tmp_path).name == "config.pbtxt"
