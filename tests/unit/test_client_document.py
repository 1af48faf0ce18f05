"""docs/client.md says what is there: every option with its default, every error, and links that lead somewhere."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
from pathlib import Path

import pytest

from forwardpass.client import CallError, Client, Coalesce, Counts, Tls, options
from forwardpass.console import connection_options

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "client.md"
TEXT = DOCUMENT.read_text("utf-8")


def test_the_options_of_sharing_have_their_defaults() -> None:
    told = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \| ", TEXT, re.MULTILINE))
    for option in dataclasses.fields(Coalesce):
        value = "1 MiB" if option.name == "max_bytes" else str(option.default)
        assert told[option.name] == value, f"{option.name} is {option.default}"
    assert Coalesce().max_bytes == 1 << 20


def test_the_options_of_a_request_have_their_defaults() -> None:
    told = dict(re.findall(r"^\| `(\w+)` \| `([^|]+)` \| ", TEXT, re.MULTILINE))
    assert told == {name: repr(value).replace("'", '"') for name, value in options.INFER.items()}


@pytest.mark.parametrize(
    "name",
    [
        *(name for name in inspect.signature(Client).parameters if name != "address"),
        *(field.name for cls in (Tls, Counts) for field in dataclasses.fields(cls) if field.name != "shared_rows"),
    ],
)
def test_every_option_is_told(name: str) -> None:
    words = {"shared_requests": "how many shared requests"}
    assert re.search(rf"`[^`]*\b{name}\b[^`]*`|\b{name}=|{words.get(name, 'no such words')}", TEXT)


def test_every_error_is_told() -> None:
    missing = [cls.__name__ for cls in CallError.__subclasses__() if f"`{cls.__name__}`" not in TEXT]
    assert not missing


def test_the_options_of_commands_are_told() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    connection_options.add_arguments(parser)
    missing = [action.option_strings[0] for action in parser._actions if f"`{action.option_strings[0]}`" not in TEXT]
    assert not missing


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", TEXT)
    assert links and not [link for link in links if not (DOCUMENT.parent / link).exists()]
