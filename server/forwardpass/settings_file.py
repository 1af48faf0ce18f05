"""A TOML file of settings: `grpc_port = 9001`. Which names there are, and what they take, is `settings`' affair."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Collection
from pathlib import Path
from typing import Any

from forwardpass.errors import SettingsError


def read_settings(path: Path, names: Collection[str]) -> dict[str, Any]:
    """The file's values by name, as TOML has them. Raises SettingsError: unreadable, no TOML, a name not in `names`."""
    try:
        found = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror or error}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: is not TOML: {error}") from None
    for name, value in found.items():
        if name in names and not isinstance(value, dict):
            continue
        if isinstance(value, dict):
            raise SettingsError(f"{path}: expected settings as NAME = VALUE at the top, got the table [{name}]")
        near = difflib.get_close_matches(name.replace("-", "_"), names, 1)
        hint = f"; is {near[0]} meant?" if near else "; `forwardpass serve --help` lists them, with _ in place of -"
        raise SettingsError(f"{path}: {name} is no setting{hint}")
    return found
