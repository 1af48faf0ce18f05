"""Edit options in place in a model's options file: a model.toml, or Triton's config.pbtxt.

Everything else in the file is preserved, comments included. Pure, except `check`, which reads a file back, and
`path_of`, which looks for the file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from forwardpass.errors import ConfigError, LoadTestError
from forwardpass.model import options, triton_config
from forwardpass.model.options import ModelConfig
from forwardpass.model.pbtxt_lines import TextNode, read_lines

MARK = "# Tuned "  # prefix of the comment, which the next run replaces
_THREADS = "intra_op_thread_count"


def edited(text: str, name: str, options: Mapping[str, int]) -> str:
    """The text of an options file named `name` with these options of model.toml changed or added."""
    return _pbtxt(text, options) if name == triton_config.FILE_NAME else _toml(text, options)


def nameless(text: str) -> str:
    """A config.pbtxt without the model's name, so that it fits a folder of any name."""
    return _replaced(text, [(node.start, node.end, "") for node in read_lines(text).children.get("name", [])])


def commented(text: str, lines: Iterable[str]) -> str:
    """The text with a comment of these lines, the first of which begins with MARK, at its top.

    Replaces an earlier such comment. An empty line separates it from comments that follow.
    """
    if text.startswith(MARK):
        text = re.sub(r"\A(?:#.*\n)*\n?", "", text)
    return "".join(f"{line}\n" for line in (*lines, "")) + text


def check(folder: Path, options: Mapping[str, int]) -> None:
    """Verify the values in the options file in `folder`. Raises LoadTestError if its format prevented the edit."""
    try:
        triton = folder / triton_config.FILE_NAME
        found = triton_config.load(triton, None) if triton.exists() else ModelConfig.load(folder)
    except ConfigError as error:
        raise LoadTestError(f"the options cannot be changed in place: {error}") from None
    for name, value in options.items():
        if getattr(found, name) != value:
            raise LoadTestError(f"{name} cannot be changed in place: expected {value}, got {getattr(found, name)}")


def _toml(text: str, options: Mapping[str, int]) -> str:
    # Top-level options end at the first table.
    table = re.search(r"^[ \t]*\[", text, re.MULTILINE)
    head, rest = (text[: table.start()], text[table.start() :]) if table else (text, "")
    added = ""
    for name, value in options.items():
        line = f"{name} = {value}"
        head, count = re.subn(rf"^[ \t]*{name}[ \t]*=[ \t]*[^#\n]*?(?=[ \t]*(?:#|$))", line, head, flags=re.MULTILINE)
        added += "" if count else line + "\n"
    if added and head and not head.endswith("\n"):
        head += "\n"
    return head + added + rest


def _pbtxt(text: str, options: Mapping[str, int]) -> str:
    root = read_lines(text)
    changes: list[tuple[int, int, str]] = []
    added = []
    for name, value in options.items():
        change, line = _CHANGES[name](root, value)
        changes += change
        added += [line] if line else []
    text = _replaced(text, changes)
    if added and text and not text.endswith("\n"):
        text += "\n"
    return text + "".join(f"{line}\n" for line in added)


_Change = tuple[list[tuple[int, int, str]], str]  # (start, end, replacement) edits; a line to append


def _size(root: TextNode, value: int) -> _Change:
    said = f"max_batch_size: {value}"
    node = root.child("max_batch_size")
    return ([(node.start, node.end, said)], "") if node else ([], said)


def _instances(root: TextNode, value: int) -> _Change:
    groups = root.children.get("instance_group", [])
    if not groups:
        return [], f"instance_group [ {{ count: {value} }} ]"
    # The number of instances is the sum of all groups' `count`: several groups are left unchanged, and `check` raises.
    return [_within(groups[0], "count", value)] if len(groups) == 1 else [], ""


def _threads(root: TextNode, value: int) -> _Change:
    node = root.child("parameters", _THREADS)
    inner = node.child("value") if node else None
    said = inner.child("string_value") if inner else None
    if said is None:
        return [], f'parameters {{ key: "{_THREADS}" value {{ string_value: "{value}" }} }}'
    return [(said.start, said.end, f'string_value: "{value}"')], ""


def _delay(root: TextNode, value: int) -> _Change:
    node = root.child("dynamic_batching")
    if node is None:
        return [], f"dynamic_batching {{ max_queue_delay_microseconds: {value} }}"
    return [_within(node, "max_queue_delay_microseconds", value)], ""


def _within(node: TextNode, name: str, value: int) -> tuple[int, int, str]:
    """The edit that changes a scalar field of a message, or inserts it first."""
    there = node.child(name)
    if there is not None:
        return there.start, there.end, f"{name}: {value}"
    return node.inner, node.inner, f" {name}: {value}"


_CHANGES = {
    "max_batch_size": _size,
    "instances": _instances,
    "intra_op_threads": _threads,
    "max_queue_delay_us": _delay,
}


def _replaced(text: str, changes: Iterable[tuple[int, int, str]]) -> str:
    for start, end, said in sorted(changes, reverse=True):
        text = text[:start] + said + text[end:]
    return text


def path_of(folder: Path) -> Path:
    """The path of a model's options file, which need not exist."""
    triton = folder / triton_config.FILE_NAME
    return triton if triton.exists() else folder / options.FILE_NAME
